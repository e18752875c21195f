"""GroupNorm and the ReLU behind it; timm's arguments, attributes and state_dict keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GroupNormAct(nn.GroupNorm):
    """(B, C, H, W): GroupNorm (Wu and He 2018), then ReLU in place unless apply_act is False."""

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        apply_act: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(num_groups, num_channels, eps=eps, device=device, dtype=dtype)
        self.act = nn.ReLU(inplace=True) if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))
