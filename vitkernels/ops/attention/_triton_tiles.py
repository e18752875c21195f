"""What the Triton forward and backward of attention share: tiles, scores and probabilities.

Tiles are powers of two wide. D head channels are a tuple of tiles (DIMS, such as 64 + 16 for
D = 80), and rows that are taken at once are split the same way (PARTS, such as 128 + 64 + 16 for
197 keys), so that little of a product is padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vitkernels._triton import FLOATS, check_dropout, check_like, fail, keep_mask

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Sizes of which neither alignment nor the value 1 is worth a compilation of its own.
VARYING = [
    "H", "Nq", "groups", "blocks_per_program", "main", "threshold",
    "bias_batch", "bias_heads", "shared_heads", "items", "items_per_program", "rows", "columns",
]  # fmt: skip


# --- device: tiles --------------------------------------------------------------------------------


@triton.jit
def head_pointer(ptr, b, h, strides, UNIT: tl.constexpr):
    """Where a head of a (B, N, H, D) tensor starts; strides (batch, token, head) count UNITs."""
    return ptr + (b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[2]) * UNIT


@triton.constexpr_function
def first_of(sizes, n):
    """Where tile n of a split size begins."""
    return sum(sizes[:n])


@triton.jit
def load_tiles(
    ptr, row, count, strides,
    D: tl.constexpr, DIMS: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """These rows of one head as tiles of dtype DOT; 0 beyond D and, with CHECK, beyond count."""
    tiles = ()
    for n in tl.static_range(len(DIMS)):
        d = first_of(DIMS, n) + tl.arange(0, DIMS[n])
        pointers = ptr + row.to(tl.int64)[:, None] * (strides[1] * UNIT) + d[None, :]
        if CHECK:
            tile = tl.load(pointers, mask=(row < count)[:, None] & (d < D)[None, :], other=0.0)
        elif first_of(DIMS, n + 1) > D:
            tile = tl.load(pointers, mask=(d < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
        tiles = tiles + (tile.to(DOT),)
    return tiles


@triton.jit
def load_parts(
    ptr, first, count, strides,
    D: tl.constexpr, PARTS: tl.constexpr, DIMS: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The rows [first, count) of one head: a tuple of tiles for each entry of PARTS."""
    parts = ()
    for n in tl.static_range(len(PARTS)):
        row = first + first_of(PARTS, n) + tl.arange(0, PARTS[n])
        tiles = load_tiles(ptr, row, count, strides, D, DIMS, UNIT, DOT, n == len(PARTS) - 1)
        parts = parts + (tiles,)
    return parts


@triton.jit
def store_tiles(
    ptr, tiles, row, count, strides, D: tl.constexpr, DIMS: tl.constexpr, UNIT: tl.constexpr
):
    for n in tl.static_range(len(DIMS)):
        d = first_of(DIMS, n) + tl.arange(0, DIMS[n])
        pointers = ptr + row.to(tl.int64)[:, None] * (strides[1] * UNIT) + d[None, :]
        mask = (row < count)[:, None] & (d < D)[None, :]
        tl.store(pointers, tiles[n].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, DIMS: tl.constexpr):
    tiles = ()
    for n in tl.static_range(len(DIMS)):
        tiles = tiles + (tl.full((ROWS, DIMS[n]), 0.0, tl.float32),)
    return tiles


@triton.jit
def scale_tiles(tiles, factor):
    scaled = ()
    for n in tl.static_range(len(tiles)):
        scaled = scaled + (tiles[n] * factor,)
    return scaled


@triton.jit
def dot_rows(a, b):
    """(M, D) times (N, D) transposed, in fp32."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for n in tl.static_range(1, len(a)):
        product = tl.dot(a[n], tl.trans(b[n]), product, input_precision="ieee")
    return product


@triton.jit
def add_dot(total, a, b):
    """total (M, D) + a (M, N) times b (N, D)."""
    tiles = ()
    for n in tl.static_range(len(b)):
        tiles = tiles + (tl.dot(a.to(b[n].dtype), b[n], total[n], input_precision="ieee"),)
    return tiles


# --- device: scores, probabilities and their gradient ---------------------------------------------


@triton.jit
def bias_pointer(bias_ptr, b, h, bias_strides):
    return bias_ptr + b.to(tl.int64) * bias_strides[0] + h.to(tl.int64) * bias_strides[1]


@triton.jit
def finish_scores(
    product, i, j, bias_ptr, mask_ptr, bias_strides, Nq, Nk, scale,
    BIAS_IS_BOOL: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Scores in units of log 2: scale * product + bias, -inf where masked.

    Query and key indices i and j broadcast to the shape of product. bias_ptr and mask_ptr point at
    this batch item and head. PADDED: j may pass Nk.
    """
    s = product * (scale * LOG2E)
    if bias_ptr is not None:
        offset = i.to(tl.int64) * bias_strides[2] + j.to(tl.int64) * bias_strides[3]
        bias = tl.load(bias_ptr + offset, mask=(i < Nq) & (j < Nk), other=0)
        if BIAS_IS_BOOL:
            s = tl.where(bias != 0, s, float("-inf"))
        else:
            s += bias.to(tl.float32) * LOG2E
    if mask_ptr is not None:
        ignored = tl.load(mask_ptr + j, mask=j < Nk, other=1)
        s = tl.where(ignored != 0, float("-inf"), s)
    if PADDED:
        s = tl.where(j < Nk, s, float("-inf"))
    return s


