"""Small hybrid ViTs of timm and our copies, with weights that make every parameter matter."""

import functools

import torch
from torch import nn
from vit_pairs import randomised

from vitkernels import FusedHybridViT

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
NARROW = (128, 256, 384)  # channels of the stages

# name: (blocks of the stages, HybridEmbed's own arguments, VisionTransformer's, image size)
CONFIGS = {
    "r": ((), {}, {"img_size": 64, "patch_size": 4}, (64, 64)),  # vit_tiny_r_s16_p8
    "r8": ((2, 1, 1), {}, {"img_size": 64, "patch_size": 1}, (64, 64)),  # vit_base_r50_s16
    "one_stage": ((1,), {}, {"img_size": 48, "patch_size": 3, "init_values": 0.3}, (48, 48)),
    "odd_size": ((1, 1), {}, {"img_size": (41, 29), "patch_size": (3, 2)}, (41, 29)),
    "gray_registers": (
        (1, 1), {}, {"img_size": 32, "patch_size": 2, "in_chans": 1, "reg_tokens": 2}, (32, 32),
    ),
    "average_pool": (
        (1, 1), {}, {"img_size": 32, "patch_size": 1, "global_pool": "avg", "class_token": False},
        (32, 32),
    ),
    "no_projection": (
        (1,), {"proj": False},
        {"img_size": 32, "patch_size": 1, "embed_dim": 128, "num_heads": 2, "no_embed_class": True},
        (32, 32),
    ),
    "dynamic_size": (
        (1, 1), {}, {"img_size": 32, "patch_size": 1, "dynamic_img_size": True}, (48, 24),
    ),
    "dynamic_crop": (
        (1, 1), {}, {"img_size": 32, "patch_size": 2, "dynamic_img_size": True}, (56, 40),
    ),
    "dynamic_pad": (
        (1, 1), {},
        {"img_size": 32, "patch_size": 3, "dynamic_img_size": True, "dynamic_img_pad": True},
        (56, 40),
    ),
    "pre_norm": ((1, 1), {}, {"img_size": 32, "patch_size": 1, "pre_norm": True}, (32, 32)),
    "symmetric": ((1, 1), {"padding_same": False}, {"img_size": 32, "patch_size": 1}, (32, 32)),
}  # fmt: skip


def timm_backbone(layers, in_chans=3, padding_same=True, **more) -> nn.Module:
    """As timm's models/vision_transformer_hybrid.py makes it, narrower."""
    from timm.layers import StdConv2d, StdConv2dSame
    from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem

    conv_layer = functools.partial(StdConv2dSame if padding_same else StdConv2d, eps=1e-8)
    stem = {"stem_type": "same" if padding_same else "", "preact": False, "conv_layer": conv_layer}
    if not layers:
        return create_resnetv2_stem(in_chans, **stem)
    return ResNetV2(
        layers=layers, channels=NARROW, num_classes=0, global_pool="", in_chans=in_chans,
        **stem, **more,
    )  # fmt: skip


def timm_hybrid(name="r8", backbone=None, **more) -> nn.Module:
    """timm's model of a configuration, evaluating; no parameter keeps its initial 0 or 1."""
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer import VisionTransformer

    layers, embed, settings, _ = CONFIGS[name]
    settings, embed = {**TINY, **settings, **more}, dict(embed)
    padding_same = embed.pop("padding_same", True)
    if backbone is None:
        backbone = timm_backbone(layers, settings.get("in_chans", 3), padding_same)
    embed_layer = functools.partial(HybridEmbed, backbone=backbone, **embed)
    return randomised(VisionTransformer(embed_layer=embed_layer, **settings).eval())


def pair(name="r8", **more) -> tuple[nn.Module, FusedHybridViT]:
    theirs = timm_hybrid(name, **more)
    return theirs, FusedHybridViT.from_timm(theirs)


def images(name="r8", batch=2) -> torch.Tensor:
    *_, settings, size = CONFIGS[name]
    return torch.randn(batch, settings.get("in_chans", 3), *size)
