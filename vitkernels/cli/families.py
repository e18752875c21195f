"""The model families of the command line: one row holds all that names and weights need of each."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..models import FusedDeiT, FusedHybridViT, FusedSwin, FusedViT
from ..models.deit_names import DEIT_NAMES
from ..models.hybrid_names import COMMON as HYBRID_NAMES
from ..models.hybrid_names import hybrid_settings
from ..models.loaders import SIZES
from ..models.swin_names import S3_SIZES, SWIN_SIZES, swin_settings
from ..nn import ResNetStem, ResNetV2


@dataclasses.dataclass(frozen=True)
class Family:
    """A model class, and how the commands speak of its models."""

    title: str  # in pictures
    model: type[nn.Module]  # with named, from_timm and from_pretrained
    of_timm: str  # how timm's classes of this family are called, a pattern
    plain: Callable[[str], bool]  # whether model.named knows the sizes of this name
    common: tuple[str, ...]  # names to suggest
    shape: Callable[[nn.Module], tuple[tuple[str, object], ...]]  # what names and weights agree on
    unwritten: Callable[[nn.Module], dict]  # arguments that shapes of weights do not tell
    saved: Callable[[nn.Module], dict]  # arguments for the config.json beside weights of ours


def family_of(model: nn.Module) -> Family:
    """The family of a model of ours, or of one of timm's; of an unknown one the first."""
    if type(getattr(model, "patch_embed", None)).__name__ == "HybridEmbed":
        return _of_class(FusedHybridViT)
    for family in reversed(FAMILIES):  # a FusedDeiT is a FusedViT, too
        if isinstance(model, family.model) or re.fullmatch(family.of_timm, type(model).__name__):
            return family
    return FAMILIES[0]


def plain_family(name: str) -> Family | None:
    """The family that knows the sizes of this name without timm."""
    return next((family for family in FAMILIES if family.plain(name)), None)


def family_of_weights(path: Path) -> Family:
    """The family of a checkpoint, by its names; of others the first, which says what they are."""
    from ..checkpoints.pretrained import DISTILLED, HYBRID, SWIN, read

    with contextlib.suppress(ValueError, OSError, ImportError):  # the loader says it, too
        names = read(path)[1]
        patterns = ((FusedHybridViT, (HYBRID,)), (FusedSwin, SWIN), (FusedDeiT, (DISTILLED,)))
        for model, known in patterns:
            if any(re.search(pattern, name) for pattern in known for name in names):
                return _of_class(model)
    return FAMILIES[0]


def _of_class(model: type[nn.Module]) -> Family:
    return next(family for family in FAMILIES if family.model is model)


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


def _shape_of_deit(model: FusedDeiT) -> tuple[tuple[str, object], ...]:
    return (*_shape_of_vit(model), ("the number of distillation tokens", int(model.distilled)))


def _saved_of_vit(model: FusedViT) -> dict:
    return {"num_heads": model.blocks[0].attn.num_heads, "global_pool": model.global_pool}


def _by(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


# --- hybrid ---------------------------------------------------------------------------------------


def _plain_hybrid(name: str) -> bool:
    try:
        settings = hybrid_settings(name)
    except ValueError:
        return False
    return settings["patch_size"] > 0 and settings["img_size"] > 0


def _shape_of_hybrid(model: FusedHybridViT) -> tuple[tuple[str, object], ...]:
    depths = getattr(model.patch_embed.backbone, "depths", ())
    return (("the CNN", "-".join(map(str, depths)) or "a stem"), *_shape_of_vit(model))


def _unwritten_of_hybrid(model: FusedHybridViT) -> dict:
    """A CNN of another kind than ours is in no shape of a file."""
    untold: dict = {"num_heads": model.blocks[0].attn.num_heads}
    backbone = model.patch_embed.backbone
    if not isinstance(backbone, (ResNetStem, ResNetV2)):
        untold["backbone"] = backbone
    return untold


# --- Swin -----------------------------------------------------------------------------------------


def _plain_swin(name: str) -> bool:
    try:
        return bool(swin_settings(name))
    except ValueError:
        return False


def _shape_of_swin(model: FusedSwin) -> tuple[tuple[str, object], ...]:
    first = [layer.blocks[0] for layer in model.layers]
    return (
        ("the version", model.version),
        ("the width", first[0].attn.dim),
        ("the depth", ", ".join(str(len(layer.blocks)) for layer in model.layers)),
        ("the patch size", _by(model.patch_embed.patch_size)),
        ("the window", ", ".join(_by(block.window_size) for block in first)),
        ("the number of heads", ", ".join(str(block.attn.num_heads) for block in first)),
        ("the MLP's width", first[0].mlp.fc1.out_features),
    )


def _unwritten_of_swin(model: FusedSwin) -> dict:
    if model.version == 1:
        return {}
    sizes = [layer.blocks[0].attn.pretrained_window_size for layer in model.layers]
    return {"pretrained_window_sizes": sizes}


def _saved_of_swin(model: FusedSwin) -> dict:
    return {
        "window_size": model._ref_window_sizes,
        "global_pool": model.global_pool,
        "pad_mode": model.pad_mode,
        "window_clamp": model.window_clamp,
        **_unwritten_of_swin(model),
    }


FAMILIES = (
    Family(
        title="ViT",
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
        saved=_saved_of_vit,
    ),
    Family(
        title="hybrid ViT",
        model=FusedHybridViT,
        of_timm="",  # timm's class is that of its ViT
        plain=_plain_hybrid,
        common=HYBRID_NAMES,
        shape=_shape_of_hybrid,
        unwritten=_unwritten_of_hybrid,
        saved=_saved_of_vit,
    ),
    Family(
        title="Swin",
        model=FusedSwin,
        of_timm=r"SwinTransformer.*",
        plain=_plain_swin,
        common=(
            *(f"swin_{size}_patch4_window7_224" for size in SWIN_SIZES),
            *(f"swin_{size}_patch4_window12_384" for size in ("base", "large")),
            *(f"swin_s3_{size}_224" for size in S3_SIZES),
            *(f"swinv2_{size}_window{w}_256" for size in SWIN_SIZES for w in (8, 16)),
        ),
        shape=_shape_of_swin,
        unwritten=_unwritten_of_swin,
        saved=_saved_of_swin,
    ),
    Family(
        title="DeiT",
        model=FusedDeiT,
        of_timm=r"VisionTransformerDistilled",
        plain=DEIT_NAMES.__contains__,
        common=DEIT_NAMES,
        shape=_shape_of_deit,
        unwritten=lambda model: {"num_heads": model.blocks[0].attn.num_heads},
        saved=_saved_of_vit,
    ),
)
