"""Patch merging: 2 x 2 patches become one between two stages of Swin; timm's state_dict keys."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import patch_merge_layer_norm
from ..ops.patch_merge.reference import merge
from .layer_norm import LayerNorm
from .linear import Linear
from .pending import fusable


class PatchMerging(nn.Module):
    """x (B, H, W, dim) -> reduction(norm(merge(x))) (B, ceil(H / 2), ceil(W / 2), out_dim).

    Zeros stand for pixels beyond an odd edge. Liu et al. 2021, section 3.1.
    """

    def __init__(
        self, dim: int, out_dim: int | None = None, norm_layer=LayerNorm, device=None, dtype=None
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.dim, self.out_dim = dim, out_dim or 2 * dim
        self.norm = norm_layer(4 * dim, **where)
        self.reduction = Linear(4 * dim, self.out_dim, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        if not fusable(self.norm):
            return self.reduction(self.norm(merge(x)))
        y = patch_merge_layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)
        return self.reduction(y)


class PatchMergingV2(nn.Module):
    """x (B, H, W, dim) -> norm(reduction(merge(x))). Liu et al. 2022, section 3.2."""

    def __init__(
        self, dim: int, out_dim: int | None = None, norm_layer=LayerNorm, device=None, dtype=None
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.dim, self.out_dim = dim, out_dim or 2 * dim
        self.reduction = Linear(4 * dim, self.out_dim, bias=False, **where)
        self.norm = norm_layer(self.out_dim, **where)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(merge(x)))
