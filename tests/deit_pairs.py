"""Small DeiTs of timm and transformers and our copies: every parameter matters."""

from __future__ import annotations

import torch
from checkpoint_pairs import SIZES, transformers
from torch import nn
from vit_pairs import TINY, randomised

from vitkernels import FusedDeiT

# name: (timm's arguments, image size)
DISTILLED = {
    "distilled": ({}, (32, 32)),
    "layer_scale": ({"init_values": 0.3, "qkv_bias": False}, (32, 32)),
    "dynamic_size": ({"dynamic_img_size": True}, (40, 24)),
    "gray_not_square": ({"img_size": (24, 56), "patch_size": (8, 7), "in_chans": 1}, (24, 56)),
    "clip_norms": ({"pre_norm": True, "norm_layer": nn.LayerNorm, "qk_norm": True}, (32, 32)),
}
PLAIN = {
    "deit": ({}, (32, 32)),
    "deit3": ({"no_embed_class": True, "init_values": 1e-4}, (32, 32)),
}
CONFIGS = DISTILLED | PLAIN


class Joined(nn.Module):
    """A model whose pair of outputs is one Tensor: its gradients are taken in one go."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        out = self.model(x)
        return torch.stack(out) if isinstance(out, tuple) else out

    def set_grad_checkpointing(self, enable=True):
        self.model.set_grad_checkpointing(enable)


def timm_deit(name="distilled", **more) -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    cls = VisionTransformerDistilled if name in DISTILLED else VisionTransformer
    return randomised(cls(**{"num_classes": 10, **TINY, **CONFIGS[name][0], **more}).eval())


def pair(name="distilled", **more) -> tuple[nn.Module, FusedDeiT]:
    theirs = timm_deit(name, **more)
    return theirs, FusedDeiT.from_timm(theirs)


def images(name="distilled", batch=2) -> torch.Tensor:
    return torch.randn(batch, CONFIGS[name][0].get("in_chans", 3), *CONFIGS[name][1])


HUGGINGFACE = {
    "two_heads": ("DeiTForImageClassificationWithTeacher", {"num_labels": 7}),
    "one_head": ("DeiTForImageClassification", {"num_labels": 7}),
    "model": ("DeiTModel", {"qkv_bias": False, "layer_norm_eps": 1e-3}),
    "tanh": ("DeiTForImageClassificationWithTeacher", {"hidden_act": "gelu_pytorch_tanh"}),
}


def huggingface_deit(name="two_heads", **more) -> nn.Module:
    kind, settings = HUGGINGFACE[name]
    cls = getattr(transformers, kind)
    config = cls.config_class(**{**SIZES, "intermediate_size": 100, **settings, **more})
    config._attn_implementation = "sdpa"
    return randomised(cls(config).eval())
