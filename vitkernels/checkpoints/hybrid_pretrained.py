"""A hybrid ViT's checkpoint file or folder of any known source -> FusedHybridViT."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from torch import Tensor, nn

from . import hybrid_huggingface, hybrid_jax, jax
from .build import BICUBIC, BILINEAR, build, one_sentence, warn_of_ignored
from .hybrid_shapes import BACKBONE, HYBRID, NAME
from .pretrained import LOADER, RESNET, SWIN, read, refuse_others, timm_normalization

VIT = "a Vision Transformer without a CNN"
SWIN_TRANSFORMER = "a Swin Transformer"

_OTHERS = (
    *((pattern, SWIN_TRANSFORMER) for pattern in SWIN),
    RESNET,
    (r"^patch_embed\.proj\.weight$|^(opt/target/|params/)?embedding/kernel$", VIT),
    (r"embeddings\.patch_embeddings\.projection\.weight$|^conv_proj\.weight$", VIT),
)


def hybrid_from_pretrained(cls, path: str | os.PathLike, **kwargs):
    """A FusedHybridViT from a file, or from a folder as transformers and timm's hub write them."""
    path = Path(path)
    if isinstance(kwargs.get("backbone"), nn.Module):
        kwargs["backbone"] = copy.deepcopy(kwargs["backbone"])  # its parameters are exchanged
    config, tensors = read(path)
    if "model_type" in config:
        return hybrid_huggingface.from_state(cls, LOADER, path.name, config, tensors, kwargs)
    return _from_tensors(cls, path.name, tensors, _timm_hints(config) if config else {}, kwargs)


def _from_tensors(cls, origin: str, tensors: dict[str, Tensor], hints: dict, overrides: dict):
    source = source_of(origin, tensors)
    if source == "huggingface":
        return hybrid_huggingface.from_state(cls, LOADER, origin, {}, tensors, overrides)
    resampling = BICUBIC
    with one_sentence(LOADER, origin, NAME):
        if source == "jax":
            state, hints = hybrid_jax.timm_state(LOADER, origin, tensors)
            resampling = BILINEAR
        else:
            layers = [key for key in tensors if key.startswith("pre_logits.")]
            warn_of_ignored(LOADER, layers, "layer before the head", NAME)  # as timm
            state = {key: tensor for key, tensor in tensors.items() if key not in layers}
    return build(HYBRID, cls, LOADER, origin, state, hints, overrides, resampling=resampling)


def source_of(origin: str, tensors: dict[str, Tensor]) -> str:
    """timm, huggingface or jax."""
    if (prefix := jax.jax_prefix(tensors)) is not None and prefix + hybrid_jax.ROOT in tensors:
        return "jax"
    if hybrid_huggingface.is_huggingface(tensors):
        return "huggingface"
    if any(key.startswith(BACKBONE) for key in tensors):
        return "timm"
    classes = {VIT: "FusedViT", SWIN_TRANSFORMER: "FusedSwin"}
    refuse_others(origin, tensors, _OTHERS, NAME, classes)
    some = ", ".join(list(tensors)[:3])
    raise ValueError(
        f"{LOADER}: {origin} must have the names of a hybrid Vision Transformer of timm,"
        f" transformers or JAX, got {some}{' ...' if len(tensors) > 3 else ''}"
    )


def _timm_hints(config: dict) -> dict:
    """timm's config.json: the normalisation and the model's own arguments."""
    hints = timm_normalization(config)
    if config.get("global_pool") in ("token", "avg", "max", "avgmax"):
        hints["global_pool"] = config["global_pool"]
    return {**hints, **config.get("model_args", {})}
