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
    """fc1 -> act -> drop1 -> norm -> fc2 -> drop2; norm is the identity without norm_layer.

    fc1 and act are one operator where nobody looks between them.
    """

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
        approximate = self._gelu_after_fc1(x)
        if approximate is None:
            x = self.act(self.fc1(x))
        else:
            x = linear_gelu(x, self.fc1.weight, self.fc1.bias, approximate=approximate)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))

    def _gelu_after_fc1(self, x: Tensor) -> str | None:
        """Which GELU fc1 may take into its product, None where both modules must be called."""
        one_call = (
            untouched(self.fc1, Linear)
            and untouched(self.act, nn.GELU, GELUTanh, QuickGELU)
            and not global_hooks()
            and plain(x, self.fc1.weight)
        )
        return _approximate(self.act) if one_call else None


def _approximate(act: nn.Module) -> str:
    if type(act) is nn.GELU:
        return act.approximate
    return "tanh" if type(act) is GELUTanh else "quick"
