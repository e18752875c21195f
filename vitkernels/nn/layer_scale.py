"""LayerScale: a learned factor for each channel of a branch (Touvron et al. 2021, CaiT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Holds `gamma` (dim,), or None when init_values is None or 0: then it does nothing.

    A Block reads `gamma` and hands it to the fused residual add; calling the module multiplies.
    """

    def __init__(self, dim: int, init_values: float | None = 1e-5, device=None, dtype=None):
        super().__init__()
        self.init_values = init_values
        gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if init_values else None
        self.register_parameter("gamma", gamma)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.gamma is None else x * self.gamma

    def extra_repr(self) -> str:
        return f"init_values={self.init_values}"
