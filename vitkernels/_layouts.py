"""Tensors in every layout; `vitkernels.testing` has the names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUTS = (
    "contiguous",
    "transposed",
    "outer_transposed",
    "sliced",
    "rows_sliced",
    "expanded",
    "offset",
    "misaligned_1",
    "misaligned_3",
    "packed",
    "nan_border",
)


def in_layout(values: Tensor, layout: str) -> Tensor:
    """A tensor equal to `values` that lies in memory as `layout` says; unused memory holds NaN.

    contiguous; transposed (the last two dimensions are swapped in memory); outer_transposed (the
    first two); sliced ([..., ::2]); rows_sliced ([..., ::2, :]); expanded (stride 0 along the first
    dimension: the one layout that changes values, every entry becomes the first); offset (behind 64
    elements); misaligned_k (behind k elements); packed (the middle third of a last dimension three
    times as long, as q, k, v of a fused projection); nan_border (NaN on all sides).
    """
    values, shape, rank = values.detach(), values.shape, values.dim()
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "expanded":
        return values[:1].clone().expand(shape)
    if layout in ("transposed", "outer_transposed"):
        if rank < 2:
            return values.clone()
        dims = (-1, -2) if layout == "transposed" else (0, 1)
        return values.transpose(*dims).clone(memory_format=torch.contiguous_format).transpose(*dims)
    if layout == "offset" or layout.startswith("misaligned_"):
        skip = 64 if layout == "offset" else int(layout.rpartition("_")[2])
        buffer = _poisoned(values, (skip + values.numel() + skip,))
        return _filled(buffer[skip : skip + values.numel()].view(shape), values)
    if layout == "sliced":
        return _filled(_poisoned(values, (*shape[:-1], 2 * shape[-1]))[..., ::2], values)
    if layout == "rows_sliced":
        if rank < 2:
            return in_layout(values, "sliced")
        return _filled(
            _poisoned(values, (*shape[:-2], 2 * shape[-2], shape[-1]))[..., ::2, :],
            values,
        )
    if layout == "packed":
        buffer = _poisoned(values, (*shape[:-1], 3 * shape[-1]))
        return _filled(buffer[..., shape[-1] : 2 * shape[-1]], values)
    if layout == "nan_border":
        view = _poisoned(values, tuple(size + 2 for size in shape))
        for dim, size in enumerate(shape):
            view = view.narrow(dim, 1, size)
        return _filled(view, values)
    raise ValueError(f"in_layout: layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


def _filled(view: Tensor, values: Tensor) -> Tensor:
    return view.copy_(values)


def _poisoned(like: Tensor, shape: Sequence[int]) -> Tensor:
    fill = math.nan if like.is_floating_point() else (like.dtype == torch.bool) or 77
    return torch.full(tuple(shape), fill, dtype=like.dtype, device=like.device)
