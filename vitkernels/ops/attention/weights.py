"""attention_weights: the softmax rows that kernels never store, for pictures of attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _checks
from . import reference
from .op import bias_4d, check_attention

Tensor = torch.Tensor


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    rows: int | slice | Sequence[int] | None = None,
) -> Tensor:
    """The softmax rows asked for, for pictures of attention: the kernels never store them.

    ``softmax(scale * q[rows] k^T + bias)``, computed in fp32 by plain PyTorch.

    Args:
        q: (B, Nq, H, D), fp32, bf16, fp16 or float64.
        k: (B, Nk, H, D), dtype of q.
        bias: broadcasts to (B, H, Nq, Nk), float or bool (True = attend).
        scale: default D ** -0.5.
        rows: query indices: an int (0 is the class token), a slice, a sequence of ints, or None for
        all.

    Returns:
        (B, H, rows, Nk) in fp32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: naming the operator, the argument, what was expected and what came.
    """
    op = "attention_weights"
    scale = check_attention(q, k, k, bias, None, scale, 0.0, op=op)
    bias = bias_4d(op, bias, q, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    index = _row_index(op, rows, q.shape[1]).to(q.device)
    with torch.autocast(q.device.type, enabled=False):
        return reference.attention_weights(q, k, bias, scale, index)


def _row_index(op, rows, Nq):
    if rows is None:
        return torch.arange(Nq)
    if isinstance(rows, slice):
        return torch.arange(Nq)[rows]
    listed = [rows] if isinstance(rows, int) and not isinstance(rows, bool) else rows
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        _checks.fail(
            op,
            "rows",
            "an int, a slice, a sequence of ints or None",
            _checks.describe(rows),
            TypeError,
        )
    for row in listed:
        if isinstance(row, bool) or not isinstance(row, int) or not -Nq <= row < Nq:
            _checks.fail(op, "rows", f"made of query indices in [-{Nq}, {Nq})", row)
    return torch.tensor([row % Nq for row in listed], dtype=torch.int64)
