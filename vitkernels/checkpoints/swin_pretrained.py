"""A Swin checkpoint file or folder of any known source -> FusedSwin. The names tell the source."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from torch import Tensor

from ..models.swin_names import swin_settings
from . import swin_huggingface, swin_microsoft, swin_openmmlab, swin_torchvision
from .build import State, build, one_sentence
from .pretrained import LOADER, RESNET, read, refuse_others, timm_normalization
from .swin_shapes import NAME, SWIN, hints_from_buffers, without_buffers
from .swin_timm import RULES as TIMM_RULES

VIT = "a Vision Transformer"

# What a checkpoint of another architecture has, and what it is.
_OTHERS = (
    (
        r"^encoder\.mask_token$",
        "a SimMIM pre-training checkpoint (its encoder is FusedSwin's part)",
    ),
    (r"^stages\.\d+\.blocks\.\d+\.attn\.logit_scale$|^patch_embed\.\d+\.", "timm's Swin V2 Cr"),
    (r"^(blocks|encoder\.layers?|layers)\.\d+\.(norm1|layernorm_before)\.", VIT),
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", VIT),
    (r"^encoder\.layers\.encoder_layer_\d+\.|^(cls_token|class_token)$", VIT),
    (r"Transformer/encoderblock", VIT),
    (r"\.attn\.(qkv_moe|moe)|\.mlp\._moe_layer\.", "a mixture-of-experts Swin Transformer"),
    RESNET,
)


def swin_from_pretrained(cls, path: str | os.PathLike, **kwargs):
    """A FusedSwin from a file, or from a folder as transformers and timm's hub write them."""
    path = Path(path)
    config, tensors = read(path)
    if "model_type" in config:
        return swin_huggingface.from_state(cls, LOADER, path.name, config, tensors, kwargs)
    return _from_tensors(cls, path.name, tensors, _timm_hints(config) if config else {}, kwargs)


def _from_tensors(cls, origin: str, tensors: dict[str, Tensor], hints: dict, overrides: dict):
    source = source_of(origin, tensors)
    if source == "huggingface":
        return swin_huggingface.from_state(cls, LOADER, origin, {}, tensors, overrides)
    if source == "openmmlab":
        return swin_openmmlab.from_state(cls, LOADER, origin, tensors, overrides)
    if source == "microsoft":
        return swin_microsoft.from_state(cls, LOADER, origin, tensors, overrides)
    with one_sentence(LOADER, origin, NAME):
        if source == "torchvision":
            hints = {**swin_torchvision.RULES, **swin_torchvision.hints_from_names(tensors)}
            state: State = swin_torchvision.timm_state(tensors)
        else:
            hints = {**TIMM_RULES, **hints_from_buffers(tensors), **hints}
            state = without_buffers(tensors)
    model = build(SWIN, cls, LOADER, origin, state, hints, overrides)
    return swin_torchvision.of_any_size(model) if source == "torchvision" else model


def source_of(origin: str, tensors: dict[str, Tensor]) -> str:
    """timm, microsoft, huggingface, torchvision or openmmlab."""
    if swin_openmmlab.is_openmmlab(tensors):
        return "openmmlab"
    if any(re.search(r"(^|\.)encoder\.layers\.\d+\.blocks\.\d+\.", key) for key in tensors):
        refuse_others(origin, tensors, _OTHERS[:1], NAME, {})
        return "huggingface"
    refuse_others(origin, tensors, _OTHERS, NAME, {VIT: "FusedViT"})
    if "features.0.0.weight" in tensors and "features.0.2.weight" in tensors:
        return "torchvision"
    if swin_microsoft.is_microsoft(tensors):
        return "microsoft"
    if "patch_embed.proj.weight" in tensors:
        return "timm"
    some = ", ".join(list(tensors)[:3])
    raise ValueError(
        f"{LOADER}: {origin} must have the names of a Swin Transformer of timm, Microsoft,"
        f" transformers, torchvision or OpenMMLab, got {some}{' ...' if len(tensors) > 3 else ''}"
    )


def _timm_hints(config: dict) -> dict:
    """timm's config.json: the normalisation, the model's own arguments and what its name says."""
    hints = timm_normalization(config)
    size = config.get("pretrained_cfg", {}).get("input_size")
    if size is not None:
        hints["img_size"] = tuple(size[-2:])
    if config.get("global_pool") in ("avg", "max", "avgmax"):
        hints["global_pool"] = config["global_pool"]
    with contextlib.suppress(ValueError):  # a name of somebody's own
        named = swin_settings(config["architecture"])
        told = ("img_size", "window_size", "pretrained_window_sizes")
        hints = {**{name: named[name] for name in told if name in named}, **hints}
    return {**hints, **config.get("model_args", {})}
