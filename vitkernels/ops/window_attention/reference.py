"""The specification of window_attention: plain PyTorch, obvious, correct in float64.

Corner cases that every backend follows: tokens that the shift brings together from opposite edges
do not attend to each other (probability exactly 0); each axis has its own shift, and an axis
without shift has no seam; a vector shorter than 1e-12 is divided by 1e-12 in cosine attention, and
gets no gradient; logit_scale above ln 100 counts as ln 100 and gets no gradient; a NaN score makes
its whole row NaN; dropout acts on the probabilities.
"""

from __future__ import annotations

import math

import torch

from .._random import keep_mask
from ..attention.reference import softmax

Tensor = torch.Tensor

MAX_LOGIT_SCALE = math.log(100.0)
SHORTEST = 1e-12  # of a vector in cosine attention


def window_attention(
    qkv, bias_table, window, shift, num_heads, scale, logit_scale, seed, dropout_p
):
    """softmax(scale * q k^T + bias) v in each shifted window. Returns out (B, H, W, C) and lse.

    lse is (B, windows, heads, N): windows row-major over the shifted map, N = Wh * Ww tokens.
    """
    q, k, v = unpack(qkv, num_heads, window, shift)
    s, _ = scores(q, k, bias_table, scale, logit_scale, qkv.shape, window, shift)
    lse = torch.logsumexp(s, -1, keepdim=True)
    out = dropout(softmax(s, lse), seed, dropout_p) @ v
    return pack([out], qkv.shape, window, shift).to(qkv.dtype), lse.squeeze(-1)


def scores(q, k, bias_table, scale, logit_scale, shape, window, shift):
    """Masked scores (B, windows, heads, N, N), and the cosines alone with a logit_scale."""
    cosine = None
    if logit_scale is None:
        s = (q * scale) @ k.transpose(-1, -2)
    else:
        cosine = unit(q) @ unit(k).transpose(-1, -2)
        s = cosine * factor(logit_scale, cosine)
    s = s + position_bias(bias_table, window).to(s.dtype)
    apart = seams(shape, window, shift, s.device)
    return s if apart is None else s.masked_fill(apart[:, None], -torch.inf), cosine


def unit(x):
    """x / max(|x|, SHORTEST), without a gradient into a shorter vector."""
    length = x.norm(dim=-1, keepdim=True)
    direction = x / length.clamp_min(SHORTEST)
    return torch.where(length < SHORTEST, direction.detach(), direction)


def factor(logit_scale, like):
    """exp(min(logit_scale, ln 100)) as (heads, 1, 1)."""
    return logit_scale.to(like.dtype).reshape(-1, 1, 1).clamp(max=MAX_LOGIT_SCALE).exp()


# --- geometry -------------------------------------------------------------------------------------