@triton.jit
def finite_or_zero(x):
    """0 for the maximum or log-sum-exp -inf of a fully masked row: its probabilities become 0."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def kept(seed_ptr, head, i, j, Nq, Nk, threshold):
    """Which probabilities dropout keeps; head is b * H + h."""
    index = (head.to(tl.int64) * Nq + i) * Nk + j
    return keep_mask(tl.load(seed_ptr), index, threshold)


@triton.jit
def probability_gradients(s, lse, dp, delta, head, i, j, seed_ptr, Nq, Nk, threshold, keep_scale):
    """(dropped p, ds) from scores and lse in units of log 2, and dp = dout v^T."""
    p = tl.exp2(s - lse)
    dropped = p
    if seed_ptr is not None:
        factor = tl.where(kept(seed_ptr, head, i, j, Nq, Nk, threshold), keep_scale, 0.0)
        dropped = p * factor
        dp = dp * factor
    ds = tl.where(s == float("-inf"), 0.0, p * (dp - delta))
    return dropped, ds


@triton.jit
def load_lse(lse_ptr, row, Nq):
    """In units of log 2, finite: a fully masked row has probabilities 0 whatever is subtracted."""
    return finite_or_zero(tl.load(lse_ptr + row, mask=row < Nq, other=0.0)) * LOG2E


@triton.jit
def score_gradients(
    left, right, dleft, dright, lse, delta, head, i, j, bias_ptr, mask_ptr, seed_ptr, bias_strides,
    Nq, Nk, scale, threshold, keep_scale, BIAS_IS_BOOL: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """(dropped p, ds) of a tile from (q, k, dout, v), or of its transpose from (k, q, v, dout)."""
    product = dot_rows(left, right)
    s = finish_scores(
        product, i, j, bias_ptr, mask_ptr, bias_strides, Nq, Nk, scale, BIAS_IS_BOOL, PADDED
    )
    dp = dot_rows(dleft, dright)
    return probability_gradients(
        s, lse, dp, delta, head, i, j, seed_ptr, Nq, Nk, threshold, keep_scale
    )


# --- host: tensors as kernels take them -----------------------------------------------------------


def check_attention(op, q, k, v, bias, key_padding_mask, seed, dropout_p):
    if q.ndim != 4 or not 1 <= q.shape[3] <= 256 or 0 in q.shape[1:3]:
        fail(op, "q", "of shape (B, Nq, H, D) with Nq, H >= 1, D from 1 to 256", tuple(q.shape))
    B, Nq, H, D = q.shape
    if k.ndim != 4 or k.shape[1] == 0:
        fail(op, "k", "of shape (B, Nk, H, D) with Nk >= 1", tuple(k.shape))
    Nk = k.shape[1]
    check_like(op, "q", q, q.shape)
    check_like(op, "k", k, (B, Nk, H, D), (q.dtype,))
    check_like(op, "v", v, (B, Nk, H, D), (q.dtype,))
    if bias is not None:
        sizes = zip(bias.shape, (B, H, Nq, Nk), strict=False)
        if bias.ndim != 4 or any(size not in (1, full) for size, full in sizes):
            expected = f"4-D, each dim 1 or that of (B, H, Nq, Nk) = {(B, H, Nq, Nk)}"
            fail(op, "bias", expected, tuple(bias.shape))
        check_like(op, "bias", bias, bias.shape, (*FLOATS, torch.bool))
    check_like(op, "key_padding_mask", key_padding_mask, (B, Nk), (torch.bool,))
    check_dropout(op, seed, dropout_p)


def check_packed(op, qkv, num_heads):
    width = 3 * num_heads
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[2] == 0 or qkv.shape[2] % width:
        expected = f"of shape (B, N, 3 * H * D) with H = num_heads = {num_heads} >= 1"
        fail(op, "qkv", expected, tuple(qkv.shape))
    check_like(op, "qkv", qkv, qkv.shape)


class Heads(NamedTuple):
    """(B, N, H, D) tensors of last stride 1, their strides (batch, token, head) in `unit`s."""

    tensors: list[torch.Tensor]
    strides: list[tuple[int, int, int]]
    unit: int


def heads(*tensors: torch.Tensor) -> Heads:
    """Copies what has another last stride than 1. A unit of 8 tells the compiler of alignment."""
    ready = [t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in tensors]
    strides = [t.stride()[:3] for t in ready]
    unit = 8 if all(s % 8 == 0 for stride in strides for s in stride) else 1
    return Heads(ready, [tuple(s // unit for s in stride) for stride in strides], unit)


def bias_view(
    bias: torch.Tensor | None, B: int, H: int, Nq: int, Nk: int
) -> tuple[torch.Tensor | None, tuple[int, int, int, int], bool]:
    """(tensor, strides with 0 for broadcast dims, whether it is bool). Bytes stand for bools."""
    if bias is None:
        return None, (0, 0, 0, 0), False
    strides = bias.expand(B, H, Nq, Nk).stride()
    is_bool = bias.dtype == torch.bool
    return bias.view(torch.uint8) if is_bool else bias, strides, is_bool


def mask_view(key_padding_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
