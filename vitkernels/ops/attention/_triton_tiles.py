"""What the Triton forward and backward of attention share: tiles, scores, probabilities, and how sizes are split.

A tile of D head channels is a tuple of tiles whose widths are powers of two (DIMS, such as 64 + 16 for D = 80), and the
keys of a row are split the same way (COLUMNS, such as 128 + 64 + 16 for 197 keys): little of a product is padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vitkernels._triton import INTERPRETED, keep_mask

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Sizes and strides change with every batch or image size; only their alignment is worth a compilation of its own.
VARYING = ["H", "Nq", "groups", "blocks_per_program", "main", "threshold", "items", "items_per_program"]


# --- device: tiles ---------------------------------------------------------------------------------


@triton.jit
def head_pointer(ptr, b, h, strides, UNIT: tl.constexpr):
    """Start of one head of a (B, N, H, D) tensor; strides (batch, token, head) count units of UNIT elements."""
    return ptr + (b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[2]) * UNIT


@triton.jit
def load_tiles(ptr, row, count, strides, D: tl.constexpr, DIMS: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr):
    """Rows `row` of one head, (rows, D), as a tuple of tiles of dtype DOT; zeros beyond count and beyond D."""
    tiles = ()
    start = 0
    for n in tl.static_range(len(DIMS)):
        d = start + tl.arange(0, DIMS[n])
        pointers = ptr + row.to(tl.int64)[:, None] * (strides[1] * UNIT) + d[None, :]
        tile = tl.load(pointers, mask=(row < count)[:, None] & (d < D)[None, :], other=0.0)
        tiles = tiles + (tile.to(DOT),)
        start += DIMS[n]
    return tiles


@triton.jit
def store_tiles(ptr, tiles, row, count, strides, D: tl.constexpr, DIMS: tl.constexpr, UNIT: tl.constexpr):
    start = 0
    for n in tl.static_range(len(DIMS)):
        d = start + tl.arange(0, DIMS[n])
        pointers = ptr + row.to(tl.int64)[:, None] * (strides[1] * UNIT) + d[None, :]
        mask = (row < count)[:, None] & (d < D)[None, :]
        tl.store(pointers, tiles[n].to(ptr.dtype.element_ty), mask=mask)
        start += DIMS[n]


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


# --- device: scores, probabilities and their gradient ------------------------------------------------


@triton.jit
def bias_pointer(bias_ptr, b, h, bias_strides):
    if bias_ptr is None:
        return None
    else:
        return bias_ptr + b.to(tl.int64) * bias_strides[0] + h.to(tl.int64) * bias_strides[1]


@triton.jit
def mask_pointer(mask_ptr, b, Nk):
    if mask_ptr is None:
        return None
    else:
        return mask_ptr + b.to(tl.int64) * Nk


@triton.jit
def finish_scores(
    product, i, j, bias_ptr, mask_ptr, bias_strides, Nq, Nk, scale, BIAS_IS_BOOL: tl.constexpr, PADDED: tl.constexpr
):
    """Scores in units of log 2: scale * product + bias, -inf where masked. i and j broadcast to product's shape.

    bias_ptr and mask_ptr point at this batch item and head; bias_strides[2:] are those of i and j. PADDED: j may pass Nk.
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
    """A row that is masked throughout has maximum and log-sum-exp -inf; 0 in their place makes its probabilities 0."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def kept(seed_ptr, head, i, j, Nq, Nk, threshold):
    """Which probabilities dropout keeps; head is b * H + h."""
    index = (head.to(tl.int64) * Nq + i) * Nk + j
    return keep_mask(tl.load(seed_ptr), index, threshold)


@triton.jit
def probability_gradients(s, lse, dp, delta, head, i, j, seed_ptr, Nq, Nk, threshold, keep_scale):
    """(dropped probabilities, gradient of the scores) from scores, lse (units of log 2, finite), and dp = dout . v."""
    p = tl.exp2(s - lse)
    dropped = p
    if seed_ptr is not None:
        factor = tl.where(kept(seed_ptr, head, i, j, Nq, Nk, threshold), keep_scale, 0.0)
        dropped = p * factor
        dp = dp * factor
    ds = tl.where(s == float("-inf"), 0.0, p * (dp - delta))
    return dropped, ds


# --- host: how sizes are split -----------------------------------------------------------------------


def split_dims(D: int) -> tuple[int, ...]:
    """Powers of two from 16 that cover D channels: one, or two where that wastes less."""
    whole = max(16, triton.next_power_of_2(D))
    half = whole // 2
    rest = D - half
    if half < 32 or rest > half // 2:
        return (whole,)
    return (half, max(16, triton.next_power_of_2(rest)))


def split_columns(n: int, largest: int = 128, parts: int = 3) -> tuple[int, ...]:
    """Powers of two from 16 that cover n keys, largest first; at most `parts` of them below `largest`."""
    columns = [largest] * (n // largest)
    rest = n % largest
    for left in range(parts, 0, -1):
        if rest <= 0:
            break
        power = max(16, triton.next_power_of_2(rest))
        if left > 1 and power > 16 and rest <= power - power // 4:
            power //= 2
        columns.append(power)
        rest -= power
    return tuple(columns)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operands of tl.dot: the tensors' own dtype; fp32 under the interpreter, whose 16-bit products are wrong."""
    if INTERPRETED:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


class Heads(NamedTuple):
    """(B, N, H, D) tensors as kernels take them: last stride 1, strides (batch, token, head) in units of `unit`."""

    tensors: list[torch.Tensor]
    strides: list[tuple[int, int, int]]
    unit: int


def heads(*tensors: torch.Tensor) -> Heads:
    """Copies only what has a last stride other than 1. A unit of 8 tells the compiler of 16-byte alignment."""
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
