"""torchvision's VisionTransformer -> FusedViT. torchvision itself is never imported."""

from __future__ import annotations

import functools
import re

from torch import Tensor, nn

from ..nn import LayerNorm
from .build import IMAGENET, build
from .vit_shapes import VIT

_OUTSIDE = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj.weight": "patch_embed.proj.weight",
    "conv_proj.bias": "patch_embed.proj.bias",
    "encoder.ln.weight": "norm.weight",
    "encoder.ln.bias": "norm.bias",
    "heads.head.weight": "head.weight",
    "heads.head.bias": "head.bias",
}
_BLOCK = re.compile(r"^encoder\.layers\.encoder_layer_(\d+)\.(.+?)[._](weight|bias)$")
_INSIDE = {
    "ln_1": "norm1",
    "self_attention.in_proj": "attn.qkv",
    "self_attention.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
    "mlp.linear_1": "mlp.fc1",  # torchvision before 0.12
    "mlp.linear_2": "mlp.fc2",
}


def vit_from_torchvision(cls, source: nn.Module, **kwargs):
    """A FusedViT with the settings, and copies of the parameters, of vit_b_16 and the others."""
    loader = "from_torchvision"
    name = type(source).__name__
    if name != "VisionTransformer" or not hasattr(source, "conv_proj"):
        raise ValueError(f"{loader}: the model must be torchvision's VisionTransformer, got {name}")
    if not isinstance(source.conv_proj, nn.Conv2d):
        raise ValueError(f"{loader}: a convolutional stem is not supported by FusedViT")
    if getattr(source, "representation_size", None) is not None:
        raise ValueError(
            f"{loader}: representation_size (a layer before the head) is not supported"
        )
    layer = source.encoder.layers[0]
    hints = {
        "img_size": source.image_size,
        "num_heads": layer.num_heads,
        "norm_layer": functools.partial(LayerNorm, eps=layer.ln_1.eps),
        "pos_drop_rate": source.encoder.dropout.p,
        "proj_drop_rate": layer.dropout.p,
        "attn_drop_rate": layer.self_attention.dropout,
        **IMAGENET,
    }
    state = timm_state(source.state_dict(keep_vars=True))
    model = build(VIT, cls, loader, "the model", state, hints, kwargs, keep_requires_grad=True)
    return model.train(source.training)


def timm_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {_rename(key): tensor for key, tensor in tensors.items()}


def _rename(key: str) -> str:
    match = _BLOCK.match(key)
    if match is None or match[2] not in _INSIDE:
        return _OUTSIDE.get(key, key)
    return f"blocks.{match[1]}.{_INSIDE[match[2]]}.{match[3]}"
