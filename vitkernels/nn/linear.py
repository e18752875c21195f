"""Linear on the library's own product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear
from .watched import plain


class Linear(nn.Linear):
    """torch.nn.Linear with its arguments, names and numbers.

    A weight that brings its own product (DTensor under tensor parallelism, a quantized tensor)
    keeps it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if plain(x, self.weight):
            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)
