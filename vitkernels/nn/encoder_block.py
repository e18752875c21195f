"""The encoder block of the original Transformer (Vaswani et al. 2017)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import describe, dropout_p, fail, positive_int
from .._dispatch import autocast_dtype
from .layer_norm import LayerNorm
from .linear import Linear
from .masks import attention_masks
from .mlp import GELUTanh, QuickGELU, activated
from .pending import Pending, add, add_norm, dropped
from .self_attention import SelfAttention


class EncoderBlock(nn.Module):
    """x = norm1(x + dropout1(attention(x))); x = norm2(x + dropout2(feed_forward(x))).

    norm_first: x += dropout1(attention(norm1(x))); x += dropout2(feed_forward(norm2(x))).
    Arguments, attributes, initial weights and state_dict of torch.nn.TransformerEncoderLayer, with
    two differences: inputs are (B, N, d_model), so batch_first is True, and a token that no key is
    left for attends to nothing (0), where torch gives NaN. activation: relu or gelu, by name,
    function or module.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation=F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_arguments(d_model, nhead, dim_feedforward, dropout, batch_first)
        where = {"device": device, "dtype": dtype}
        self.self_attn = SelfAttention(d_model, nhead, dropout, bias, **where)
        self.linear1 = Linear(d_model, dim_feedforward, bias=bias, **where)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias=bias, **where)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = activation_module(activation)

    @classmethod
    def from_torch(cls, layer: nn.TransformerEncoderLayer) -> EncoderBlock:
        """With the settings, and copies of the parameters, of torch's layer (batch_first=True)."""
        from .from_torch import block_from_torch

        return block_from_torch(cls, layer)

    def forward(
        self,
        src: Tensor | Pending,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        valid_lens: Tensor | None = None,
    ) -> Tensor | Pending:
        """src (B, N, d_model); masks as torch's, bool (True = ignored) or float (added).

        is_causal: without src_mask no token sees later ones; with it the mask is taken as it is.
        valid_lens: int (B,), how many first tokens of each sequence count as keys, or (B, N), for
        each query. A norm_first block given a Pending returns one, its last add still to be done.
        """
        x = src.stream if isinstance(src, Pending) else src
        _check_source(x, self.self_attn.embed_dim)
        masks = attention_masks(
            "EncoderBlock", x, self.self_attn.num_heads,
            src_mask, src_key_padding_mask, is_causal, valid_lens,
        )  # fmt: skip
        if self.norm_first:
            y, stream = add_norm(src if isinstance(src, Pending) else Pending(src), self.norm1)
            y, stream = add_norm(
                dropped(stream, self.self_attn(y, *masks), self.dropout1), self.norm2
            )
            pending = dropped(stream, self._feed_forward(y), self.dropout2)
            return pending if isinstance(src, Pending) else add(pending)
        # The normalised sum is the next residual stream.
        dtype = norm_dtype(x)
        x, _ = add_norm(dropped(x, self.self_attn(x, *masks), self.dropout1), self.norm1, dtype)
        return add_norm(dropped(x, self._feed_forward(x), self.dropout2), self.norm2, dtype)[0]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(activated(self.linear1, self.activation, x)))


def norm_dtype(x: Tensor) -> torch.dtype:
    """Of the output of torch's LayerNorm: fp32 under autocast, where float64 stays."""
    if autocast_dtype(x.device) is None:
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def activation_module(activation) -> nn.Module:
    """ReLU or a GELU as a module, from its name, function or module."""
    if activation in ("relu", F.relu, torch.relu):
        return nn.ReLU()
    if activation in ("gelu", F.gelu):
        return nn.GELU()
    if type(activation) is nn.ReLU:
        return nn.ReLU()
    if type(activation) in (nn.GELU, GELUTanh, QuickGELU):
        return copy.deepcopy(activation)
    expected = "relu or gelu, by name, function or module"
    return fail("EncoderBlock", "activation", expected, describe(activation))


def _check_arguments(d_model, nhead, dim_feedforward, dropout, batch_first) -> None:
    for name, value in (
        ("d_model", d_model),
        ("nhead", nhead),
        ("dim_feedforward", dim_feedforward),
    ):
        positive_int("EncoderBlock", name, value)
    if d_model % nhead:
        fail("EncoderBlock", "d_model", "a multiple of nhead", f"{d_model} and {nhead}")
    dropout_p("EncoderBlock", dropout, "dropout")
    if batch_first is not True:
        fail("EncoderBlock", "batch_first", "True: inputs are (B, N, d_model)", batch_first)


def _check_source(x: Tensor, d_model: int) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested:
        got = "a nested tensor" if isinstance(x, Tensor) and x.is_nested else describe(x)
        fail("EncoderBlock", "src", f"a dense float tensor (B, N, {d_model})", got, TypeError)
    if x.ndim != 3 or x.shape[2] != d_model:
        fail("EncoderBlock", "src", f"of shape (B, N, {d_model})", describe(x))
