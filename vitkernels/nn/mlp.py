"""The two-layer perceptron of a Transformer block, and its activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear_gelu
from .linear import Linear
from .watched import global_hooks, plain, untouched


class GELUTanh(nn.Module):
    """GELU by the tanh approximation (SigLIP, JAX models)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x) (OpenAI CLIP)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """fc1 -> act -> drop1 -> norm -> fc2 -> drop2; norm is the identity without norm_layer."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer=nn.GELU,
        norm_layer=None,
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        self.fc1 = Linear(in_features, hidden_features, bias=bias, **where)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(hidden_features, **where) if norm_layer else nn.Identity()
        self.fc2 = Linear(hidden_features, out_features or in_features, bias=bias, **where)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = activated(self.fc1, self.act, x)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


def activated(linear: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """act(linear(x)): one operator for a GELU, unless somebody watches one of the modules."""
    one_call = (
        untouched(linear, Linear)
        and untouched(act, nn.GELU, GELUTanh, QuickGELU)
        and not global_hooks()
        and plain(x, linear.weight)
    )
    if not one_call:
        return act(linear(x))
    return linear_gelu(x, linear.weight, linear.bias, approximate=_approximate(act))


def _approximate(act: nn.Module) -> str:
    if type(act) is nn.GELU:
        return act.approximate
    return "tanh" if type(act) is GELUTanh else "quick"
