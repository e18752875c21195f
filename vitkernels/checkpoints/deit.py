"""timm's, transformers' and the original repository's DeiT -> FusedDeiT."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from torch import Tensor, nn

from . import huggingface, timm
from .build import Family, State, build, need, one_sentence
from .pretrained import DISTILLED, LOADER, OTHERS, original_names, read, refuse_others, timm_hints
from .vit_shapes import fit_sizes, settings_from_shapes

NAME = "FusedDeiT"
_OTHERS = tuple((pattern, what) for pattern, what in OTHERS if pattern != DISTILLED)


def deit_settings_from_shapes(loader: str, origin: str, state: State, known: dict) -> dict:
    if "dist_token" in state:
        need(loader, origin, state, "cls_token", 3, NAME)
    settings = settings_from_shapes(loader, origin, state, known)
    one_head = "head.weight" in state and "head_dist.weight" not in state
    return {**settings, "distilled": "dist_token" in state, "dist_head": not one_head}


DEIT = Family(NAME, ("head.", "head_dist."), deit_settings_from_shapes, fit_sizes)


def deit_from_timm(cls, source: str | nn.Module, pretrained: bool = False, **kwargs):
    """A FusedDeiT with the settings, and copies of the parameters, of a timm
    VisionTransformerDistilled, or of a VisionTransformer (DeiT without distillation, DeiT-III)."""
    source = timm.source_model(source, pretrained, kwargs)
    timm.expect(NAME, source, "VisionTransformerDistilled", "model", "VisionTransformer")
    distilled = type(source).__name__ == "VisionTransformerDistilled"
    model = timm.copied(cls, source, {**timm.vit_settings(source), "distilled": distilled})
    model.distilled_training = getattr(source, "distilled_training", False)
    return model


_from_state = functools.partial(huggingface.from_state, family=DEIT)


def deit_from_huggingface(cls, source: str | os.PathLike | nn.Module, **kwargs):
    """A FusedDeiT with the settings, and copies of the parameters, of transformers' model."""
    return huggingface.from_source(_from_state, cls, source, "DeiT", kwargs)


def deit_from_pretrained(cls, path: str | os.PathLike, **kwargs):
    """A FusedDeiT from a file, or from a folder as transformers and timm's hub write them."""
    path = Path(path)
    config, tensors = read(path)
    if "model_type" in config:
        return _from_state(cls, LOADER, path.name, config, tensors, kwargs)
    if _source_of(path.name, tensors) == "huggingface":
        return _from_state(cls, LOADER, path.name, {}, tensors, kwargs)
    with one_sentence(LOADER, path.name, NAME):
        state, hints = original_names(tensors)
    hints = {**hints, **(timm_hints(config) if config else {})}
    return build(DEIT, cls, LOADER, path.name, state, hints, kwargs)


def _source_of(origin: str, tensors: dict[str, Tensor]) -> str:
    """timm (also the original repository's names) or huggingface."""
    refuse_others(origin, tensors, _OTHERS, NAME, {"a Swin Transformer": "FusedSwin"})
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in tensors):
        return "huggingface"
    if "patch_embed.proj.weight" in tensors:
        return "timm"
    some = ", ".join(list(tensors)[:3])
    raise ValueError(
        f"{LOADER}: {origin} must have the names of a DeiT of timm, the original repository or"
        f" transformers, got {some}{' ...' if len(tensors) > 3 else ''}"
    )
