"""Triton forward of linear_gelu, and the matrix product that its backward shares with it.

    h = x W^T + bias;  y = act(h), both from the fp32 accumulator

The product is persistent: one or two programs per multiprocessor walk over the tiles. Operands are
(rows, columns) tensors of any strides, of which either index may be summed over: x W^T, dh W and
dh^T x are one kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vitkernels._triton import (
    FLOATS,
    INTERPRETED,
    Tile,
    capability,
    cdiv,
    check_like,
    choose_tile,
    collapse_rows,
    dot_dtype,
    fail,
    multiprocessors,
    on_device,
    reduction_splits,
    split_columns,
    stages,
    sum_partials,
    tile_of,
)

IDENTITY, ERF, TANH, QUICK = (tl.constexpr(i) for i in range(4))
ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_TWO_PI_INVERSE = tl.constexpr(0.3989422804014327)
ROOT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
VARYING = ["inner_rows", "splits", "steps_per_split"]


# --- mathematics shared by forward and backward --------------------------------------------------


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """(act(h), act'(h)) of fp32 h; the compiler drops the one that is not used."""
    if ACTIVATION == IDENTITY:
        return h, tl.full(h.shape, 1.0, tl.float32)
    elif ACTIVATION == ERF:
        gate = 0.5 + 0.5 * tl.erf(h * ROOT_HALF)
        return h * gate, gate + h * (ROOT_TWO_PI_INVERSE * tl.exp(-0.5 * h * h))
    elif ACTIVATION == TANH:  # 0.5 (1 + tanh(u)) = sigmoid(2 u), whose exp may overflow to 1 / inf
        square = tl.minimum(h * h, 1e30)  # finite, because 0 times its multiple is the derivative
        gate = 1.0 / (1.0 + tl.exp(h * (-2.0 * ROOT_TWO_OVER_PI) * (1.0 + 0.044715 * square)))
        slope = (2.0 * ROOT_TWO_OVER_PI) * (1.0 + 3.0 * 0.044715 * square)
        return h * gate, gate + h * (gate * (1.0 - gate)) * slope
    else:
        gate = 1.0 / (1.0 + tl.exp(-1.702 * h))
        return h * gate, gate + 1.702 * h * (gate * (1.0 - gate))


# --- the matrix product --------------------------------------------------------------------------


@triton.jit
def _load_operand(
    ptr, row, column, rows, columns, inner_rows, strides,
    TWO_LEVELS: tl.constexpr, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile (row, column) of a tensor; 0 beyond its ends. Strides are (outer, inner, column)."""
    if TWO_LEVELS:
        outer = row // inner_rows
        offset = outer.to(tl.int64) * strides[0] + (row - outer * inner_rows) * strides[1]
    else:
        offset = row.to(tl.int64) * strides[1]
    pointers = ptr + offset[:, None] + (column.to(tl.int64) * strides[2])[None, :]
    if CHECK_ROWS and CHECK_COLUMNS:
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers, mask=(row < rows)[:, None], other=0.0)
    elif CHECK_COLUMNS:
        return tl.load(pointers, mask=(column < columns)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit(do_not_specialize=VARYING)
def _product_kernel(
    a_ptr, b_ptr, bias_ptr, y_ptr, h_ptr,
    M, N, K, inner_rows, splits, steps_per_split, a_strides, b_strides,
    ACTIVATION: tl.constexpr, A_SUMS_ROWS: tl.constexpr, B_SUMS_ROWS: tl.constexpr,
    A_TWO_LEVELS: tl.constexpr, B_TWO_LEVELS: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """h = a b + bias, y = act(h), either may be None. Grid: any number of programs.

    a is (M, K), or (K, M) with A_SUMS_ROWS; b is (N, K), or (K, N) with B_SUMS_ROWS. With splits,
    y is (splits, M, N) partial sums over steps_per_split blocks of K each. EVEN: K fills the blocks
    of all splits. Limits: M, N, K < 2^31 - 256, tiles * splits < 2^31.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    for item in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        split = item // tiles
        tile_m, tile_n = tile_of(item - split * tiles, tiles_m, tiles_n, GROUP)
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        first = split * steps_per_split

        h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps_per_split):
            k = (first + step) * BLOCK_K + tl.arange(0, BLOCK_K)
            if A_SUMS_ROWS:
                a = _load_operand(
                    a_ptr, k, row, K, M, inner_rows, a_strides, A_TWO_LEVELS, not EVEN, True
                ).T
            else:
                a = _load_operand(
                    a_ptr, row, k, M, K, inner_rows, a_strides, A_TWO_LEVELS, True, not EVEN
                )
            if B_SUMS_ROWS:
                b = _load_operand(
                    b_ptr, k, column, K, N, inner_rows, b_strides, B_TWO_LEVELS, not EVEN, True
                )
            else:
                b = _load_operand(
                    b_ptr, column, k, N, K, inner_rows, b_strides, B_TWO_LEVELS, True, not EVEN
                ).T
            h = tl.dot(a.to(DOT), b.to(DOT), h, input_precision="ieee")

        parts = split_columns(h, BLOCK_N // 32)
        for n in tl.static_range(len(parts)):  # one after the other: all at once, erf spills
            here = tile_n * BLOCK_N + n * 32 + tl.arange(0, 32)
            part = parts[n]
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + here, mask=here < N, other=0.0)
                part += bias.to(tl.float32)[None, :]
            mask = (row < M)[:, None] & (here < N)[None, :]
            offset = (split.to(tl.int64) * M + row)[:, None] * N + here[None, :]
            if h_ptr is not None:
                tl.store(h_ptr + offset, part.to(h_ptr.dtype.element_ty), mask=mask)
            if y_ptr is not None:
                y, _ = activate(part, ACTIVATION)
                tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


# --- launch settings -----------------------------------------------------------------------------

# 790 TFLOP/s of an H200 and 312 of an A100 want 60 or more FLOPs from each byte of L2: 128 x 256
# has 85 and 128 x 128 has 64; smaller tiles fill the machine at small batches. Exact GELU costs
# half the time of a product over K = 768, so its tile leaves room for a second block, which
# multiplies meanwhile (127 registers and 96 KB on sm_90). fp32 is FMA: 64 for each 16 loads.
SM90 = (
    Tile(128, 256, 64, 8, 4),
    Tile(128, 128, 64, 8, 3, 2),
    Tile(64, 128, 64, 4, 3, 3),
    Tile(64, 64, 64, 4, 3, 4),
)
SM80 = (
    Tile(128, 256, 32, 8, 4),
    Tile(128, 128, 32, 4, 4, 2),
    Tile(64, 128, 32, 4, 4, 3),
    Tile(64, 64, 64, 4, 3, 4),
)
FP32 = (Tile(128, 128, 16, 8, 2), Tile(64, 64, 16, 4, 2, 4))


def tiles_for(dtype: torch.dtype, device: torch.device, gelu: bool) -> tuple[Tile, ...]:
    if dtype == torch.float32 and not INTERPRETED:
        return FP32
    table = SM90 if capability(device) >= 90 else SM80
    return table[1:] if gelu else table


# --- launchers -----------------------------------------------------------------------------------


class Operand(NamedTuple):
    """A tensor as rows of any strides; sums_rows: the product sums over its rows."""

    tensor: torch.Tensor
    strides: tuple[int, int, int]
    sums_rows: bool = False
    two_levels: bool = False


def matrix(tensor: torch.Tensor, sums_rows: bool) -> Operand:
    return Operand(tensor, (0, tensor.stride(0), tensor.stride(1)), sums_rows)


def rows_of(*tensors: torch.Tensor, sums_rows: bool) -> tuple[int, list[Operand]]:
    """(inner_rows, operands) of tensors (..., C) of the same leading sizes."""
    inner_rows, ready, strides = collapse_rows(*tensors)
    two_levels = inner_rows < tensors[0].shape[:-1].numel()
    return inner_rows, [
        Operand(t, s, sums_rows, two_levels) for t, s in zip(ready, strides, strict=True)
    ]


def product(
    sizes: tuple[int, int, int], inner_rows: int, a: Operand, b: Operand, dtype: torch.dtype,
    y: torch.Tensor | None, h: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    activation: int = 0, may_split: bool = False,
) -> None:  # fmt: skip
    """Writes h = a b + bias and y = act(h) from operands rounded to dtype; M, N, K are not 0."""
    M, N, K = sizes
    device = a.tensor.device
    processors = multiprocessors(device)
    tile = choose_tile(tiles_for(dtype, device, activation > 0), M, N, processors)
    splits, steps = 1, cdiv(K, tile.k)
    if may_split:
        splits, steps = reduction_splits(tile, M, N, K, processors)
    out = y
    if splits > 1:
        out = torch.empty((splits, M, N), dtype=torch.float32, device=device)
    items = cdiv(M, tile.m) * cdiv(N, tile.n) * splits
    with on_device(a.tensor):
        _product_kernel[(min(items, processors * tile.residents),)](
            a.tensor, b.tensor, bias, out, h, M, N, K, inner_rows, splits, steps, a.strides,
            b.strides, ACTIVATION=activation, A_SUMS_ROWS=a.sums_rows, B_SUMS_ROWS=b.sums_rows,
            A_TWO_LEVELS=a.two_levels, B_TWO_LEVELS=b.two_levels, EVEN=splits * steps * tile.k == K,
            DOT=dot_dtype(dtype), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=8,
            num_warps=tile.num_warps, num_stages=stages(device, tile.num_stages),
        )  # fmt: skip
    if splits > 1:
        sum_partials(out, y)


def check_linear(op, x, weight, bias, activation):
    if x.ndim == 0 or x.shape[-1] == 0:
        fail(op, "x", "of shape (..., K) with K >= 1", tuple(x.shape))
    if weight.ndim != 2 or weight.shape[0] == 0:
        fail(op, "weight", "of shape (N, K) with N >= 1", tuple(weight.shape))
    check_like(op, "x", x, x.shape)
    check_like(op, "weight", weight, (weight.shape[0], x.shape[-1]))
    check_like(op, "bias", bias, weight.shape[:1])
    if activation not in range(4):
        fail(op, "activation", "0 (identity), 1 (erf), 2 (tanh) or 3 (quick)", activation)


def check_out_dtype(op, out_dtype):
    if out_dtype not in FLOATS:
        fail(op, "out_dtype", "float32 or bfloat16 or float16", out_dtype)


def forward(x, weight, bias, activation, dtype, y, preactivation) -> None:
    """Writes y and preactivation, (..., N) contiguous; either may be None.

    An operand of another dtype is rounded by a copy, 6 bytes an element once: in the loop, fp32
    tiles would need twice the traffic and shared memory. (Besides, Triton 3.7 on sm_100 multiplies
    fp32 that it made from 16 bits in tf32, whatever input_precision says: its issue 10176.)
    """
    N, K = weight.shape
    M = x.shape[:-1].numel()
    if M == 0:
        return
    inner_rows, (a,) = rows_of(x.to(dtype), sums_rows=False)
    b = matrix(weight.to(dtype), sums_rows=False)
    bias = None if bias is None else bias.contiguous()
    product((M, N, K), inner_rows, a, b, dtype, y, preactivation, bias, activation)


def linear_gelu_fwd(x, weight, bias, activation, save_preactivation, out_dtype):
    op = "linear_gelu_fwd"
    check_linear(op, x, weight, bias, activation)
    check_out_dtype(op, out_dtype)
    shape = (*x.shape[:-1], weight.shape[0])
    y = torch.empty(shape, dtype=out_dtype, device=x.device)
    preactivation = torch.empty_like(y) if save_preactivation and activation else None
    forward(x, weight, bias, activation, out_dtype, y, preactivation)
    return y, preactivation
