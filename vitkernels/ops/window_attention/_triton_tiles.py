"""What the Triton forward and backward of window attention share: tokens, bias, seams and scores.

The `place` of a window is (batch item, row, column, rows of the map, columns of the map), all but
the first counted in windows of the shifted map. Its token t lies at (t // Ww, t % Ww) of it. Scores
are in units of log 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vitkernels._triton import cdiv, check_dropout, check_like, fail, keep_mask, on_device
from vitkernels.ops.window_attention.reference import MAX_LOGIT_SCALE, SHORTEST

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
LN100 = tl.constexpr(MAX_LOGIT_SCALE)
LEAST_LENGTH = tl.constexpr(SHORTEST)
# Sizes of which neither alignment nor the value 1 is worth a compilation of its own.
VARYING = [
    "heads", "batch", "rows", "columns", "windows", "windows_per_program", "threshold",
]  # fmt: skip


# --- device: where tokens lie ---------------------------------------------------------------------


@triton.jit
def area_of(kind, rows, columns, SHIFT: tl.constexpr):
    """(first row, first column, rows, columns, rows of the map, columns of the map) of the windows
    of a kind: 0 has no seam, 1 lies in the last column, 2 in the last row, 3 in both."""
    SEAM_ROWS: tl.constexpr = 1 if SHIFT[0] > 0 else 0
    SEAM_COLUMNS: tl.constexpr = 1 if SHIFT[1] > 0 else 0
    below = kind >= 2
    right = kind % 2 == 1
    return (
        tl.where(below, rows - SEAM_ROWS, 0),
        tl.where(right, columns - SEAM_COLUMNS, 0),
        tl.where(below, SEAM_ROWS, rows - SEAM_ROWS),
        tl.where(right, SEAM_COLUMNS, columns - SEAM_COLUMNS),
        rows,
        columns,
    )


@triton.jit
def windows_of_a_program(group, batch, rows, columns, windows_per_program, SHIFT: tl.constexpr):
    """(kind, area, first, last): windows [first, last) of those areas in the batch.

    All are of one kind, so that one bias has the seams in it (plans.programs_of_a_head).
    """
    kind = 0
    start = 0
    end = 0
    for n in tl.static_range(3):
        area = area_of(n, rows, columns, SHIFT)
        end += tl.cdiv(batch * area[2] * area[3], windows_per_program)
        kind = tl.where(group >= end, n + 1, kind)
        start = tl.where(group >= end, end, start)
    area = area_of(kind, rows, columns, SHIFT)
    first = (group - start) * windows_per_program
    return kind, area, first, tl.minimum(first + windows_per_program, batch * area[2] * area[3])


@triton.jit
def locate(window, area):
    """The place of a window of these areas in the batch."""
    b = window // (area[2] * area[3])
    rest = window - b * (area[2] * area[3])
    y = rest // area[3]
    return b, area[0] + y, area[1] + rest - y * area[3], area[4], area[5]


@triton.jit
def token_offsets(
    token, place, strides, WINDOW: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr
):
    """Where tokens of a window lie in the unshifted map; strides (batch, y, x) count UNITs."""
    y = place[1] * WINDOW[0] + token // WINDOW[1]
    x = place[2] * WINDOW[1] + token % WINDOW[1]
    if SHIFT[0] > 0:
        H = place[3] * WINDOW[0]
        y = tl.where(y + SHIFT[0] >= H, y + SHIFT[0] - H, y + SHIFT[0])
    if SHIFT[1] > 0:
        W = place[4] * WINDOW[1]
        x = tl.where(x + SHIFT[1] >= W, x + SHIFT[1] - W, x + SHIFT[1])
    map_offset = place[0].to(tl.int64) * strides[0]
    return (map_offset + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]) * UNIT


@triton.jit
def statistics_offset(place, heads, h, N: tl.constexpr):
    """Where the rows of a head of a window start in lse; times N, in the mask of dropout."""
    window = (place[0].to(tl.int64) * place[3] + place[1]) * place[4] + place[2]
    return (window * heads + h) * N


@triton.jit
def load_rows(ptr, offset, token, N: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
              DOT: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
    """One head's channels of these tokens as a tile of dtype DOT; 0 beyond D, and beyond N with
    CHECK."""
    d = tl.arange(0, DIM)
    pointers = ptr + offset[:, None] + d[None, :]
    if CHECK and D < DIM:
        tile = tl.load(pointers, mask=(token < N)[:, None] & (d < D)[None, :], other=0.0)
    elif CHECK:
        tile = tl.load(pointers, mask=(token < N)[:, None], other=0.0)
    elif D < DIM:
        tile = tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile.to(DOT)


@triton.jit
def store_rows(ptr, tile, offset, token, N: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    mask = (token < N)[:, None] & (d < D)[None, :] if D < DIM else (token < N)[:, None]
    pointers = ptr + offset[:, None] + d[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(bias_ptr, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              WIDTH: tl.constexpr):  # fmt: skip
    """A tile of the expanded bias of one head, whose rows are WIDTH wide."""
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    return tl.load(bias_ptr + row[:, None] * WIDTH + column[None, :])


# --- device: scores -------------------------------------------------------------------------------


@triton.jit
def dot_rows(a, b):
    """(M, D) times (N, D) transposed, in fp32."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def add_dot(total, a, b):
    """total (M, D) + a (M, N) times b (N, D)."""
    return tl.dot(a.to(b.dtype), b, total, input_precision="ieee")


