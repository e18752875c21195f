"""Triton backward of linear_gelu: dh = dy * act'(h), then two products on the forward's kernel.

    dx = dh W;  dweight = dh^T x;  dbias = the column sums of dh

A fixed number of programs runs over contiguous runs of rows, each leaving one partial sum of dbias,
and dweight is summed in fixed pieces: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import (
    cdiv,
    check_like,
    check_wanted,
    collapse_rows,
    multiprocessors,
    on_device,
    sum_partials,
)
from vitkernels.ops.linear_gelu._triton_forward import (
    Operand,
    activate,
    check_linear,
    forward,
    matrix,
    product,
    rows_of,
)


@triton.jit(do_not_specialize=["rows", "inner_rows", "rows_per_program"])
def _dh_kernel(
    dy_ptr, h_ptr, dh_ptr, dbias_ptr, rows, N, inner_rows, rows_per_program, dy_strides, h_strides,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dh = dy * act'(h), contiguous, and partial sums (programs, N) of dbias; either may be None.

    h_ptr is None for the identity. Grid: (ceil(N / BLOCK_N), programs), each a run of
    rows_per_program rows. Limits: rows < 2^31 - BLOCK_R.
    """
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    program = tl.program_id(1)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    dbias = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < last)[:, None] & (column < N)[None, :]
        outer = (row // inner_rows).to(tl.int64)
        inner = row.to(tl.int64) - outer * inner_rows
        offset = (outer * dy_strides[0] + inner * dy_strides[1])[:, None]
        offset += (column.to(tl.int64) * dy_strides[2])[None, :]
        dh = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if h_ptr is not None:
            offset = (outer * h_strides[0] + inner * h_strides[1])[:, None]
            offset += (column.to(tl.int64) * h_strides[2])[None, :]
            h = tl.load(h_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            _, derivative = activate(h, ACTIVATION)
            dh = dh * derivative
        if dh_ptr is not None:
            here = row.to(tl.int64)[:, None] * N + column[None, :]
            tl.store(dh_ptr + here, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            dbias += dh
    if dbias_ptr is not None:
        partial = program.to(tl.int64) * N + column
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=column < N)


def dh_plan(rows: int, N: int, processors: int) -> tuple[int, int, int, int]:
    """(BLOCK_R, BLOCK_N, rows_per_program, programs): 16 elements, 32 bytes, a thread of 4 warps.

    Memory bound, 6 bytes an element in 16 bits: about 8 blocks on each multiprocessor hide it.
    """
    block_r, block_n = 8, 256
    most = max(1, cdiv(8 * processors, cdiv(N, block_n)))
    rows_per_program = cdiv(cdiv(rows, most), block_r) * block_r
    return block_r, block_n, rows_per_program, cdiv(rows, rows_per_program)


def _launch_dh(dy, preactivation, activation, dh, dbias) -> None:
    """Writes dh (contiguous) and dbias, either may be None."""
    N = dy.shape[-1]
    rows = dy.shape[:-1].numel()
    inner_rows, (dy, h), strides = collapse_rows(dy, preactivation)
    block_r, block_n, per_program, programs = dh_plan(rows, N, multiprocessors(dy.device))
    partial = None
    if dbias is not None:
        partial = torch.empty((programs, N), dtype=torch.float32, device=dy.device)
    with on_device(dy):
        _dh_kernel[(cdiv(N, block_n), programs)](
            dy, h, dh, partial, rows, N, inner_rows, per_program, *strides,
            ACTIVATION=activation, BLOCK_R=block_r, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
    if dbias is not None:
        sum_partials(partial, dbias)


def linear_gelu_bwd(dy, x, weight, bias, preactivation, activation, output_mask):
    op = "linear_gelu_bwd"
    check_linear(op, x, weight, bias, activation)
    check_wanted(op, output_mask, {"x": x, "weight": weight, "bias": bias})
    (N, K), lead, dtype = weight.shape, x.shape[:-1], dy.dtype
    check_like(op, "dy", dy, (*lead, N))
    check_like(op, "preactivation", preactivation, (*lead, N), (dtype,))
    gradients = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if m else None
        for t, m in zip((x, weight, bias), output_mask, strict=True)
    ]
    dx, dweight, dbias = gradients
    M = lead.numel()
    if M == 0 or all(g is None for g in gradients):
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return tuple(gradients)
    dh = dy
    if activation:
        if preactivation is None:
            preactivation = torch.empty(dy.shape, dtype=dtype, device=dy.device)
            forward(x, weight, bias, activation, dtype, None, preactivation)
        wide = dx is not None or dweight is not None
        dh = torch.empty(dy.shape, dtype=dtype, device=dy.device) if wide else None
    if activation or dbias is not None:
        saved = preactivation if activation else None
        _launch_dh(dy, saved, activation, dh if activation else None, dbias)
    if dx is not None:
        inner_rows, (a,) = rows_of(dh, sums_rows=False)
        b: Operand = matrix(weight.to(dtype), sums_rows=True)
        product((M, K, N), inner_rows, a, b, dtype, dx)
    if dweight is not None:
        inner_rows, (a, b) = rows_of(dh, x.to(dtype), sums_rows=True)
        product((N, K, M), inner_rows, a, b, dtype, dweight, may_split=True)
    return tuple(gradients)
