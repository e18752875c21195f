"""Truncated normal with the draws of timm."""

from __future__ import annotations

import math

import torch


@torch.no_grad()
def trunc_normal_(tensor: torch.Tensor, std: float, low: float = -2.0, high: float = 2.0):
    """Normal(0, std) truncated to [low, high] by the inverse CDF.

    timm's draws: torch.nn.init.trunc_normal_ takes others since torch 2.13.
    """
    below, above = ((1.0 + math.erf(bound / std / math.sqrt(2.0))) / 2.0 for bound in (low, high))
    tensor.uniform_(2 * below - 1, 2 * above - 1).erfinv_()
    return tensor.mul_(std * math.sqrt(2.0)).clamp_(min=low, max=high)