def to_windows(x: Tensor, window, shift) -> Tensor:
    """(B, H, W, C) -> (B, windows, N, C): roll by -shift, then cut into windows."""
    (Wh, Ww), (B, H, W, C) = window, x.shape
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    x = x.reshape(B, H // Wh, Wh, W // Ww, Ww, C).transpose(2, 3)
    return x.reshape(B, (H // Wh) * (W // Ww), Wh * Ww, C)


def from_windows(x: Tensor, size, window, shift) -> Tensor:
    """(B, windows, N, C) -> (B, H, W, C): the inverse of to_windows."""
    (Wh, Ww), (H, W) = window, size
    B, C = x.shape[0], x.shape[-1]
    x = x.reshape(B, H // Wh, W // Ww, Wh, Ww, C).transpose(2, 3).reshape(B, H, W, C)
    return torch.roll(x, tuple(shift), (1, 2)) if any(shift) else x


def unpack(qkv: Tensor, num_heads: int, window, shift) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, windows, heads, N, D) in fp32 or float64 of the packed (B, H, W, 3 * C)."""
    x = to_windows(widen(qkv), window, shift)
    return x.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)


def pack(parts: list[Tensor], shape, window, shift) -> Tensor:
    """(B, H, W, parts * C) of parts (B, windows, heads, N, D)."""
    x = torch.stack(parts, 3).permute(0, 1, 4, 3, 2, 5).flatten(3)
    return from_windows(x, shape[1:3], window, shift)


def position_index(window, device=None) -> Tensor:
    """(N, N): the row of the bias table for query i and key j, by where j lies relative to i."""
    Wh, Ww = window
    token = torch.arange(Wh * Ww, device=device)
    row, column = token // Ww, token % Ww
    dy = row[:, None] - row[None, :] + Wh - 1
    return dy * (2 * Ww - 1) + column[:, None] - column[None, :] + Ww - 1


def position_bias(bias_table: Tensor, window) -> Tensor:
    """(heads, N, N) of the table ((2 Wh - 1)(2 Ww - 1), heads)."""
    return bias_table[position_index(window, bias_table.device)].permute(2, 0, 1)


def seams(shape, window, shift, device=None) -> Tensor | None:
    """Bool (windows, N, N), True where a seam lies between query and key; None without shift.

    After the roll, the last shift[0] rows come from the top of the map and the last shift[1]
    columns from its left.
    """
    if not any(shift):
        return None
    H, W = shape[1:3]
    below = torch.arange(H, device=device) >= (H - shift[0] if shift[0] else H)
    right = torch.arange(W, device=device) >= (W - shift[1] if shift[1] else W)
    region = 2 * below[:, None].int() + right[None, :].int()
    region = to_windows(region[None, :, :, None], window, (0, 0))[0, :, :, 0]
    return region[:, :, None] != region[:, None, :]


def widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def dropout(p, seed, dropout_p):
    if dropout_p == 0.0:
        return p
    return p * (keep_mask(seed, tuple(p.shape), dropout_p).to(p.dtype) / (1.0 - dropout_p))


# --- raw operators --------------------------------------------------------------------------------


def window_attention_fwd(
    qkv, bias_table, logit_scale, seed, Wh, Ww, shift_h, shift_w, num_heads, scale, dropout_p
):
    window, shift = (Wh, Ww), (shift_h, shift_w)
    out, lse = window_attention(
        qkv, bias_table, window, shift, num_heads, scale, logit_scale, seed, dropout_p
    )
    return out.contiguous(), lse.contiguous()


def window_attention_bwd(
    dout, qkv, out, lse, bias_table, logit_scale, seed,
    Wh, Ww, shift_h, shift_w, num_heads, scale, dropout_p, output_mask,
):  # fmt: skip
    window, shift = (Wh, Ww), (shift_h, shift_w)
    q, k, v = unpack(qkv, num_heads, window, shift)
    s, cosine = scores(q, k, bias_table, scale, logit_scale, qkv.shape, window, shift)
    p = softmax(s, lse.to(s.dtype).unsqueeze(-1))
    dout = to_windows(widen(dout), window, shift).unflatten(-1, (num_heads, -1)).transpose(2, 3)
    dp = dropout(dout @ v.transpose(-1, -2), seed, dropout_p)
    # Masked entries have p = 0 and get no gradient, whatever dp holds.
    ds = torch.where(s == -torch.inf, 0.0, p * (dp - (p * dp).sum(-1, keepdim=True)))
    dqkv = dbias_table = dlogit_scale = None
    if output_mask[0]:
        dv = dropout(p, seed, dropout_p).transpose(-1, -2) @ dout
        if logit_scale is None:
            dq, dk = scale * (ds @ k), scale * (ds.transpose(-1, -2) @ q)
        else:
            by = factor(logit_scale, s)
            dq = _normalize_bwd(q, by * (ds @ unit(k)))
            dk = _normalize_bwd(k, by * (ds.transpose(-1, -2) @ unit(q)))
        dqkv = pack([dq, dk, dv], qkv.shape, window, shift).to(qkv.dtype).contiguous()
    if output_mask[1]:
        index = position_index(window, ds.device).flatten()
        dbias_table = torch.zeros(bias_table.shape, dtype=ds.dtype, device=ds.device)
        dbias_table = dbias_table.index_add(0, index, ds.sum((0, 1)).flatten(1).t())
        dbias_table = dbias_table.to(bias_table.dtype)
    if output_mask[2]:
        dfactor = (ds * torch.where(ds == 0, 0.0, cosine)).sum((0, 1, 3, 4))
        below = widen(logit_scale.flatten()) <= MAX_LOGIT_SCALE  # in 16 bits ln 100 is another
        dlogit_scale = torch.where(below, dfactor * factor(logit_scale, s).flatten(), 0.0)
        dlogit_scale = dlogit_scale.to(logit_scale.dtype).reshape(logit_scale.shape)
    return dqkv, dbias_table, dlogit_scale


def _normalize_bwd(x, dunit):
    """The gradient of x for that of x / max(|x|, SHORTEST); 0 where x is shorter."""
    length = x.norm(dim=-1, keepdim=True)
    unit = x / length.clamp_min(SHORTEST)
    dx = (dunit - unit * (unit * dunit).sum(-1, keepdim=True)) / length.clamp_min(SHORTEST)
    return torch.where(length < SHORTEST, 0.0, dx)


# --- what tests, benchmarks and profilers share ---------------------------------------------------


def sample_inputs():
    """(name, (B, H, W, heads, D), window, shift) of the calls people meet."""
    return [
        ("swin_tiny_stage1", (8, 56, 56, 3, 32), 7, 0),
        ("swin_tiny_stage1_shifted", (8, 56, 56, 3, 32), 7, 3),
        ("swin_tiny_stage3_shifted", (8, 14, 14, 12, 32), 7, 3),
        ("swinv2_tiny_stage1_shifted", (4, 64, 64, 3, 32), 8, 4),
        ("swin_base_384_stage1_shifted", (1, 96, 96, 4, 32), 12, 6),
        ("swinv2_base_stage1_shifted", (2, 64, 64, 4, 32), 16, 8),
        ("swinv2_base_384_stage1", (1, 96, 96, 4, 32), 24, 12),
    ]


def cost(shape, window, itemsize=2, *, backward=False):
    """(FLOPs, least bytes): two products forward, five backward; each tensor moved once."""
    B, H, W, heads, D = shape
    Wh, Ww = (window, window) if isinstance(window, int) else window
    products, tensors = (5, 8) if backward else (2, 4)  # backward: dout, out, qkv in, dqkv out
    tokens = B * H * W * heads
    return 2 * products * tokens * Wh * Ww * D, tokens * D * itemsize * tensors
