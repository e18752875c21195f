"""Triton forward of window attention: roll, partition, bias, mask, softmax and reverse in one pass.

A program takes some windows of one head and finds their tokens in the unshifted map, so that roll
and partition move nothing. Windows to 64 tokens are one tile of scores, whose bias stays in
registers from window to window; larger ones go in blocks of 64 queries, with online softmax over
blocks of keys before a last tile that fits the rest of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import dot_dtype, dropout_scalars, multiprocessors, on_device, stages
from vitkernels.ops.window_attention._triton_plans import (
    forward_plan,
    programs_of_a_head,
    windows_per_program,
)
from vitkernels.ops.window_attention._triton_tiles import (
    LN2,
    VARYING,
    add_dot,
    check_windows,
    dot_rows,
    dropout_factors,
    expand_bias,
    lengths,
    load_bias,
    load_rows,
    locate,
    maps,
    mask_by_bias,
    mask_seams,
    scaled_products,
    score_factor,
    statistics_offset,
    store_rows,
    token_offsets,
    windows_of_a_program,
)


@triton.jit
def _scores(
    q, k, bias, factor, q_length, i, j, place, WINDOW: tl.constexpr, SHIFT: tl.constexpr,
    ONE_TILE: tl.constexpr,
):  # fmt: skip
    k_length = None if q_length is None else lengths(k)
    s = scaled_products(dot_rows(q, k), factor, q_length, k_length) + bias
    return s if ONE_TILE else mask_seams(s, i, j, float("-inf"), place, WINDOW, SHIFT)


@triton.jit
def _weights(p, seed_ptr, statistics, i, j, N: tl.constexpr, threshold, HEADROOM: tl.constexpr):
    """The survivors of dropout times HEADROOM; 1 / (1 - p) waits for the end of the row."""
    p *= HEADROOM
    if seed_ptr is None:
        return p
    else:
        return p * dropout_factors(seed_ptr, statistics, i[:, None], j[None, :], N, threshold, 1.0)


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    qkv_ptr, bias_ptr, logit_scale_ptr, seed_ptr, out_ptr, lse_ptr,
    heads, batch, rows, columns, windows_per_program,
    qkv_strides, out_strides, scale, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, BLOCK: tl.constexpr, MAIN: tl.constexpr, BLOCK_LOOP: tl.constexpr,
    TAIL: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Windows that are one tile: a program takes some of one kind. Larger: a block of queries.

    Grid: (heads * programs of a head,), or (heads * windows * blocks,) of larger ones, whose keys
    [0, MAIN) go in a loop over BLOCK_LOOP, the rest at once in a tile of TAIL.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    WIDTH: tl.constexpr = MAIN + TAIL
    ONE_TILE: tl.constexpr = WIDTH == TAIL and BLOCKS == 1
    # Of 1024 values up to the largest of the dtype, sums stay finite in fp32.
    HEADROOM: tl.constexpr = 1.0 if qkv_ptr.dtype.element_ty == tl.float16 else 2.0**-10
    h = tl.program_id(0) % heads
    group = tl.program_id(0) // heads
    factor = score_factor(logit_scale_ptr, h, scale)
    q_ptr = qkv_ptr + h * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    j_tail = MAIN + tl.arange(0, TAIL)
    if ONE_TILE:
        kind, area, first, last = windows_of_a_program(
            group, batch, rows, columns, windows_per_program, SHIFT
        )
        first_row = 0
        bias_ptr += (kind * heads + h).to(tl.int64) * (BLOCK * WIDTH)
        bias_tile = load_bias(bias_ptr, 0, 0, BLOCK, TAIL, WIDTH)
    else:
        area = (0, 0, rows, columns, rows, columns)
        first = group // BLOCKS
        last = first + 1
        first_row = (group % BLOCKS) * BLOCK
        bias_ptr += h.to(tl.int64) * (BLOCKS * BLOCK * WIDTH)
    i = first_row + tl.arange(0, BLOCK)
    for window in range(first, last):
        place = locate(window, area)
        statistics = statistics_offset(place, heads, h, N)
        q_offset = token_offsets(i, place, qkv_strides, WINDOW, SHIFT, UNIT)
        q = load_rows(q_ptr, q_offset, i, N, D, DIM, DOT, N % BLOCK != 0)
        q_length = None if logit_scale_ptr is None else lengths(q)
        if MAIN > 0:
            top = tl.full((BLOCK,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK,), tl.float32)
            out = tl.zeros((BLOCK, DIM), tl.float32)
            for start in range(0, MAIN, BLOCK_LOOP):
                j = start + tl.arange(0, BLOCK_LOOP)
                offset = token_offsets(j, place, qkv_strides, WINDOW, SHIFT, UNIT)
                k = load_rows(k_ptr, offset, j, N, D, DIM, DOT, False)
                bias = load_bias(bias_ptr, first_row, start, BLOCK, BLOCK_LOOP, WIDTH)
                s = _scores(q, k, bias, factor, q_length, i, j, place, WINDOW, SHIFT, False)
                new_top = tl.maximum(top, tl.max(s, 1))
                # A row may have met no key of its region yet.
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
                rescale = tl.exp2(top - base)
                p = tl.exp2(s - base[:, None])
                top = new_top
                total = total * rescale + tl.sum(p, 1)
                p = _weights(p, seed_ptr, statistics, i, j, N, threshold, HEADROOM)
                v = load_rows(v_ptr, offset, j, N, D, DIM, DOT, False)
                out = add_dot(out * rescale[:, None], p, v)

        offset = token_offsets(j_tail, place, qkv_strides, WINDOW, SHIFT, UNIT)
        k = load_rows(k_ptr, offset, j_tail, N, D, DIM, DOT, WIDTH > N)
        v = load_rows(v_ptr, offset, j_tail, N, D, DIM, DOT, WIDTH > N)
        if not ONE_TILE:
            bias_tile = load_bias(bias_ptr, first_row, MAIN, BLOCK, TAIL, WIDTH)
        s = _scores(q, k, bias_tile, factor, q_length, i, j_tail, place, WINDOW, SHIFT, ONE_TILE)
        if MAIN > 0:
            new_top = tl.maximum(top, tl.max(s, 1))
            rescale = tl.exp2(top - new_top)
            total *= rescale
            out *= rescale[:, None]
        else:
            new_top = tl.max(s, 1)
            total = tl.zeros((BLOCK,), tl.float32)
            out = tl.zeros((BLOCK, DIM), tl.float32)
        p = tl.exp2(s - new_top[:, None])
        if ONE_TILE:
            p = mask_by_bias(p, bias_tile, 0.0, new_top, kind, SHIFT)
        total += tl.sum(p, 1)
        p = _weights(p, seed_ptr, statistics, i, j_tail, N, threshold, HEADROOM)
        out = add_dot(out, p, v)

        out *= (keep_scale / HEADROOM / total)[:, None]
        out_offset = token_offsets(i, place, out_strides, WINDOW, SHIFT, UNIT)
        store_rows(out_ptr + h * D, out, out_offset, i, N, D, DIM)
        tl.store(lse_ptr + statistics + i, (new_top + tl.log2(total)) * LN2, mask=i < N)


def window_attention_fwd(
    qkv, bias_table, logit_scale, seed, Wh, Ww, shift_h, shift_w, num_heads, scale, dropout_p
):
    sizes = check_windows(
        "window_attention_fwd", qkv, bias_table, logit_scale, seed, Wh, Ww, shift_h, shift_w,
        num_heads, dropout_p,
    )  # fmt: skip
    N, heads = sizes.N, sizes.heads
    out = torch.empty((*qkv.shape[:3], heads * sizes.D), dtype=qkv.dtype, device=qkv.device)
    statistics = (sizes.B, sizes.rows * sizes.columns, heads, N)
    lse = torch.empty(statistics, dtype=torch.float32, device=qkv.device)
    if sizes.B == 0:
        return out, lse
    plan = forward_plan(N, sizes.D, qkv.dtype)
    per_program, programs = 1, sizes.windows * plan.blocks(N)
    if plan.holds(N):
        processors = multiprocessors(qkv.device)
        per_program = windows_per_program(sizes.windows, heads, processors, backward=False)
        programs = programs_of_a_head(*sizes.map_of_windows, sizes.shift, per_program)
    bias = expand_bias(
        bias_table, sizes.window, plan.blocks(N) * plan.block, plan.width,
        shift=sizes.shift if plan.holds(N) else (0, 0),
    )  # fmt: skip
    (qkv, _), strides, unit = maps(qkv, out)
    with on_device(qkv):
        _forward_kernel[(heads * programs,)](
            qkv, bias, None if logit_scale is None else logit_scale.contiguous(),
            seed if dropout_p > 0 else None, out, lse, heads, sizes.B, sizes.rows,
            sizes.columns, per_program, *strides, scale, *dropout_scalars(dropout_p),
            WINDOW=sizes.window, SHIFT=sizes.shift, D=sizes.D, UNIT=unit,
            DOT=dot_dtype(qkv.dtype), BLOCK=plan.block, MAIN=plan.main,
            BLOCK_LOOP=plan.block_loop, TAIL=plan.tail, DIM=plan.dim,
            num_warps=plan.num_warps, num_stages=stages(qkv.device, plan.num_stages),
        )  # fmt: skip
    return out, lse
