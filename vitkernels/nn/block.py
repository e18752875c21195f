"""The pre-norm Transformer block, and the residual add that it may leave to the next block.

A block ends with stream + row_scale * gamma * branch (residual, DropPath, LayerScale), and the next
one begins with LayerNorm of that sum: one fused operator does both. So a block given a Pending
returns a Pending, the add still to be done. Given a Tensor it returns a Tensor, as timm's does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import Attention
from .drop_path import DropPath
from .layer_norm import LayerNorm
from .layer_scale import LayerScale
from .mlp import Mlp


class Pending(NamedTuple):
    """stream + row_scale[b] * gamma * branch, not yet added. branch None: just the stream."""

    stream: Tensor
    branch: Tensor | None = None
    gamma: Tensor | None = None
    row_scale: Tensor | None = None


class Block(nn.Module):
    """x += drop_path1(ls1(attn(norm1(x)))); x += drop_path2(ls2(mlp(norm2(x)))).

    Dosovitskiy et al. 2021, with LayerScale and DropPath; timm's arguments and state_dict keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer=nn.GELU,
        norm_layer=LayerNorm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **where)
        self.attn = Attention(
            dim, num_heads, qkv_bias, qk_norm, scale_attn_norm, proj_bias, attn_drop, proj_drop,
            norm_layer, **where,
        )  # fmt: skip
        self.ls1 = LayerScale(dim, init_values, **where)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim, **where)
        self.mlp = Mlp(
            dim,
            int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            **where,
        )
        self.ls2 = LayerScale(dim, init_values, **where)
        self.drop_path2 = DropPath(drop_path)

    def forward(
        self, x: Tensor | Pending, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | Pending:
        y, stream = add_norm(x if isinstance(x, Pending) else Pending(x), self.norm1)
        branch = self.attn(y, attn_mask=attn_mask, is_causal=is_causal)
        if fusable(self.norm2, self.ls1, self.drop_path1):
            row_scale = self.drop_path1.row_scale(branch)
            y, stream = add_norm(Pending(stream, branch, self.ls1.gamma, row_scale), self.norm2)
        else:
            stream = stream + self.drop_path1(self.ls1(branch))
            y = self.norm2(stream)
        branch = self.mlp(y)
        if isinstance(x, Pending) and fusable(self.ls2, self.drop_path2):
            # Only tensors made here leave the block: FSDP frees a Parameter after its unit.
            gamma = None if self.ls2.gamma is None else self.ls2.gamma.clone()
            return Pending(stream, branch, gamma, self.drop_path2.row_scale(branch))
        stream = stream + self.drop_path2(self.ls2(branch))
        return Pending(stream) if isinstance(x, Pending) else stream


def add_norm(
    pending: Pending, norm: nn.Module, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum) of a Pending, in one pass where the norm can take the add."""
    stream, branch, gamma, row_scale = pending
    if branch is not None and fusable(norm):
        return norm(branch, stream, gamma, row_scale, out_dtype)
    stream = add(pending)
    return norm(stream), stream


def add(pending: Pending) -> Tensor:
    """The sum itself, in timm's order: LayerScale, DropPath, residual."""
    stream, branch, gamma, row_scale = pending
    if branch is None:
        return stream
    branch = branch if gamma is None else branch * gamma
    if row_scale is not None:
        branch = branch * row_scale.view((-1,) + (1,) * (branch.ndim - 1))
    return stream + branch


def fusable(*modules: nn.Module) -> bool:
    """Whether these may run as one operator: they are ours, and nobody hooks into what passes."""
    return not _global_hooks() and all(
        isinstance(module, (LayerNorm, LayerScale, DropPath)) and not _hooked(module)
        for module in modules
    )


def chainable(blocks: nn.Module) -> bool:
    """Whether a Pending may travel through this Sequential of blocks: a hook sees only Tensors."""
    return (
        isinstance(blocks, nn.Sequential)
        and not _global_hooks()
        and not _hooked(blocks)
        and all(isinstance(block, Block) and not _hooked(block) for block in blocks)
    )


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _global_hooks() -> bool:
    return torch.nn.modules.module._has_any_global_hook()