@triton.jit
def score_factor(logit_scale_ptr, h, scale):
    """What multiplies q k^T, or the cosines: exp(min(logit_scale, ln 100))."""
    if logit_scale_ptr is None:
        return scale
    else:
        logit_scale = tl.load(logit_scale_ptr + h).to(tl.float32)
        # The comparison keeps NaN, which a minimum would drop.
        return tl.exp(tl.where(logit_scale > LN100, LN100, logit_scale))


@triton.jit
def lengths(x):
    """max(|row|, 1e-12), what cosine attention divides by."""
    x = x.to(tl.float32)
    length = tl.sqrt_rn(tl.sum(x * x, 1))
    return tl.where(length < LEAST_LENGTH, LEAST_LENGTH, length)


@triton.jit
def unit_rows(x, length):
    """Rows of length 1 in x's dtype, at the cost of one rounding; x itself without lengths."""
    if length is None:
        return x
    else:
        return (x.to(tl.float32) * (1.0 / length)[:, None]).to(x.dtype)


@triton.jit
def scaled_products(product, factor, row_length, column_length):
    """The scores before bias and mask."""
    if row_length is None:
        return product * (factor * LOG2E)
    else:
        return product * (factor * LOG2E / row_length)[:, None] * (1.0 / column_length)[None, :]


