"""Triton gradient of the attention bias: ds summed over the batch items and heads that share it.

A program owns one tile of the bias and loops over those items, so nothing of size B * H * Nq * Nk
is stored unless the bias itself has that size. A bias shared by many items is cut into at most 16
partial sums, added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import cdiv, stages
from vitkernels.ops.attention._triton_plans import dbias_splits
from vitkernels.ops.attention._triton_tiles import (
    VARYING,
    bias_pointer,
    head_pointer,
    load_lse,
    load_tiles,
    score_gradients,
)


@triton.jit(do_not_specialize=VARYING)
def _dbias_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, bias_ptr, mask_ptr, seed_ptr, partial_ptr,
    H, Nq, Nk, bias_batch, bias_heads, shared_heads, items, items_per_program, rows, columns,
    dout_strides, q_strides, k_strides, v_strides, bias_strides, scale, threshold, keep_scale,
    D: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, SUM_ROWS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """One tile of partial (splits, bias_batch, bias_heads, rows, columns), any dtype.

    Grid: (splits * bias_batch * bias_heads, row blocks, column blocks). The `items` batch items and
    heads that share one bias are cut into runs, one per split. SUM_ROWS / SUM_COLUMNS: the bias is
    broadcast over queries / keys, and one sum per block is left for the host to add.
    Limits: 65535 row blocks and as many column blocks, 4 million tokens.
    """
    slot = tl.program_id(0) % (bias_batch * bias_heads)
    split = tl.program_id(0) // (bias_batch * bias_heads)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * items_per_program
    for item in range(first, tl.minimum(first + items_per_program, items)):
        b = slot // bias_heads + item // shared_heads
        h = slot % bias_heads + item % shared_heads
        head = b * H + h
        q_head = head_pointer(q_ptr, b, h, q_strides, UNIT)
        k_head = head_pointer(k_ptr, b, h, k_strides, UNIT)
        v_head = head_pointer(v_ptr, b, h, v_strides, UNIT)
        dout_head = head_pointer(dout_ptr, b, h, dout_strides, UNIT)
        q = load_tiles(q_head, row, Nq, q_strides, D, DIMS, UNIT, DOT, True)
        k = load_tiles(k_head, column, Nk, k_strides, D, DIMS, UNIT, DOT, True)
        v = load_tiles(v_head, column, Nk, v_strides, D, DIMS, UNIT, DOT, True)
        dout = load_tiles(dout_head, row, Nq, dout_strides, D, DIMS, UNIT, DOT, True)
        mask_head = mask_ptr
        if mask_ptr is not None:
            mask_head += b.to(tl.int64) * Nk
        statistics = head.to(tl.int64) * Nq
        lse = load_lse(lse_ptr + statistics, row, Nq)
        delta = tl.load(delta_ptr + statistics + row, mask=row < Nq, other=0.0)
        _, ds = score_gradients(
            q, k, dout, v, lse[:, None], delta[:, None], head, row[:, None], column[None, :],
            bias_pointer(bias_ptr, b, h, bias_strides), mask_head, seed_ptr,
            bias_strides, Nq, Nk, scale, threshold, keep_scale, False, True,
        )  # fmt: skip
        total += ds
    if SUM_ROWS:
        total = tl.sum(total, 0)[None, :]
        row = tl.program_id(1) + tl.arange(0, 1)
    if SUM_COLUMNS:
        total = tl.sum(total, 1)[:, None]
        column = tl.program_id(2) + tl.arange(0, 1)
    partial_ptr += tl.program_id(0).to(tl.int64) * rows * columns
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    pointers = partial_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(pointers, total.to(partial_ptr.dtype.element_ty), mask=mask)


def launch_dbias(pointers, strides, scalars, common, bias, full, processors, plan):
    """dbias of the shape and dtype of bias; full = (B, H, Nq, Nk), plan for blocks of Nq rows."""
    B, H, Nq, Nk = full
    block_m, block_n = plan.block, plan.block_loop
    blocks = (cdiv(Nq, block_m), cdiv(Nk, block_n))
    bias_batch, bias_heads = bias.shape[:2]
    shared_batch, shared_heads = B if bias_batch != B else 1, H if bias_heads != H else 1
    items = shared_batch * shared_heads
    splits = dbias_splits(blocks[0] * blocks[1] * bias_batch * bias_heads, items, processors)
    sum_rows, sum_columns = bias.shape[2] != Nq, bias.shape[3] != Nk
    rows, columns = blocks[0] if sum_rows else Nq, blocks[1] if sum_columns else Nk
    direct = splits == 1 and not sum_rows and not sum_columns
    partial = torch.empty(
        (splits, bias_batch, bias_heads, rows, columns),
        dtype=bias.dtype if direct else torch.float32,
        device=bias.device,
    )
    _dbias_kernel[(splits * bias_batch * bias_heads, *blocks)](
        *pointers, partial, H, Nq, Nk, bias_batch, bias_heads, shared_heads, items,
        cdiv(items, splits), rows, columns, *strides, *scalars, **common,
        SUM_ROWS=sum_rows, SUM_COLUMNS=sum_columns, BLOCK_M=block_m, BLOCK_N=block_n,
        DIMS=plan.dims, num_warps=plan.num_warps, num_stages=stages(bias.device, plan.num_stages),
    )  # fmt: skip
    if direct:
        return partial[0]
    dbias = partial.sum(0)
    if sum_rows:
        dbias = dbias.sum(2, keepdim=True)
    if sum_columns:
        dbias = dbias.sum(3, keepdim=True)
    return dbias.to(bias.dtype)
