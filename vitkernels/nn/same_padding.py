"""SAME padding of TensorFlow and JAX: outputs of ceil(size / stride), what is odd at the end."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .patch_embed import pair


def pad_same(x: Tensor, kernel, stride, dilation=(1, 1), value: float = 0.0) -> Tensor:
    """(B, C, H, W) padded for windows of this kernel, stride and dilation."""
    margins = []
    for size, k, s, d in zip(x.shape[-2:], kernel, stride, dilation, strict=True):
        total = max(((size + s - 1) // s - 1) * s + (k - 1) * d + 1 - size, 0)
        margins = [total // 2, total - total // 2, *margins]  # the last dimension comes first
    return F.pad(x, margins, value=value) if any(margins) else x


class MaxPool2dSame(nn.MaxPool2d):
    """MaxPool2d with SAME padding."""

    def __init__(self, kernel_size, stride):
        super().__init__(pair(kernel_size), pair(stride))

    def forward(self, x: Tensor) -> Tensor:
        x = pad_same(x, self.kernel_size, self.stride, value=float("-inf"))
        return F.max_pool2d(x, self.kernel_size, self.stride)
