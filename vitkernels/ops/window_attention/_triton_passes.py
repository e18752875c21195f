"""Triton backward of larger windows: passes over blocks of queries, of keys, and of the bias.

`_dq_kernel` and `_dkv_kernel` take one block of a window each and recompute the probabilities
against the blocks of the other side; _triton_dbias.py does it once more for the sums of ds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import dot_dtype, stages
from vitkernels.ops.window_attention._triton_dbias import launch_dbias
from vitkernels.ops.window_attention._triton_tiles import (
    LOG2E,
    VARYING,
    add_dot,
    dot_rows,
    expand_bias,
    input_gradient,
    lengths,
    load_bias,
    load_rows,
    locate,
    maps,
    mask_seams,
    probabilities,
    score_factor,
    statistics_offset,
    store_rows,
    token_offsets,
    unit_rows,
    with_dropout,
)


@triton.jit(do_not_specialize=VARYING)
def _dq_kernel(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, bias_ptr, logit_scale_ptr, seed_ptr, dqkv_ptr, delta_ptr,
    heads, rows, columns,
    dout_strides, qkv_strides, out_strides, dqkv_strides, scale, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, BLOCK: tl.constexpr, MAIN: tl.constexpr, BLOCK_LOOP: tl.constexpr,
    TAIL: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """dq and delta of one block of queries; only delta where dqkv_ptr is None.

    Grid: (heads * windows * blocks,). Keys as in the forward.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    WIDTH: tl.constexpr = MAIN + TAIL
    CHECK: tl.constexpr = N % BLOCK != 0
    h = tl.program_id(0) % heads
    item = tl.program_id(0) // heads
    window = item // BLOCKS
    first_row = (item % BLOCKS) * BLOCK
    place = locate(window, (0, 0, rows, columns, rows, columns))
    statistics = statistics_offset(place, heads, h, N)
    i = first_row + tl.arange(0, BLOCK)
    offset = token_offsets(i, place, dout_strides, WINDOW, SHIFT, UNIT)
    dout = load_rows(dout_ptr + h * D, offset, i, N, D, DIM, DOT, CHECK)
    offset = token_offsets(i, place, out_strides, WINDOW, SHIFT, UNIT)
    out = load_rows(out_ptr + h * D, offset, i, N, D, DIM, DOT, CHECK)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + statistics + i, delta, mask=i < N)

    if dqkv_ptr is not None:
        factor = score_factor(logit_scale_ptr, h, scale)
        bias_ptr += h.to(tl.int64) * (BLOCKS * BLOCK * WIDTH)
        q_ptr = qkv_ptr + h * D
        k_ptr = q_ptr + heads * D
        v_ptr = k_ptr + heads * D
        offset = token_offsets(i, place, qkv_strides, WINDOW, SHIFT, UNIT)
        q = load_rows(q_ptr, offset, i, N, D, DIM, DOT, CHECK)
        q_length = None if logit_scale_ptr is None else lengths(q)
        lse = tl.load(lse_ptr + statistics + i, mask=i < N, other=0.0) * LOG2E
        dq = tl.zeros((BLOCK, DIM), tl.float32)
        if MAIN > 0:
            for start in range(0, MAIN, BLOCK_LOOP):
                dq = _add_dq(
                    dq, q, dout, q_length, lse, delta, k_ptr, v_ptr, bias_ptr, seed_ptr, statistics,
                    first_row, start, place, qkv_strides, factor, threshold, keep_scale,
                    WINDOW, SHIFT, D, UNIT, DOT, BLOCK, BLOCK_LOOP, WIDTH, DIM, False,
                )  # fmt: skip
        dq = _add_dq(
            dq, q, dout, q_length, lse, delta, k_ptr, v_ptr, bias_ptr, seed_ptr, statistics,
            first_row, MAIN, place, qkv_strides, factor, threshold, keep_scale,
            WINDOW, SHIFT, D, UNIT, DOT, BLOCK, TAIL, WIDTH, DIM, WIDTH > N,
        )  # fmt: skip
        dq, _ = input_gradient(dq, q, q_length, factor)
        offset = token_offsets(i, place, dqkv_strides, WINDOW, SHIFT, UNIT)
        store_rows(dqkv_ptr + h * D, dq, offset, i, N, D, DIM)


