"""The model families of the command line: one row holds all that names and weights need of each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..models import FusedViT
from ..models.loaders import SIZES


@dataclasses.dataclass(frozen=True)
class Family:
    """A model class, and how the commands speak of its models."""

    model: type[nn.Module]  # with named, from_timm and from_pretrained
    of_timm: str  # how timm's classes of this family are called, a pattern
    plain: Callable[[str], bool]  # whether model.named knows the sizes of this name
    common: tuple[str, ...]  # names to suggest
    shape: Callable[[nn.Module], tuple[tuple[str, object], ...]]  # what names and weights agree on
    unwritten: Callable[[nn.Module], dict]  # arguments that shapes of weights do not tell


def family_of(model: nn.Module) -> Family:
    """The family of a model of ours, or of one of timm's; of an unknown one the first."""
    for family in FAMILIES:
        if isinstance(model, family.model) or re.fullmatch(family.of_timm, type(model).__name__):
            return family
    return FAMILIES[0]


def plain_family(name: str) -> Family | None:
    """The family that knows the sizes of this name without timm."""
    return next((family for family in FAMILIES if family.plain(name)), None)


def family_of_weights(path: Path) -> Family:
    """The family of a checkpoint, by its names; of others the first, which says what they are."""
    return FAMILIES[0]


# --- ViT ------------------------------------------------------------------------------------------


def _plain_vit(name: str) -> bool:
    match = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_(\d+)", name)
    return match is not None and match[1] in SIZES and 0 < int(match[2]) <= int(match[3])


def _shape_of_vit(model: FusedViT) -> tuple[tuple[str, object], ...]:
    return (
        ("the width", model.embed_dim),
        ("the depth", len(model.blocks)),
        ("the patch size", _by(model.patch_embed.patch_size)),
        ("the MLP's width", model.blocks[0].mlp.fc1.out_features),
        ("the number of register tokens", model.num_reg_tokens),
    )


def _by(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


FAMILIES = (
    Family(
        model=FusedViT,
        of_timm=r"VisionTransformer.*",
        plain=_plain_vit,
        common=tuple(
            f"vit_{size}_patch{patch}_{pixels}"
            for size in SIZES
            for patch, pixels in ((16, 224), (32, 224), (14, 224), (8, 224), (16, 384), (32, 384))
        ),
        shape=_shape_of_vit,
        unwritten=lambda model: {"num_heads": model.blocks[0].attn.num_heads},
    ),
)
