"""DropPath (stochastic depth, Huang et al. 2016): drops a residual branch for whole samples."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Makes each sample's factor, 0 or 1 / keep_prob, by the torch calls of timm in timm's order.

    A Block hands `row_scale` to the fused residual add; calling the module multiplies. So the same
    seed drops the same branches as in timm.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def row_scale(self, x: Tensor) -> Tensor | None:
        """(B,) factors of the samples of x, (B, ...), or None when nothing can be dropped."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep_prob = 1 - self.drop_prob
        factor = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and self.scale_by_keep:
            factor.div_(keep_prob)
        return factor.flatten()

    def forward(self, x: Tensor) -> Tensor:
        factor = self.row_scale(x)
        return x if factor is None else x * factor.view((-1,) + (1,) * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"
