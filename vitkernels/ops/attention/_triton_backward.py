"""Triton backward of attention, deterministic and without atomics: three kernels that recompute the probabilities.

    delta = rowsum(dout * out);  p = exp(s - lse);  ds = p * (dout v^T - delta)
    _dq_kernel     one block of queries:  dq = scale * ds k, and delta for the others
    _dkv_kernel    one block of keys:     dk = scale * ds^T q,  dv = p^T dout
    _dbias_kernel  one tile of the bias:  dbias = the sum of ds over the batch items and heads that share it

Up to WHOLE_ROW rows on the other side, these stay in shared memory while a program walks over the blocks of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vitkernels._triton import INTERPRETED, dropout_scalars, multiprocessors, on_device
from vitkernels.ops.attention._triton_forward import WHOLE_ROW, load_parts, unpack
from vitkernels.ops.attention._triton_tiles import (
    LOG2E,
    VARYING,
    add_dot,
    bias_pointer,
    bias_view,
    dot_dtype,
    dot_rows,
    finish_scores,
    finite_or_zero,
    head_pointer,
    heads,
    load_tiles,
    mask_pointer,
    mask_view,
    probability_gradients,
    scale_tiles,
    split_columns,
    split_dims,
    store_tiles,
    zero_tiles,
)


@triton.jit
def _load_lse(lse_ptr, row, Nq):
    """In units of log 2, finite: a fully masked row has probabilities 0 whatever is subtracted."""
    return finite_or_zero(tl.load(lse_ptr + row, mask=row < Nq, other=0.0)) * LOG2E


@triton.jit
def _score_gradients(
    left, right, dleft, dright, lse, delta, head, i, j, bias_ptr, mask_ptr, seed_ptr, bias_strides, Nq, Nk,
    scale, threshold, keep_scale, BIAS_IS_BOOL: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """(dropped p, ds) of one tile: left = q, right = k, dleft = dout, dright = v, or the other way round, transposed."""
    s = finish_scores(
        dot_rows(left, right), i, j, bias_ptr, mask_ptr, bias_strides, Nq, Nk, scale, BIAS_IS_BOOL, PADDED
    )
    dp = dot_rows(dleft, dright)
    return probability_gradients(s, lse, dp, delta, head, i, j, seed_ptr, Nq, Nk, threshold, keep_scale)


@triton.jit(do_not_specialize=VARYING)
def _dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, mask_ptr, seed_ptr, dq_ptr, delta_ptr,
    H, Nq, Nk, groups, blocks_per_program, main,
    dout_strides, q_strides, k_strides, v_strides, out_strides, dq_strides, bias_strides, scale, threshold, keep_scale,
    D: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, BIAS_IS_BOOL: tl.constexpr, LOOP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_LOOP: tl.constexpr, PARTS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """dq and delta; only delta where dq_ptr is None. Grid: (groups * H * B,), as in the forward.

    Keys [0, main) go in a loop over BLOCK_LOOP (only if LOOP), the rest in the static tiles PARTS.
    """
    head = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    b = head // H
    h = head % H
    dout_ptr = head_pointer(dout_ptr, b, h, dout_strides, UNIT)
    out_ptr = head_pointer(out_ptr, b, h, out_strides, UNIT)
    q_ptr = head_pointer(q_ptr, b, h, q_strides, UNIT)
    k_ptr = head_pointer(k_ptr, b, h, k_strides, UNIT)
    v_ptr = head_pointer(v_ptr, b, h, v_strides, UNIT)
    bias_ptr = bias_pointer(bias_ptr, b, h, bias_strides)
    mask_ptr = mask_pointer(mask_ptr, b, Nk)
    lse_ptr += head.to(tl.int64) * Nq
    delta_ptr += head.to(tl.int64) * Nq
    first_block = group * blocks_per_program
    last_block = tl.minimum(first_block + blocks_per_program, tl.cdiv(Nq, BLOCK))

    if dq_ptr is not None:
        dq_ptr = head_pointer(dq_ptr, b, h, dq_strides, UNIT)
        if not LOOP:
            k_rest = load_parts(k_ptr, 0, Nk, k_strides, D, PARTS, DIMS, UNIT, DOT)
            v_rest = load_parts(v_ptr, 0, Nk, v_strides, D, PARTS, DIMS, UNIT, DOT)

    for block in range(first_block, last_block):
        row = block * BLOCK + tl.arange(0, BLOCK)
        i = row[:, None]
        dout = load_tiles(dout_ptr, row, Nq, dout_strides, D, DIMS, UNIT, DOT)
        out = load_tiles(out_ptr, row, Nq, out_strides, D, DIMS, UNIT, DOT)
        delta = tl.zeros((BLOCK,), tl.float32)
        for n in tl.static_range(len(DIMS)):
            delta += tl.sum(dout[n].to(tl.float32) * out[n].to(tl.float32), 1)
        tl.store(delta_ptr + row, delta, mask=row < Nq)

        if dq_ptr is not None:
            q = load_tiles(q_ptr, row, Nq, q_strides, D, DIMS, UNIT, DOT)
            lse = _load_lse(lse_ptr, row, Nq)
            dq = zero_tiles(BLOCK, DIMS)
            if LOOP:
                for start in range(0, main, BLOCK_LOOP):
                    column = start + tl.arange(0, BLOCK_LOOP)
                    k = load_tiles(k_ptr, column, Nk, k_strides, D, DIMS, UNIT, DOT)
                    v = load_tiles(v_ptr, column, Nk, v_strides, D, DIMS, UNIT, DOT)
                    _, ds = _score_gradients(
                        q, k, dout, v, lse[:, None], delta[:, None], head, i, column[None, :], bias_ptr, mask_ptr,
                        seed_ptr, bias_strides, Nq, Nk, scale, threshold, keep_scale, BIAS_IS_BOOL, False,
                    )  # fmt: skip
                    dq = add_dot(dq, ds, k)
                k_rest = load_parts(k_ptr, main, Nk, k_strides, D, PARTS, DIMS, UNIT, DOT)
                v_rest = load_parts(v_ptr, main, Nk, v_strides, D, PARTS, DIMS, UNIT, DOT)
            start = main
            for n in tl.static_range(len(PARTS)):
                j = (start + tl.arange(0, PARTS[n]))[None, :]
                _, ds = _score_gradients(
                    q, k_rest[n], dout, v_rest[n], lse[:, None], delta[:, None], head, i, j, bias_ptr, mask_ptr,
                    seed_ptr, bias_strides, Nq, Nk, scale, threshold, keep_scale, BIAS_IS_BOOL, n == len(PARTS) - 1,
                )  # fmt: skip
                dq = add_dot(dq, ds, k_rest[n])
                start += PARTS[n]
            store_tiles(dq_ptr, scale_tiles(dq, scale), row, Nq, dq_strides, D, DIMS, UNIT)


@triton.jit(do_not_specialize=VARYING)
def _dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, bias_ptr, mask_ptr, seed_ptr, dk_ptr, dv_ptr,
    H, Nq, Nk, groups, blocks_per_program, main,
    dout_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides, bias_strides, scale, threshold, keep_scale,
    D: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, BIAS_IS_BOOL: tl.constexpr, LOOP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_LOOP: tl.constexpr, PARTS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """dk and dv, either may be None; tiles are transposed, (keys, queries). Grid: (groups * H * B,).

    Queries [0, main) go in a loop over BLOCK_LOOP (only if LOOP), the rest in the static tiles PARTS.
    """
    head = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    b = head // H
    h = head % H
    dout_ptr = head_pointer(dout_ptr, b, h, dout_strides, UNIT)
    q_ptr = head_pointer(q_ptr, b, h, q_strides, UNIT)
    k_ptr = head_pointer(k_ptr, b, h, k_strides, UNIT)
    v_ptr = head_pointer(v_ptr, b, h, v_strides, UNIT)
    bias_ptr = bias_pointer(bias_ptr, b, h, bias_strides)
    mask_ptr = mask_pointer(mask_ptr, b, Nk)
    lse_ptr += head.to(tl.int64) * Nq
    delta_ptr += head.to(tl.int64) * Nq

    if not LOOP:
        q_rest = load_parts(q_ptr, 0, Nq, q_strides, D, PARTS, DIMS, UNIT, DOT)
        dout_rest = load_parts(dout_ptr, 0, Nq, dout_strides, D, PARTS, DIMS, UNIT, DOT)
    first_block = group * blocks_per_program
    last_block = tl.minimum(first_block + blocks_per_program, tl.cdiv(Nk, BLOCK))
    for block in range(first_block, last_block):
        column = block * BLOCK + tl.arange(0, BLOCK)
        j = column[:, None]
        k = load_tiles(k_ptr, column, Nk, k_strides, D, DIMS, UNIT, DOT)
        v = load_tiles(v_ptr, column, Nk, v_strides, D, DIMS, UNIT, DOT)
        dk = zero_tiles(BLOCK, DIMS)
        dv = zero_tiles(BLOCK, DIMS)
        if LOOP:
            for start in range(0, main, BLOCK_LOOP):
                row = start + tl.arange(0, BLOCK_LOOP)
                q = load_tiles(q_ptr, row, Nq, q_strides, D, DIMS, UNIT, DOT)
                dout = load_tiles(dout_ptr, row, Nq, dout_strides, D, DIMS, UNIT, DOT)
                lse = _load_lse(lse_ptr, row, Nq)
                delta = tl.load(delta_ptr + row, mask=row < Nq, other=0.0)
                p, ds = _score_gradients(
                    k, q, v, dout, lse[None, :], delta[None, :], head, row[None, :], j, bias_ptr, mask_ptr,
                    seed_ptr, bias_strides, Nq, Nk, scale, threshold, keep_scale, BIAS_IS_BOOL, False,
                )  # fmt: skip
                if dv_ptr is not None:
                    dv = add_dot(dv, p, dout)
                if dk_ptr is not None:
                    dk = add_dot(dk, ds, q)
            q_rest = load_parts(q_ptr, main, Nq, q_strides, D, PARTS, DIMS, UNIT, DOT)
            dout_rest = load_parts(dout_ptr, main, Nq, dout_strides, D, PARTS, DIMS, UNIT, DOT)
        start = main
        for n in tl.static_range(len(PARTS)):
            row = start + tl.arange(0, PARTS[n])
            lse = _load_lse(lse_ptr, row, Nq)
            delta = tl.load(delta_ptr + row, mask=row < Nq, other=0.0)
            p, ds = _score_gradients(
                k, q_rest[n], v, dout_rest[n], lse[None, :], delta[None, :], head, row[None, :], j, bias_ptr, mask_ptr,
                seed_ptr, bias_strides, Nq, Nk, scale, threshold, keep_scale, BIAS_IS_BOOL, False,
            )  # fmt: skip
            if dv_ptr is not None:
                dv = add_dot(dv, p, dout_rest[n])
            if dk_ptr is not None:
                dk = add_dot(dk, ds, q_rest[n])
            start += PARTS[n]
        if dv_ptr is not None:
            store_tiles(head_pointer(dv_ptr, b, h, dv_strides, UNIT), dv, column, Nk, dv_strides, D, DIMS, UNIT)
        if dk_ptr is not None:
            dk = scale_tiles(dk, scale)
            store_tiles(head_pointer(dk_ptr, b, h, dk_strides, UNIT), dk, column, Nk, dk_strides, D, DIMS, UNIT)


@triton.jit(do_not_specialize=VARYING)
def _dbias_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, bias_ptr, mask_ptr, seed_ptr, partial_ptr,
    H, Nq, Nk, bias_batch, bias_heads, shared_heads, items, items_per_program, rows, columns,
    dout_strides, q_strides, k_strides, v_strides, bias_strides, scale, threshold, keep_scale,
    D: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """One tile of partial (splits, bias_batch, bias_heads, rows, columns), fp32 or the bias's dtype.

    Grid: (column blocks, row blocks, splits * bias_batch * bias_heads). The `items` batch items and heads that share one
    bias are cut into runs, one per split. SUM_ROWS / SUM_COLUMNS: the bias is broadcast over queries / keys, and one
    sum per block is left for the host to add.
    """
    slot = tl.program_id(2) % (bias_batch * bias_heads)
    split = tl.program_id(2) // (bias_batch * bias_heads)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * items_per_program
    for item in range(first, tl.minimum(first + items_per_program, items)):
        b = slot // bias_heads + item // shared_heads
        h = slot % bias_heads + item % shared_heads
        head = b * H + h
        q = load_tiles(head_pointer(q_ptr, b, h, q_strides, UNIT), row, Nq, q_strides, D, DIMS, UNIT, DOT)
        k = load_tiles(head_pointer(k_ptr, b, h, k_strides, UNIT), column, Nk, k_strides, D, DIMS, UNIT, DOT)
        v = load_tiles(head_pointer(v_ptr, b, h, v_strides, UNIT), column, Nk, v_strides, D, DIMS, UNIT, DOT)
        dout = load_tiles(head_pointer(dout_ptr, b, h, dout_strides, UNIT), row, Nq, dout_strides, D, DIMS, UNIT, DOT)
        statistics = head.to(tl.int64) * Nq
        lse = _load_lse(lse_ptr + statistics, row, Nq)
        delta = tl.load(delta_ptr + statistics + row, mask=row < Nq, other=0.0)
        _, ds = _score_gradients(
            q, k, dout, v, lse[:, None], delta[:, None], head, row[:, None], column[None, :],
            bias_pointer(bias_ptr, b, h, bias_strides), mask_pointer(mask_ptr, b, Nk), seed_ptr, bias_strides, Nq, Nk,
            scale, threshold, keep_scale, False, True,
        )  # fmt: skip
        total += ds
    if SUM_ROWS:
        total = tl.sum(total, 0)[None, :]
        row = tl.program_id(1) + tl.arange(0, 1)
    if SUM_COLUMNS:
        total = tl.sum(total, 1)[:, None]
        column = tl.program_id(0) + tl.arange(0, 1)
    partial_ptr += tl.program_id(2).to(tl.int64) * rows * columns
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    pointers = partial_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(pointers, total.to(partial_ptr.dtype.element_ty), mask=mask)


# --- launch settings: by registers and spills on sm_90 (tests/test_triton_compile.py), not timed yet ---------------


class BackwardPlan(NamedTuple):
    main: int  # rows of the other side taken by the loop
    parts: tuple[int, ...]  # the rest
    dims: tuple[int, ...]
    block: int  # rows of this side
    block_loop: int
    num_warps: int
    num_stages: int


def backward_plan(N: int, D: int, dtype: torch.dtype) -> BackwardPlan:
    """For dq with N = Nk, for dk and dv with N = Nq."""
    dims = split_dims(D)
    if dtype == torch.float32 and not INTERPRETED:
        block, block_loop, num_warps, num_stages = 32, 32, 8, 1
    elif sum(dims) <= 64 and N <= WHOLE_ROW:
        return BackwardPlan(0, split_columns(N, 64), dims, 64, 64, 4, 1)
    else:
        block, block_loop, num_warps, num_stages = 64, 64, 4 if sum(dims) <= 64 else 8, 2
    main = (N - 1) // block_loop * block_loop
    return BackwardPlan(main, split_columns(N - main, block_loop), dims, block, block_loop, num_warps, num_stages)


def dbias_splits(tiles: int, items: int, processors: int) -> int:
    """How many programs share the sum of one tile of the bias: enough to fill the machine, at most 16 partial sums."""
    return max(1, min(items, 16, triton.cdiv(4 * processors, max(1, tiles))))


# --- launchers -----------------------------------------------------------------------------------


def _grid(plan: BackwardPlan, rows: int, B: int, H: int, processors: int) -> tuple[int, int]:
    """(groups, blocks_per_program): one program walks over all blocks of a head unless that leaves processors idle."""
    blocks = triton.cdiv(rows, plan.block)
    fill = max(1, 2 * processors // max(1, B * H))
    blocks_per_program = 1 if plan.main else triton.cdiv(blocks, min(blocks, fill))
    return triton.cdiv(blocks, blocks_per_program), blocks_per_program


def launch_backward(
    dout, q, k, v, out, lse, bias, key_padding_mask, seed, scale, dropout_p, dq, dk, dv, need_dbias
):  # fmt: skip
    """Writes dq, dk, dv (views of any strides, or None) and returns dbias."""
    B, Nq, H, D = q.shape
    Nk = k.shape[1]
    processors = multiprocessors(q.device)
    some = [g for g in (dq, dk, dv) if g is not None]
    (dout, q, k, v, out, *_), (s_dout, s_q, s_k, s_v, s_out, *s_some), unit = heads(dout, q, k, v, out, *some)
    s_dq, s_dk, s_dv = (s_some.pop(0) if g is not None else (0, 0, 0) for g in (dq, dk, dv))
    bias_in, bias_strides, bias_is_bool = bias_view(bias, B, H, Nq, Nk)
    masks = (bias_in, mask_view(key_padding_mask), seed if dropout_p > 0 else None)
    scalars = (bias_strides, scale, *dropout_scalars(dropout_p))
    common = {"D": D, "UNIT": unit, "DOT": dot_dtype(q.dtype)}
    delta = torch.empty_like(lse)
    with on_device(q):
        plan = backward_plan(Nk, D, q.dtype)
        groups, per_program = _grid(plan, Nq, B, H, processors)
        _dq_kernel[(groups * H * B,)](
            dout, q, k, v, out, lse, *masks, dq, delta, H, Nq, Nk, groups, per_program, plan.main,
            s_dout, s_q, s_k, s_v, s_out, s_dq, *scalars, **common, **_tiles(plan), BIAS_IS_BOOL=bias_is_bool,
        )  # fmt: skip
        if dk is not None or dv is not None:
            plan = backward_plan(Nq, D, q.dtype)
            groups, per_program = _grid(plan, Nk, B, H, processors)
            _dkv_kernel[(groups * H * B,)](
                dout, q, k, v, lse, delta, *masks, dk, dv, H, Nq, Nk, groups, per_program, plan.main,
                s_dout, s_q, s_k, s_v, s_dk, s_dv, *scalars, **common, **_tiles(plan), BIAS_IS_BOOL=bias_is_bool,
            )  # fmt: skip
        if not need_dbias:
            return None
        return _launch_dbias(
            (dout, q, k, v, lse, delta, *masks), (s_dout, s_q, s_k, s_v), scalars, common, bias, (B, H, Nq, Nk), processors
        )


def _tiles(plan: BackwardPlan) -> dict:
    return {
        "LOOP": plan.main > 0,
        "BLOCK": plan.block,
        "BLOCK_LOOP": plan.block_loop,
        "PARTS": plan.parts,
        "DIMS": plan.dims,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }


def _launch_dbias(pointers, strides, scalars, common, bias, full, processors):
    B, H, Nq, Nk = full
    plan = backward_plan(WHOLE_ROW + 1, common["D"], pointers[1].dtype)
    block_m, block_n = plan.block, plan.block_loop
    blocks = (triton.cdiv(Nk, block_n), triton.cdiv(Nq, block_m))
    bias_batch, bias_heads = bias.shape[:2]
    shared_batch, shared_heads = B if bias_batch != B else 1, H if bias_heads != H else 1
    items = shared_batch * shared_heads
    splits = dbias_splits(blocks[0] * blocks[1] * bias_batch * bias_heads, items, processors)
    sum_rows, sum_columns = bias.shape[2] != Nq, bias.shape[3] != Nk
    rows, columns = blocks[1] if sum_rows else Nq, blocks[0] if sum_columns else Nk
    direct = splits == 1 and not sum_rows and not sum_columns
    partial = torch.empty(
        (splits, bias_batch, bias_heads, rows, columns),
        dtype=bias.dtype if direct else torch.float32,
        device=bias.device,
    )
    _dbias_kernel[(*blocks, splits * bias_batch * bias_heads)](
        *pointers, partial, H, Nq, Nk, bias_batch, bias_heads, shared_heads, items, triton.cdiv(items, splits),
        rows, columns, *strides, *scalars, **common, SUM_ROWS=sum_rows, SUM_COLUMNS=sum_columns,
        BLOCK_M=block_m, BLOCK_N=block_n, DIMS=plan.dims, num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    if direct:
        return partial[0]
    dbias = partial.sum(0)
    if sum_rows:
        dbias = dbias.sum(2, keepdim=True)
    if sum_columns:
        dbias = dbias.sum(3, keepdim=True)
    return dbias.to(bias.dtype)


def attention_bwd(dout, q, k, v, out, lse, bias, key_padding_mask, seed, scale, dropout_p, output_mask):
    dq, dk, dv = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if wanted else None
        for t, wanted in zip((q, k, v), output_mask)
    )
    dbias = launch_backward(
        dout, q, k, v, out, lse, bias, key_padding_mask, seed, scale, dropout_p, dq, dk, dv, output_mask[3]
    )  # fmt: skip
    return dq, dk, dv, dbias


def attention_qkvpacked_bwd(
    dout, qkv, num_heads, out, lse, bias, key_padding_mask, seed, scale, dropout_p, output_mask
):  # fmt: skip
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if output_mask[0] else None
    gradients = (None, None, None) if dqkv is None else unpack(dqkv, 3, num_heads)
    (dout,), (out,) = unpack(dout, 1, num_heads), unpack(out, 1, num_heads)
    dbias = launch_backward(
        dout, *unpack(qkv, 3, num_heads), out, lse, bias, key_padding_mask, seed, scale, dropout_p, *gradients,
        output_mask[1],
    )  # fmt: skip
    return dqkv, dbias
