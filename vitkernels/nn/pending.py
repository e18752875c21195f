"""The residual add that a block may leave to the LayerNorm that comes next.

A block ends with stream + row_scale * gamma * branch (residual, DropPath, LayerScale) or with
stream + dropout(branch), and LayerNorm of that sum comes next: one fused operator does both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .drop_path import DropPath
from .layer_norm import LayerNorm
from .layer_scale import LayerScale
from .watched import global_hooks, hooked, untouched


class Pending(NamedTuple):
    """stream + row_scale[b] * gamma * dropout(branch), not yet added. branch None: the stream."""

    stream: Tensor
    branch: Tensor | None = None
    gamma: Tensor | None = None
    row_scale: Tensor | None = None
    dropout_p: float = 0.0  # of what is to be dropped now: 0 in evaluation


def add_norm(
    pending: Pending, norm: nn.Module, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum) of a Pending, in one pass where the norm can take the add."""
    stream, branch, gamma, row_scale, dropout_p = pending
    if branch is not None and fusable(norm):
        return norm(branch, stream, gamma, row_scale, out_dtype, dropout_p)
    stream = add(pending)
    return norm(stream), stream


def add(pending: Pending) -> Tensor:
    """The sum itself, in timm's order: dropout, LayerScale, DropPath, residual."""
    stream, branch, gamma, row_scale, dropout_p = pending
    if branch is None:
        return stream
    branch = F.dropout(branch, dropout_p) if dropout_p > 0.0 else branch
    branch = branch if gamma is None else branch * gamma
    if row_scale is not None:
        branch = branch * row_scale.view((-1,) + (1,) * (branch.ndim - 1))
    return stream + branch


def fusable(*modules: nn.Module) -> bool:
    """Whether these may run as one operator: they are ours, and nobody hooks into what passes."""
    return not global_hooks() and all(
        untouched(module, LayerNorm, LayerScale, DropPath) for module in modules
    )


def left(stream: Tensor, branch: Tensor, drop_path: nn.Module) -> Pending:
    """stream + drop_path(branch), the add left to what comes next where nobody looks between."""
    if fusable(drop_path):
        return Pending(stream, branch, None, drop_path.row_scale(branch))
    return Pending(stream + drop_path(branch))


def dropped(stream: Tensor, branch: Tensor, dropout: nn.Module) -> Pending:
    """stream + dropout(branch), both left to what comes next where nobody looks between."""
    if untouched(dropout, nn.Dropout) and not global_hooks() and dropout.p < 1.0:
        return Pending(stream, branch, dropout_p=dropout.p if dropout.training else 0.0)
    return Pending(stream, dropout(branch))


def chainable(blocks: nn.Module, block_class: type[nn.Module]) -> bool:
    """Whether a Pending may travel through this Sequential of blocks: a hook sees only Tensors."""
    return (
        isinstance(blocks, nn.Sequential)
        and not global_hooks()
        and not hooked(blocks)
        and all(type(block) is block_class and not hooked(block) for block in blocks)
    )
