"""How a checkpoint wants its images: what lies beside it, what timm knows, what was asked for."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from torch import nn

from .arguments import CROP_MODES, INTERPOLATIONS
from .families import plain_family
from .images import Preprocessing
from .timm_peer import import_timm
from .usage import UsageError

PILLOW_RESAMPLING = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}


def preprocessing(
    options: argparse.Namespace, model: nn.Module, weights: Path | None
) -> Preprocessing:
    """From the arguments, else from beside the weights, else timm's, else the usual."""
    found = _from_model(model) | (_beside(weights) or _from_timm(options.model))
    asked = {
        name: getattr(options, name)
        for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation")
        if getattr(options, name) is not None
    }
    if asked:
        found |= asked | {"source": f"{found['source']}, and arguments"}
    result = Preprocessing(model.patch_embed.img_size, **found)
    return _checked(result, model.in_chans)


def _checked(result: Preprocessing, in_chans: int) -> Preprocessing:
    for name in ("mean", "std"):
        values = getattr(result, name)
        if len(values) not in (1, in_chans):
            raise UsageError(f"--{name}: the model takes {in_chans} channels, got {len(values)}")
    if not all(value > 0 for value in result.std):
        raise UsageError(f"--std: must be above 0, got {', '.join(map(str, result.std))}")
    spread = {name: _spread(getattr(result, name), in_chans) for name in ("mean", "std")}
    return dataclasses.replace(result, **spread)


def _spread(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    return tuple(values) * in_chans if len(values) == 1 else tuple(values)


def _from_model(model: nn.Module) -> dict:
    """What the loader put into the model; timm crops nothing from 384 pixels on."""
    embed = model.patch_embed
    return {
        "mean": tuple(embed.mean.tolist()),
        "std": tuple(embed.std.tolist()),
        "crop_pct": 1.0 if max(embed.img_size) >= 384 else 0.9,
        "source": "the usual values of such weights",
    }


# --- where it can be read -------------------------------------------------------------------------


def _beside(weights: Path | None) -> dict:
    """timm's config.json or transformers' preprocessor_config.json in the folder of the weights."""
    if weights is None:
        return {}
    folder = weights if weights.is_dir() else weights.parent
    for name, understand in (
        ("preprocessor_config.json", _from_transformers),
        ("config.json", _from_hub),
    ):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = understand(json.loads(path.read_text()))
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise UsageError(
                f"{path} beside the weights cannot be understood ({error!r}): mend or remove it"
            ) from error
        if found:
            return {**found, "source": f"{name} beside the weights"}
    return {}


def _from_timm(name: str | None) -> dict:
    """timm's record, for the models that timm itself had to build."""
    if name is None or plain_family(name) is not None:
        return {}
    timm = import_timm()
    facts = timm and timm.models.get_pretrained_cfg(name)
    return _from_timm_facts(facts.to_dict()) | {"source": "timm's record"} if facts else {}


def _from_hub(facts) -> dict:
    """timm's config.json of the hub; other programs' files of that name say nothing."""
    facts = facts.get("pretrained_cfg") if isinstance(facts, dict) else None
    return _from_timm_facts(facts) if isinstance(facts, dict) else {}


def _from_timm_facts(facts: dict) -> dict:
    found = {}
    for key in ("mean", "std"):
        if facts.get(key) is not None:
            found[key] = tuple(float(value) for value in facts[key])
    for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if facts.get(key) in known:
            found[key] = facts[key]
    if facts.get("crop_pct"):
        found["crop_pct"] = float(facts["crop_pct"])
    return found


def _from_transformers(facts: dict) -> dict:
    """A ViTImageProcessor squashes to its size; one with a crop keeps the shape of the image."""
    found: dict = {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
    if facts.get("do_normalize", True) and facts.get("image_mean"):
        found["mean"] = tuple(float(value) for value in facts["image_mean"])
        found["std"] = tuple(float(value) for value in facts["image_std"])
    if not facts.get("do_normalize", True):
        found |= {"mean": (0.0,), "std": (1.0,)}
    if facts.get("resample") in PILLOW_RESAMPLING:
        found["interpolation"] = PILLOW_RESAMPLING[facts["resample"]]
    size, crop = facts.get("size"), facts.get("crop_size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    if facts.get("do_center_crop") and shortest and crop:
        side = crop["height"] if isinstance(crop, dict) else crop
        found |= {"crop_mode": "center", "crop_pct": side / shortest}
    return found
