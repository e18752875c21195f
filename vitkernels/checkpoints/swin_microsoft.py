"""Microsoft's Swin and Swin V2 -> FusedSwin: patch merging ends a stage there, begins one in timm.

`layers.{s}.downsample` -> `layers.{s+1}.downsample`, `head.*` -> `head.fc.*`. The buffers tell what
the parameters of version 2 do not: windows, also those of pre-training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .build import State, build, one_sentence
from .files import unwrap
from .swin_shapes import NAME, SWIN, hints_from_buffers, without_buffers

# "min": window and shift of both axes by the shorter side, as in Microsoft's constructor.
RULES = {"window_clamp": "min"}
_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.")


def swin_from_microsoft(cls, state_dict: Mapping, **kwargs):
    """A FusedSwin with copies of Microsoft's parameters, also from {"model": state_dict}."""
    loader = "from_microsoft"
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"{loader}: state_dict must be a dict of tensors, got {type(state_dict).__name__}"
            " (files: from_pretrained)"
        )
    tensors = unwrap(dict(state_dict))
    if not is_microsoft(tensors):
        raise ValueError(
            f"{loader}: the state dict must have Microsoft's names (layers.0.downsample.*, head.*),"
            f" got {', '.join(list(tensors)[:3])}"
        )
    return from_state(cls, loader, "the state dict", tensors, kwargs)


def from_state(cls, loader: str, origin: str, tensors: dict[str, Tensor], overrides: dict):
    with one_sentence(loader, origin, NAME):
        hints = {**RULES, **hints_from_buffers(tensors)}
        state = timm_state(tensors)
    return build(SWIN, cls, loader, origin, state, hints, overrides)


def is_microsoft(tensors: State) -> bool:
    """Whether timm's names, but for the end of a stage and the head, are Microsoft's."""
    old = "layers.0.downsample.reduction.weight" in tensors or "head.weight" in tensors
    return "patch_embed.proj.weight" in tensors and old


def timm_state(tensors: dict[str, Tensor]) -> State:
    return {_rename(key): tensor for key, tensor in without_buffers(tensors).items()}


def _rename(key: str) -> str:
    if key.startswith("head."):
        return "head.fc." + key.removeprefix("head.")
    return _DOWNSAMPLE.sub(lambda match: f"layers.{int(match[1]) + 1}.downsample.", key)
