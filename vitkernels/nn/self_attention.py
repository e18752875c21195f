"""Multi-head self-attention with the parameter names of torch.nn.MultiheadAttention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import dropout_p, positive_int
from ..ops import attention_qkvpacked, linear
from .linear import Linear
from .watched import plain


class SelfAttention(nn.Module):
    """x (B, N, C) -> (B, N, C); bias and key_padding_mask as in ops.attention_qkvpacked.

    The rows of in_proj_weight are [all q | all k | all v], each head-major. Initial weights are
    those that torch.nn.MultiheadAttention draws.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        positive_int("SelfAttention", "embed_dim", embed_dim)
        positive_int("SelfAttention", "num_heads", num_heads)
        dropout_p("SelfAttention", dropout, "dropout")
        if embed_dim % num_heads:
            raise ValueError(
                "SelfAttention: embed_dim must be a multiple of num_heads, got "
                f"{embed_dim}, {num_heads}"
            )
        where = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.batch_first = True
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **where))
        self.register_parameter(
            "in_proj_bias", nn.Parameter(torch.empty(3 * embed_dim, **where)) if bias else None
        )
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        product = linear if plain(x, self.in_proj_weight) else F.linear
        out = attention_qkvpacked(
            product(x, self.in_proj_weight, self.in_proj_bias),
            self.num_heads,
            bias=bias,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(out)
