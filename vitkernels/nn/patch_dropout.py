"""PatchDropout: trains on a random part of the patches (Li et al. 2023, FLIP)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchDropout(nn.Module):
    """Keeps int(L * (1 - prob)) patches of each image in training, drawn as timm draws them.

    Prefix tokens always stay. `ordered` keeps the patches in reading order.
    """

    def __init__(self, prob: float = 0.5, num_prefix_tokens: int = 1, ordered: bool = False):
        super().__init__()
        if not 0 <= prob < 1:
            raise ValueError(f"PatchDropout: prob must be in [0, 1), got {prob}")
        self.prob, self.num_prefix_tokens, self.ordered = prob, num_prefix_tokens, ordered

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.prob == 0.0:
            return x
        prefix, x = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        B, L, C = x.shape
        order = torch.argsort(torch.randn(B, L, device=x.device), dim=-1)
        kept = order[:, : max(1, int(L * (1.0 - self.prob)))]
        kept = kept.sort(dim=-1)[0] if self.ordered else kept
        x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, C))
        return torch.cat((prefix, x), dim=1) if self.num_prefix_tokens else x

    def extra_repr(self) -> str:
        return f"prob={self.prob}"
