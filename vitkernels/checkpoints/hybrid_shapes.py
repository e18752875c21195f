"""What the shapes of a hybrid Vision Transformer's state dict say, and their fit to other sizes."""

from __future__ import annotations

import re

from torch import nn

from ..nn import ResNetStem, ResNetV2
from ..nn.hybrid_embed import measured
from ..nn.patch_embed import pair
from . import vit_shapes
from .build import Family, State, channels, need

NAME = "FusedHybridViT"
BACKBONE = "patch_embed.backbone."
STEMS = (f"{BACKBONE}stem.conv.weight", f"{BACKBONE}conv.weight")  # of a ResNet, of a stem alone
USUAL_SIZE = (224, 224)  # for which a map is measured where no size is told


def settings_from_shapes(loader: str, origin: str, state: State, known: dict) -> dict:
    """Constructor arguments that shapes and names tell; `known` ones need not be told."""
    need(loader, origin, state, "patch_embed.proj.weight", 4, NAME)
    if "backbone" in known:
        backbone, in_chans = known["backbone"], known.get("in_chans", 3)
    else:
        backbone, in_chans = _resnet(loader, origin, state, known)
    size = pair(known.get("img_size", USUAL_SIZE))
    _, map_size = measured(backbone, known.get("in_chans", in_chans), size)
    ratio = tuple(s // m for s, m in zip(size, map_size, strict=True))
    # To an encoder the map is the image.
    in_maps = {**known, "img_size": map_size} if "img_size" in known else known
    settings = vit_shapes.settings_from_shapes(loader, origin, state, in_maps)
    if "img_size" in settings:
        settings["img_size"] = tuple(
            s * r for s, r in zip(pair(settings["img_size"]), ratio, strict=True)
        )
    return {**settings, "backbone": backbone, "in_chans": in_chans}


def _resnet(loader: str, origin: str, state: State, known: dict) -> tuple[nn.Module, int]:
    """(ResNet or stem without weights, for the channels asked for; channels of the file's)."""
    key = next((key for key in STEMS if key in state), None)
    if key is None or state[key].ndim != 4 or state[key].shape[-1] != 7:
        raise ValueError(
            f"{loader}: {origin}: its backbone is no ResNet of {NAME}: name it, backbone=module"
        )
    stem_chs, in_chans = state[key].shape[:2]
    wanted = known.get("in_chans", in_chans)
    try:
        if key == STEMS[1]:
            return ResNetStem(wanted, stem_chs, device="meta"), in_chans
        depths: dict[int, int] = {}
        for name in state:
            if match := re.match(rf"{re.escape(BACKBONE)}stages\.(\d+)\.blocks\.(\d+)\.", name):
                stage, block = int(match[1]), int(match[2])
                depths[stage] = max(depths.get(stage, 0), block + 1)
        layers = tuple(depths.get(stage, 0) for stage in range(max(depths, default=-1) + 1))
        widths = tuple(
            need(loader, origin, state, f"{BACKBONE}stages.{i}.blocks.0.conv3.weight", 4, NAME)
            .shape[0]
            for i in range(len(layers))
        )  # fmt: skip
        return ResNetV2(layers, widths, wanted, stem_chs, device="meta"), in_chans
    except ValueError as error:
        start = f"{loader}: {origin}"
        told = str(error)
        raise ValueError(told if told.startswith(start) else f"{start}: {told}") from error


def fit_sizes(
    loader: str, origin: str, model: nn.Module, state: State, overrides: dict, resampling: dict
) -> State:
    """The image size, patch size and channels that the caller named, resampled as timm does it."""
    state, overrides = dict(state), dict(overrides)
    if overrides.pop("in_chans", None) is not None and "backbone" not in overrides:
        key = next(key for key in STEMS if key in state)
        state[key] = channels(state[key], model.in_chans)
    return vit_shapes.fit_sizes(loader, origin, model, state, overrides, resampling)


HYBRID = Family(NAME, "head.", settings_from_shapes, fit_sizes)