@triton.jit
def _region(token, on_last_row, on_last_column, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    below = on_last_row & (token // WINDOW[1] >= WINDOW[0] - SHIFT[0])
    right = on_last_column & (token % WINDOW[1] >= WINDOW[1] - SHIFT[1])
    return 2 * below.to(tl.int32) + right.to(tl.int32)


@triton.jit
def mask_seams(x, i, j, value, place, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """`value` where a seam lies between tokens i and j. Other windows than those of the last row
    and column have none, and pass by."""
    if SHIFT[0] > 0 or SHIFT[1] > 0:
        last_row = (place[1] == place[3] - 1) & (SHIFT[0] > 0)
        last_column = (place[2] == place[4] - 1) & (SHIFT[1] > 0)
        if last_row | last_column:
            region_i = _region(i, last_row, last_column, WINDOW, SHIFT)
            region_j = _region(j, last_row, last_column, WINDOW, SHIFT)
            x = tl.where(region_i[:, None] == region_j[None, :], x, value)
    return x


@triton.jit
def mask_by_bias(p, bias, value, row, kind, SHIFT: tl.constexpr):
    """Probabilities of a window that is one tile: `value` where a seam lies, as the bias knows;
    exp2 of a sum with -inf would let NaN pass. `row` is finite, or None, in rows without NaN.

    With a row made of p, ptxas cannot compare all of the bias before, into a register each.
    """
    if SHIFT[0] > 0 or SHIFT[1] > 0:
        apart = tl.where(kind > 0, float("-inf"), float("nan"))  # nothing equals NaN
        if row is not None:
            apart = (0.0 * row + apart)[:, None]
        p = tl.where(bias == apart, value, p)
    return p


@triton.jit
def dropout_factors(seed_ptr, statistics, i, j, N: tl.constexpr, threshold, keep_scale):
    """keep_scale where dropout keeps a probability, else 0; i and j broadcast to the tile, and
    statistics is their statistics_offset."""
    index = (statistics + i) * N + j
    return tl.where(keep_mask(tl.load(seed_ptr), index, threshold), keep_scale, 0.0)


@triton.jit
def probabilities(
    left, right, bias, factor, left_length, right_length, lse, a, b, place, WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """(scores before the bias, probabilities) of rows a and columns b, queries and keys or keys and
    queries."""
    products = scaled_products(dot_rows(left, right), factor, left_length, right_length)
    s = mask_seams(products + bias, a, b, float("-inf"), place, WINDOW, SHIFT)
    return products, tl.exp2(s - lse)


@triton.jit
def with_dropout(p, dp, seed_ptr, statistics, i, j, N: tl.constexpr, threshold, keep_scale):
    """(p, dp) with the mask that the forward drew."""
    if seed_ptr is None:
        return p, dp
    else:
        factors = dropout_factors(seed_ptr, statistics, i, j, N, threshold, keep_scale)
        return p * factors, dp * factors


@triton.jit
def input_gradient(total, x, length, factor):
    """(the gradient of q or k, its rowsum(unit * dunit) or None) from ds times the other side (its
    unit rows, with lengths). Of q, that sum is its share in the gradient of logit_scale."""
    total *= factor
    if length is None:
        return total, None
    else:
        inverse = (1.0 / length)[:, None]
        unit = x.to(tl.float32) * inverse
        along = tl.sum(unit * total, 1)
        dx = (total - unit * along[:, None]) * inverse
        return tl.where((length <= LEAST_LENGTH)[:, None], 0.0, dx), along


@triton.jit
def follows_logit_scale(logit_scale_ptr, h):
    """1, or 0 above ln 100, where logit_scale has no gradient."""
    return tl.where(tl.load(logit_scale_ptr + h).to(tl.float32) <= LN100, 1.0, 0.0)


# --- device: the bias of every pair of tokens -----------------------------------------------------


@triton.jit(do_not_specialize=VARYING)
def _expand_bias_kernel(
    table_ptr, bias_ptr, heads,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bias (kinds, heads, HEIGHT, WIDTH) in fp32 units of log 2: -inf at padded keys and across the
    seams of a kind, 0 at padded queries. Rows are queries, or keys if TRANSPOSED.

    Grid: (kinds * heads, ceil(HEIGHT * WIDTH / BLOCK)).
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    kind = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = index // WIDTH
    j = index % WIDTH
    if TRANSPOSED:
        i, j = j, i
    dy = i // WINDOW[1] - j // WINDOW[1] + WINDOW[0] - 1
    dx = i % WINDOW[1] - j % WINDOW[1] + WINDOW[1] - 1
    entry = dy * (2 * WINDOW[1] - 1) + dx
    inside = (i < N) & (j < N)
    bias = tl.load(table_ptr + entry * heads + h, mask=inside, other=0.0).to(tl.float32) * LOG2E
    region_i = _region(i, kind >= 2, kind % 2 == 1, WINDOW, SHIFT)
    region_j = _region(j, kind >= 2, kind % 2 == 1, WINDOW, SHIFT)
    apart = (j >= N) | (inside & (region_i != region_j))
    bias = tl.where(apart, float("-inf"), bias)
    bias_ptr += tl.program_id(0).to(tl.int64) * (HEIGHT * WIDTH)
    tl.store(bias_ptr + index, bias, mask=index < HEIGHT * WIDTH)


def expand_bias(
    bias_table, window, height: int, width: int, *, shift=(0, 0), transposed: bool = False
):
    """(kinds, heads, height, width): see _expand_bias_kernel; one kind without a shift."""
    table = bias_table.contiguous()
    heads, kinds = table.shape[1], 4 if any(shift) else 1
    bias = torch.empty((kinds, heads, height, width), dtype=torch.float32, device=table.device)
    with on_device(table):
        _expand_bias_kernel[(kinds * heads, cdiv(height * width, 1024))](
            table, bias, heads, WINDOW=window, SHIFT=shift, HEIGHT=height, WIDTH=width,
            TRANSPOSED=transposed, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return bias


# --- host -----------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """B maps of rows x columns windows of N tokens; heads of D channels."""

    B: int
    rows: int
    columns: int
    heads: int
    D: int
    window: tuple[int, int]
    shift: tuple[int, int]

    @property
    def N(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def windows(self) -> int:
        return self.B * self.rows * self.columns

    @property
    def map_of_windows(self) -> tuple[int, int, int]:
        return self.B, self.rows, self.columns


def check_windows(
    op, qkv, bias_table, logit_scale, seed, Wh, Ww, shift_h, shift_w, heads, dropout_p
) -> Sizes:
    """Refuses what the kernels would misread."""
    if heads < 1:
        fail(op, "num_heads", "at least 1", heads)
    if Wh < 1 or Ww < 1 or Wh * Ww > 1024:
        fail(op, "window_h and window_w", "at least 1, their product at most 1024", (Wh, Ww))
    if not (0 <= shift_h < Wh and 0 <= shift_w < Ww):
        fail(op, "shift_h and shift_w", f"from 0 to less than {(Wh, Ww)}", (shift_h, shift_w))
    width = qkv.shape[3] if qkv.ndim == 4 else 0
    D = width // (3 * heads)
    if not 1 <= D <= 128 or width % (3 * heads) or not qkv.shape[1] or not qkv.shape[2]:
        expected = f"of shape (B, H, W, 3 * {heads} * D) with D from 1 to 128, H and W at least 1"
        fail(op, "qkv", expected, tuple(qkv.shape))
    B, H, W, _ = qkv.shape
    if H % Wh or W % Ww:
        expected = f"of shape (B, H, W, 3 * C) with H a multiple of {Wh} and W of {Ww}"
        fail(op, "qkv", expected, tuple(qkv.shape))
    check_like(op, "qkv", qkv, qkv.shape)
    check_like(op, "bias_table", bias_table, ((2 * Wh - 1) * (2 * Ww - 1), heads))
    if logit_scale is not None and logit_scale.shape != (heads, 1, 1):
        check_like(op, "logit_scale", logit_scale, (heads,))
    check_like(op, "logit_scale", logit_scale, None if logit_scale is None else logit_scale.shape)
    check_dropout(op, seed, dropout_p)
    return Sizes(B, H // Wh, W // Ww, heads, D, (Wh, Ww), (shift_h, shift_w))


class Maps(NamedTuple):
    """(B, H, W, channels) tensors of last stride 1, their strides (batch, y, x) in `unit`s."""

    tensors: list[torch.Tensor]
    strides: list[tuple[int, int, int]]
    unit: int


def maps(*tensors: torch.Tensor) -> Maps:
    """Copies what has another last stride than 1. A unit of 8 tells the compiler of alignment."""
    ready = [t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in tensors]
    strides = [t.stride()[:3] for t in ready]
    unit = 8 if all(s % 8 == 0 for stride in strides for s in stride) else 1
    return Maps(ready, [tuple(s // unit for s in stride) for stride in strides], unit)
