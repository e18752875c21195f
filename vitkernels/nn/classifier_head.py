"""Pooling, dropout and the classifier of a model of maps; timm's state_dict keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear import Linear

POOLS = ("", "avg", "avgmax", "catavgmax", "max")


class Pool(nn.Module):
    """(B, H, W, C) -> (B, C); catavgmax: (B, 2 * C); "": the map itself."""

    def __init__(self, pool_type: str = "avg"):
        super().__init__()
        self.pool_type = pool_type

    def forward(self, x: Tensor) -> Tensor:
        over = (1, 2)
        if self.pool_type == "":
            return x
        if self.pool_type == "avg":
            return x.mean(over)
        if self.pool_type == "max":
            return x.amax(over)
        if self.pool_type == "avgmax":
            return 0.5 * (x.mean(over) + x.amax(over))
        return torch.cat((x.mean(over), x.amax(over)), dim=-1)

    def feat_mult(self) -> int:
        return 2 if self.pool_type == "catavgmax" else 1

    def extra_repr(self) -> str:
        return f"pool_type={self.pool_type!r}"


class ClassifierHead(nn.Module):
    """global_pool -> drop -> fc; num_classes=0: no fc."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features = in_features
        self.global_pool = Pool(pool_type)
        self.drop = nn.Dropout(drop_rate)
        self._set_fc(num_classes, {"device": device, "dtype": dtype})

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        in_features: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        """A new fc, and another pooling or width when it is named."""
        if in_features is not None:
            self.in_features = in_features
        if pool_type is not None:
            self.global_pool = Pool(pool_type).train(self.training)
        self._set_fc(num_classes, {"device": device, "dtype": dtype})
        self.fc.train(self.training)

    def _set_fc(self, num_classes: int, where: dict) -> None:
        self.num_features = self.in_features * self.global_pool.feat_mult()
        if num_classes > 0:
            self.fc = Linear(self.num_features, num_classes, **where)
        else:
            self.fc = nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)
