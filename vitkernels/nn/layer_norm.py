"""LayerNorm that can take the residual add in front of it into the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import add_layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension, timm's default eps, timm's state_dict keys.

    norm(x) returns a Tensor in x's dtype. norm(x, residual, gamma, row_scale) adds first and
    returns (LayerNorm(z), z) with z = residual + row_scale[b] * gamma * dropout(x); the normalised
    output is then in the autocast dtype, because a Linear comes next, unless out_dtype says
    otherwise.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6, affine: bool = True, **kwargs):
        super().__init__(num_channels, eps=eps, elementwise_affine=affine, **kwargs)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        row_scale: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            out_dtype = x.dtype if out_dtype is None else out_dtype
        y, z = add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            self.eps,
            gamma=gamma,
            row_scale=row_scale,
            dropout_p=dropout_p,
            out_dtype=out_dtype,
        )
        return y if residual is None else (y, z)
