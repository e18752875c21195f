"""The gated perceptron: SwiGLU with both products in one matrix (DINOv2 giant)."""

from __future__ import annotations

from torch import Tensor, nn

from .linear import Linear


class GluMlp(nn.Module):
    """fc1 -> (x1, x2) -> act(x1) * x2, or x1 * act(x2) with gate_last -> drop1 -> norm -> fc2 ->
    drop2.

    Shazeer 2020; timm's arguments and state_dict keys. hidden_features counts x1 and x2.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer=nn.Sigmoid,
        norm_layer=None,
        bias: bool = True,
        drop: float = 0.0,
        gate_last: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        if hidden_features % 2 != 0:
            raise ValueError(f"GluMlp: hidden_features must be even, got {hidden_features}")
        half = hidden_features // 2
        self.gate_last = gate_last
        self.fc1 = Linear(in_features, hidden_features, bias=bias, **where)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(half, **where) if norm_layer else nn.Identity()
        self.fc2 = Linear(half, out_features or in_features, bias=bias, **where)
        self.drop2 = nn.Dropout(drop)

    def init_weights(self) -> None:
        """The gate begins near 1."""
        half = self.fc1.out_features // 2
        if self.fc1.bias is not None:
            nn.init.ones_(self.fc1.bias[half:])
        nn.init.normal_(self.fc1.weight[half:], std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.fc1(x).chunk(2, dim=-1)
        x = x1 * self.act(x2) if self.gate_last else self.act(x1) * x2
        return self.drop2(self.fc2(self.norm(self.drop1(x))))
