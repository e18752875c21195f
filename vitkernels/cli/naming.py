"""From a timm name to a FusedViT, with fresh weights or with those of a file."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import torch
from torch import nn

from ..models import FusedViT
from ..models.vit import SIZES
from .timm_peer import import_timm
from .usage import UsageError, check_input_file, one_line

COMMON = [
    f"vit_{size}_patch{patch}_{pixels}"
    for size in SIZES
    for patch, pixels in ((16, 224), (32, 224), (14, 224), (8, 224), (16, 384), (32, 384))
]


def is_plain(name: str) -> bool:
    """Whether FusedViT knows the sizes of this name without timm."""
    match = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_(\d+)", name)
    return match is not None and match[1] in SIZES and 0 < int(match[2]) <= int(match[3])


def check_name(name: str) -> None:
    """Refuse what is neither of our own names nor one of timm's, with the nearest ones."""
    if is_plain(name):
        return
    timm = import_timm()
    if timm is not None and timm.is_model(name):
        return
    known = COMMON if timm is None else [*COMMON, *timm.list_models()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.55)
    hint = f"did you mean {' or '.join(near)}?" if near else f"one of them is {COMMON[0]}"
    more = "" if timm else " (timm, which knows more names, is not installed: pip install timm)"
    raise UsageError(f"--model: unknown model {name!r}: {hint}{more}")


def make_model(name: str, **settings) -> FusedViT:
    """With random weights; settings are those that timm.create_model takes too."""
    check_name(name)
    try:
        if is_plain(name):
            return FusedViT.named(name, **settings).eval()
    except ValueError as error:
        raise UsageError(f"--model {name}: {one_line(error)}") from error
    return from_timm_model(name, make_timm_model(name, **settings))


def from_timm_model(name: str, model: nn.Module) -> FusedViT:
    """Ours of timm's; one line names what FusedViT does not have."""
    try:
        return FusedViT.from_timm(model).eval()
    except ValueError as error:
        raise UsageError(f"--model {name}: {one_line(error)}") from error


def make_timm_model(name: str, **settings) -> nn.Module:
    """timm's own model of a name that check_name let pass."""
    try:
        return import_timm().create_model(name, pretrained=False, **settings).eval()
    except Exception as error:  # timm asserts, and raises what its layers raise
        raise UsageError(f"--model {name}: timm refuses it: {one_line(error)}") from error


def load_model(name: str, path: Path, **settings) -> FusedViT:
    """A FusedViT of this name with the weights of a file; the weights say how many classes."""
    check_input_file(path, "--weights")
    check_name(name)
    state = read_state(path)
    if isinstance(state.get("head.bias"), torch.Tensor):
        settings["num_classes"] = len(state["head.bias"])
    model = make_model(name, **settings)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UsageError(f"--weights: {path} does not fit --model {name}: {one_line(error)[:300]}")
    return model


def read_state(path: Path) -> dict:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"--weights: {path} cannot be read as a checkpoint: {one_line(error)}")
