"""The masks of torch.nn's Transformer modules as those of the attention operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import describe, fail


def attention_masks(
    owner: str,
    x: Tensor,
    num_heads: int,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    valid_lens: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(bias, key_padding_mask) of ops.attention for x (B, N, C).

    mask: (N, N) or (B * heads, N, N), key_padding_mask: (B, N); bool (True = ignored) or float
    (added to the scores). is_causal: no token sees later ones; beside a mask it only says what the
    mask is. valid_lens: how many keys count, (B,) or for each query (B, N).
    """
    B, N, _ = x.shape
    bias = None
    if mask is not None:
        _check(owner, "src_mask", mask, x, ((N, N), (B * num_heads, N, N)))
        bias = ~mask if mask.dtype == torch.bool else mask
        bias = bias if mask.ndim == 2 else bias.unflatten(0, (B, num_heads))
    elif is_causal:
        bias = torch.ones(N, N, dtype=torch.bool, device=x.device).tril()
    if key_padding_mask is not None and valid_lens is not None:
        fail(owner, "valid_lens", "None beside src_key_padding_mask", describe(valid_lens))
    if key_padding_mask is not None:
        _check(owner, "src_key_padding_mask", key_padding_mask, x, ((B, N),))
        if key_padding_mask.dtype != torch.bool:
            return _joined(bias, key_padding_mask[:, None, None, :]), None
    if valid_lens is not None:
        _check_lengths(owner, valid_lens, x)
        counts = torch.arange(N, device=x.device) < valid_lens[..., None]
        if valid_lens.ndim == 2:
            return _joined(bias, counts[:, None]), None
        key_padding_mask = ~counts
    return bias, key_padding_mask


def _joined(bias: Tensor | None, other: Tensor) -> Tensor:
    """Both masks in one: bool ones (True = attend) meet, float ones add up."""
    if bias is None:
        return other
    if bias.dtype == torch.bool and other.dtype == torch.bool:
        return bias & other
    if other.dtype == torch.bool:
        bias, other = other, bias
    if bias.dtype == torch.bool:
        return torch.where(bias, other, float("-inf"))
    return bias + other


def _check(owner: str, name: str, mask: Tensor, x: Tensor, shapes) -> None:
    ok = isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())
    if not ok:
        fail(owner, name, "a bool or float tensor", describe(mask), TypeError)
    if mask.shape not in shapes or mask.device != x.device:
        expected = " or ".join(map(str, shapes))
        fail(owner, name, f"of shape {expected} on {x.device}", describe(mask))


def _check_lengths(owner: str, valid_lens: Tensor, x: Tensor) -> None:
    ok = isinstance(valid_lens, Tensor) and valid_lens.dtype in (torch.int32, torch.int64)
    if not ok:
        fail(owner, "valid_lens", "an int32 or int64 tensor", describe(valid_lens), TypeError)
    shapes = (tuple(x.shape[:1]), tuple(x.shape[:2]))
    if valid_lens.shape not in shapes or valid_lens.device != x.device:
        expected = " or ".join(map(str, shapes))
        fail(owner, "valid_lens", f"of shape {expected} on {x.device}", describe(valid_lens))
