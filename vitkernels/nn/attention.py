"""Multi-head self-attention with a packed qkv projection; timm's arguments and state_dict keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import attention, attention_qkvpacked, attention_weights, linear
from .linear import Linear
from .watched import global_hooks, untouched


class Attention(nn.Module):
    """x (B, N, C) -> (B, N, C).

    The rows of qkv.weight are [all q | all k | all v], each head-major. attn_mask broadcasts to
    (B, heads, N, N): bool (True = attend) or float (added to the scores). rows: only the first
    rows of the output, (B, rows, C), without a mask; they attend to all tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(
                f"Attention: dim must be a multiple of num_heads, got {dim}, {num_heads}"
            )
        if norm_layer is None and (qk_norm or scale_norm):
            raise ValueError("Attention: qk_norm and scale_norm need norm_layer, got None")
        where = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **where)
        self.q_norm = norm_layer(self.head_dim, **where) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **where) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(dim, **where) if scale_norm else nn.Identity()
        self.proj = Linear(dim, dim, bias=proj_bias, **where)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rows: int | None = None,
    ) -> Tensor:
        if is_causal:
            attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        drop = self.attn_drop.p if self.training else 0.0
        options = {"bias": attn_mask, "scale": self.scale, "dropout_p": drop}
        if rows is None and _unseen_identities(self.q_norm, self.k_norm):
            x = attention_qkvpacked(self.qkv(x), self.num_heads, **options)
        else:
            q, k, v = self._unpack(self.qkv(x)) if rows is None else self._first_rows(x, rows)
            x = attention(self.q_norm(q), self.k_norm(k), v, **options).flatten(2)
        return self.proj_drop(self.proj(self.norm(x)))

    def weights(self, x: Tensor, rows=None) -> Tensor:
        """The softmax rows that forward(x) would use, (B, heads, rows, N): for pictures."""
        q, k, _ = self._unpack(self.qkv(x))
        return attention_weights(self.q_norm(q), self.k_norm(k), scale=self.scale, rows=rows)

    def _first_rows(self, x: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """q of the first rows, k and v of all."""
        C, bias = x.shape[-1], self.qkv.bias
        q_weight, kv_weight = self.qkv.weight.split((C, 2 * C))
        q_bias, kv_bias = (None, None) if bias is None else bias.split((C, 2 * C))
        q = linear(x[:, :rows], q_weight, q_bias).unflatten(2, (self.num_heads, self.head_dim))
        kv = linear(x, kv_weight, kv_bias).unflatten(2, (2, self.num_heads, self.head_dim))
        return q, *kv.unbind(2)

    def _unpack(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return qkv.unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)


def _unseen_identities(*norms: nn.Module) -> bool:
    """Whether q and k may stay packed: these do nothing, and nobody waits for their calls."""
    return not global_hooks() and all(untouched(norm, nn.Identity) for norm in norms)