@triton.jit
def _add_dq(
    dq, q, dout, q_length, lse, delta, k_ptr, v_ptr, bias_ptr, seed_ptr, statistics, first_row,
    first_column, place, qkv_strides, factor, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    DIM: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """dq + ds k over COLUMNS keys."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    i = first_row + tl.arange(0, BLOCK)
    j = first_column + tl.arange(0, COLUMNS)
    offset = token_offsets(j, place, qkv_strides, WINDOW, SHIFT, UNIT)
    k = load_rows(k_ptr, offset, j, N, D, DIM, DOT, CHECK)
    v = load_rows(v_ptr, offset, j, N, D, DIM, DOT, CHECK)
    bias = load_bias(bias_ptr, first_row, first_column, BLOCK, COLUMNS, WIDTH)
    k_length = None if q_length is None else lengths(k)
    _, p = probabilities(
        q, k, bias, factor, q_length, k_length, lse[:, None], i, j, place, WINDOW, SHIFT
    )
    _, dp = with_dropout(
        p, dot_rows(dout, v), seed_ptr, statistics, i[:, None], j[None, :], N, threshold, keep_scale
    )
    ds = mask_seams(p * (dp - delta[:, None]), i, j, 0.0, place, WINDOW, SHIFT)
    return add_dot(dq, ds, unit_rows(k, k_length))


@triton.jit(do_not_specialize=VARYING)
def _dkv_kernel(
    dout_ptr, qkv_ptr, lse_ptr, delta_ptr, bias_ptr, logit_scale_ptr, seed_ptr, dqkv_ptr,
    heads, rows, columns,
    dout_strides, qkv_strides, dqkv_strides, scale, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, BLOCK: tl.constexpr, MAIN: tl.constexpr, BLOCK_LOOP: tl.constexpr,
    TAIL: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys; tiles and the bias are transposed, (keys, queries).

    Grid: (heads * windows * blocks,). Queries [0, MAIN) go in a loop, the rest in a tile of TAIL.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    WIDTH: tl.constexpr = MAIN + TAIL
    h = tl.program_id(0) % heads
    item = tl.program_id(0) // heads
    window = item // BLOCKS
    first_row = (item % BLOCKS) * BLOCK
    place = locate(window, (0, 0, rows, columns, rows, columns))
    statistics = statistics_offset(place, heads, h, N)
    factor = score_factor(logit_scale_ptr, h, scale)
    bias_ptr += h.to(tl.int64) * (BLOCKS * BLOCK * WIDTH)
    q_ptr = qkv_ptr + h * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    dout_ptr += h * D
    j = first_row + tl.arange(0, BLOCK)
    offset = token_offsets(j, place, qkv_strides, WINDOW, SHIFT, UNIT)
    k = load_rows(k_ptr, offset, j, N, D, DIM, DOT, N % BLOCK != 0)
    v = load_rows(v_ptr, offset, j, N, D, DIM, DOT, N % BLOCK != 0)
    k_length = None if logit_scale_ptr is None else lengths(k)
    dk = tl.zeros((BLOCK, DIM), tl.float32)
    dv = tl.zeros((BLOCK, DIM), tl.float32)
    if MAIN > 0:
        for start in range(0, MAIN, BLOCK_LOOP):
            dk, dv = _add_dkv(
                dk, dv, k, v, k_length, q_ptr, dout_ptr, lse_ptr, delta_ptr, bias_ptr, seed_ptr,
                statistics, first_row, start, place, qkv_strides, dout_strides, factor, threshold,
                keep_scale, WINDOW, SHIFT, D, UNIT, DOT, BLOCK, BLOCK_LOOP, WIDTH, DIM, False,
            )  # fmt: skip
    dk, dv = _add_dkv(
        dk, dv, k, v, k_length, q_ptr, dout_ptr, lse_ptr, delta_ptr, bias_ptr, seed_ptr,
        statistics, first_row, MAIN, place, qkv_strides, dout_strides, factor, threshold,
        keep_scale, WINDOW, SHIFT, D, UNIT, DOT, BLOCK, TAIL, WIDTH, DIM, WIDTH > N,
    )  # fmt: skip
    offset = token_offsets(j, place, dqkv_strides, WINDOW, SHIFT, UNIT)
    store_rows(dqkv_ptr + (2 * heads + h) * D, dv, offset, j, N, D, DIM)
    if k_length is not None:  # again, because registers are short in between
        k_offset = token_offsets(j, place, qkv_strides, WINDOW, SHIFT, UNIT)
        k = load_rows(k_ptr, k_offset, j, N, D, DIM, DOT, N % BLOCK != 0)
    dk, _ = input_gradient(dk, k, k_length, factor)
    store_rows(dqkv_ptr + (heads + h) * D, dk, offset, j, N, D, DIM)


@triton.jit
def _add_dkv(
    dk, dv, k, v, k_length, q_ptr, dout_ptr, lse_ptr, delta_ptr, bias_ptr, seed_ptr, statistics,
    first_row, first_column, place, qkv_strides, dout_strides, factor, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    DIM: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """(dk + ds^T q, dv + p^T dout) over COLUMNS queries."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    j = first_row + tl.arange(0, BLOCK)
    i = first_column + tl.arange(0, COLUMNS)
    offset = token_offsets(i, place, qkv_strides, WINDOW, SHIFT, UNIT)
    q = load_rows(q_ptr, offset, i, N, D, DIM, DOT, CHECK)
    offset = token_offsets(i, place, dout_strides, WINDOW, SHIFT, UNIT)
    dout = load_rows(dout_ptr, offset, i, N, D, DIM, DOT, CHECK)
    lse = tl.load(lse_ptr + statistics + i, mask=i < N, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + statistics + i, mask=i < N, other=0.0)
    bias = load_bias(bias_ptr, first_row, first_column, BLOCK, COLUMNS, WIDTH)
    q_length = None if k_length is None else lengths(q)
    _, p = probabilities(
        k, q, bias, factor, k_length, q_length, lse[None, :], j, i, place, WINDOW, SHIFT
    )
    dropped, dp = with_dropout(
        p, dot_rows(v, dout), seed_ptr, statistics, i[None, :], j[:, None], N, threshold, keep_scale
    )
    ds = mask_seams(p * (dp - delta[None, :]), j, i, 0.0, place, WINDOW, SHIFT)
    return add_dot(dk, ds, unit_rows(q, q_length)), add_dot(dv, dropped, dout)


# --- launcher -------------------------------------------------------------------------------------


def launch_passes(
    sizes, plan, dout, qkv, out, lse, bias_table, options, scalars, dqkv, dbias_table, dlogit_scale
):  # fmt: skip
    """Writes dqkv, dbias_table and dlogit_scale, each of them unless None."""
    heads, blocks = sizes.heads, plan.blocks(sizes.N)
    bias = expand_bias(bias_table, sizes.window, blocks * plan.block, plan.width)
    (dout, qkv, out, *_), (s_dout, s_qkv, s_out, *s_dqkv), unit = maps(
        dout, qkv, out, *([] if dqkv is None else [dqkv])
    )
    (s_dqkv,) = s_dqkv or [(0, 0, 0)]
    delta = torch.empty_like(lse)
    settings = {
        "WINDOW": sizes.window, "SHIFT": sizes.shift, "D": sizes.D, "UNIT": unit,
        "DOT": dot_dtype(qkv.dtype), "BLOCK": plan.block, "BLOCK_LOOP": plan.block_loop,
        "DIM": plan.dim, "num_warps": plan.num_warps,
        "num_stages": stages(qkv.device, plan.num_stages),
    }  # fmt: skip
    parts = {"MAIN": plan.main, "TAIL": plan.tail}
    grid, counts = (heads * sizes.windows * blocks,), (heads, sizes.rows, sizes.columns)
    _dq_kernel[grid](
        dout, qkv, out, lse, bias, *options, dqkv, delta, *counts, s_dout, s_qkv, s_out, s_dqkv,
        *scalars, **settings, **parts,
    )  # fmt: skip
    if dqkv is not None:
        transposed = expand_bias(bias_table, sizes.window, *bias.shape[2:], transposed=True)
        _dkv_kernel[grid](
            dout, qkv, lse, delta, transposed, *options, dqkv, *counts, s_dout, s_qkv, s_dqkv,
            *scalars, **settings, **parts,
        )  # fmt: skip
    if dbias_table is not None or dlogit_scale is not None:
        launch_dbias(
            sizes, plan, (dout, qkv, lse, delta, bias, *options), (s_dout, s_qkv), scalars,
            settings, dbias_table, dlogit_scale,
        )  # fmt: skip
