"""OpenMMLab's Swin and Swin V2 (mmpretrain, mmdet, mmseg) -> FusedSwin.

Its patch merging is torch.nn.Unfold, whose channels are (C, 2, 2); Microsoft's and timm's are
(4, C) with the pixels in the order (0,0), (1,0), (0,1), (1,1). Weights are permuted accordingly.
"""

from __future__ import annotations

import re

from torch import Tensor

from .build import State, build, one_sentence, warn_of_ignored
from .swin_shapes import NAME, SWIN, hints_from_buffers, without_buffers

_BLOCK = re.compile(r"^stages\.(\d+)\.(blocks\.\d+)\.(.+)$")
_DOWNSAMPLE = re.compile(r"^stages\.(\d+)\.downsample\.(norm|reduction)\.(weight|bias)$")
_NORM = re.compile(r"^norm(\d*)\.(weight|bias)$")
_INSIDE = {"attn.w_msa.": "attn.", "ffn.layers.0.0.": "mlp.fc1.", "ffn.layers.1.": "mlp.fc2."}


def from_state(cls, loader: str, origin: str, tensors: dict[str, Tensor], overrides: dict):
    """Classifiers do not shift a map of one window; detectors (norm0 ... norm3) do."""
    with one_sentence(loader, origin, NAME):
        tensors, others = backbone(tensors)
        buffers = {f"layers.{k[7:]}".replace(".w_msa.", "."): t for k, t in tensors.items()
                   if k.startswith("stages.")}  # fmt: skip
        state, norms = timm_state(tensors)
        hints = {**hints_from_buffers(buffers), "strict_img_size": False}
    hints |= {"always_partition": True} if norms else {"window_clamp": "min"}
    model = build(SWIN, cls, loader, origin, state, hints, overrides)
    model.patch_embed.dynamic_img_pad = True
    warn_of_ignored(loader, norms, "norm after the earlier stages", NAME)
    warn_of_ignored(loader, others, "such part", NAME)
    return model


def is_openmmlab(tensors: State) -> bool:
    return any(
        re.match(r"^(backbone\.)?stages\.\d+\.blocks\.\d+\.attn\.w_msa\.", k) for k in tensors
    )


def backbone(tensors: State) -> tuple[State, list[str]]:
    """The backbone and a linear head without their prefixes, and the names of other parts."""
    if not any(key.startswith("backbone.") for key in tensors):
        return tensors, []
    ours, others = {}, set()
    for key, tensor in tensors.items():
        if key.startswith(("backbone.", "head.fc.")):
            ours[key.removeprefix("backbone.")] = tensor
        else:
            others.add(key.split(".")[0])
    return ours, sorted(others)


def timm_state(tensors: State) -> tuple[State, list[str]]:
    """(timm's names and channel order, names of norms after stages before the last)."""
    tensors = without_buffers(tensors)
    last = max((int(m[1]) for key in tensors if (m := _BLOCK.match(key))), default=0)
    version2 = any(key.endswith(".logit_scale") for key in tensors)
    state, norms = {}, []
    for key, tensor in tensors.items():
        if match := _DOWNSAMPLE.match(key):
            stage = int(match[1]) + (not version2)  # version 2 merges at the beginning of a stage
            if match[2] == "reduction" or not version2:  # version 2 norms what is reduced
                tensor = unfold_to_timm(tensor)
            state[f"layers.{stage}.downsample.{match[2]}.{match[3]}"] = tensor
        elif match := _NORM.match(key):
            if match[1] in ("", str(last)):
                state[f"norm.{match[2]}"] = tensor
            else:
                norms.append(key)
        else:
            state[_rename(key)] = tensor
    return state, norms


def unfold_to_timm(tensor: Tensor) -> Tensor:
    """Channels (..., C*2*2) of torch.nn.Unfold -> (..., 4*C), two of the pixels swapped."""
    pixels = tensor.unflatten(-1, (-1, 4)).movedim(-1, -2)  # (..., 4, C)
    return pixels[..., [0, 2, 1, 3], :].flatten(-2)


def _rename(key: str) -> str:
    if key.startswith("patch_embed.projection."):
        return key.replace(".projection.", ".proj.")
    match = _BLOCK.match(key)
    if match is None:
        return key
    inside = match[3]
    for start, ours in _INSIDE.items():
        if inside.startswith(start):
            inside = ours + inside.removeprefix(start)
    return f"layers.{match[1]}.{match[2]}.{inside}"
