"""Triton gradients of the bias table and of logit_scale: sums over windows, in a fixed order.

First every program adds up ds of its windows; then the partial sums are added; last an entry of the
table gathers the pairs of tokens that it stands for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import cdiv, multiprocessors, on_device, power_of_two, sum_partials
from vitkernels.ops.window_attention._triton_plans import dbias_splits
from vitkernels.ops.window_attention._triton_tiles import (
    LN2,
    LOG2E,
    VARYING,
    dot_rows,
    follows_logit_scale,
    lengths,
    load_rows,
    locate,
    mask_seams,
    probabilities,
    score_factor,
    statistics_offset,
    token_offsets,
    with_dropout,
)


@triton.jit(do_not_specialize=VARYING)
def _dbias_kernel(
    dout_ptr, qkv_ptr, lse_ptr, delta_ptr, bias_ptr, logit_scale_ptr, seed_ptr, dbias_ptr,
    dlogit_scale_ptr,
    heads, rows, columns, windows, windows_per_program,
    dout_strides, qkv_strides, scale, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LOOP: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One tile of dbias (splits, heads, HEIGHT, WIDTH), and its share of dlogit_scale
    (splits * tiles, heads); either may be None.

    Grid: (heads * tiles * splits,), tiles of BLOCK queries and BLOCK_LOOP keys.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    TILES_J: tl.constexpr = (WIDTH + BLOCK_LOOP - 1) // BLOCK_LOOP
    TILES: tl.constexpr = (HEIGHT // BLOCK) * TILES_J
    h = tl.program_id(0) % heads
    item = tl.program_id(0) // heads
    split = item // TILES
    first_row = (item % TILES) // TILES_J * BLOCK
    first_column = (item % TILES) % TILES_J * BLOCK_LOOP
    i = first_row + tl.arange(0, BLOCK)
    j = first_column + tl.arange(0, BLOCK_LOOP)
    here = i[:, None] * WIDTH + j[None, :]
    inside = (j < WIDTH)[None, :]
    bias_ptr += h.to(tl.int64) * (HEIGHT * WIDTH)
    bias = tl.load(bias_ptr + here, mask=inside, other=float("-inf"))
    factor = score_factor(logit_scale_ptr, h, scale)
    dbias = tl.zeros((BLOCK, BLOCK_LOOP), tl.float32)
    dlogit_scale = tl.zeros((BLOCK,), tl.float32)
    q_ptr = qkv_ptr + h * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    first = split * windows_per_program
    for window in range(first, tl.minimum(first + windows_per_program, windows)):
        place = locate(window, (0, 0, rows, columns, rows, columns))
        statistics = statistics_offset(place, heads, h, N)
        offset = token_offsets(i, place, qkv_strides, WINDOW, SHIFT, UNIT)
        q = load_rows(q_ptr, offset, i, N, D, DIM, DOT, True)
        offset = token_offsets(j, place, qkv_strides, WINDOW, SHIFT, UNIT)
        k = load_rows(k_ptr, offset, j, N, D, DIM, DOT, True)
        v = load_rows(v_ptr, offset, j, N, D, DIM, DOT, True)
        offset = token_offsets(i, place, dout_strides, WINDOW, SHIFT, UNIT)
        dout = load_rows(dout_ptr + h * D, offset, i, N, D, DIM, DOT, True)
        lse = tl.load(lse_ptr + statistics + i, mask=i < N, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + statistics + i, mask=i < N, other=0.0)
        q_length = None if logit_scale_ptr is None else lengths(q)
        k_length = None if logit_scale_ptr is None else lengths(k)
        products, p = probabilities(
            q, k, bias, factor, q_length, k_length, lse[:, None], i, j, place, WINDOW, SHIFT
        )
        _, dp = with_dropout(
            p, dot_rows(dout, v), seed_ptr, statistics, i[:, None], j[None, :], N, threshold,
            keep_scale,
        )  # fmt: skip
        ds = mask_seams(p * (dp - delta[:, None]), i, j, 0.0, place, WINDOW, SHIFT)
        if dbias_ptr is not None:
            dbias += ds
        if dlogit_scale_ptr is not None:
            dlogit_scale += tl.sum(tl.where(ds == 0.0, 0.0, ds * products), 1)
    if dbias_ptr is not None:
        dbias_ptr += (split.to(tl.int64) * heads + h) * (HEIGHT * WIDTH)
        tl.store(dbias_ptr + here, dbias, mask=inside)
    if dlogit_scale_ptr is not None:
        slot = item.to(tl.int64) * heads + h
        dlogit_scale *= LN2 * follows_logit_scale(logit_scale_ptr, h)
        tl.store(dlogit_scale_ptr + slot, tl.sum(dlogit_scale, 0))


@triton.jit(do_not_specialize=VARYING)
def _dtable_kernel(
    dbias_ptr, dtable_ptr, heads,
    WINDOW: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_DX: tl.constexpr,
):  # fmt: skip
    """dtable ((2 Wh - 1)(2 Ww - 1), heads): each entry gathers its pairs of dbias (heads, HEIGHT,
    WIDTH). Grid: (heads, 2 Wh - 1, ceil((2 Ww - 1) / BLOCK_DX)), a program for one dy."""
    WH: tl.constexpr = WINDOW[0]
    WW: tl.constexpr = WINDOW[1]
    h = tl.program_id(0)
    dy = tl.program_id(1) - (WH - 1)
    column = tl.program_id(2) * BLOCK_DX + tl.arange(0, BLOCK_DX)
    dx = column - (WW - 1)
    dbias_ptr += h.to(tl.int64) * (HEIGHT * WIDTH)
    total = tl.zeros((BLOCK_X, BLOCK_DX), tl.float32)
    for y in range(tl.maximum(dy, 0), tl.minimum(dy, 0) + WH):
        for first in range(0, WW, BLOCK_X):
            x = first + tl.arange(0, BLOCK_X)
            key_x = x[:, None] - dx[None, :]
            inside = (x < WW)[:, None] & (key_x >= 0) & (key_x < WW)
            i = y * WW + x
            j = (y - dy) * WW + key_x
            total += tl.load(dbias_ptr + i[:, None] * WIDTH + j, mask=inside, other=0.0)
    entry = (dy + WH - 1) * (2 * WW - 1) + column
    dtable = tl.sum(total, 0).to(dtable_ptr.dtype.element_ty)
    tl.store(dtable_ptr + entry * heads + h, dtable, mask=column < 2 * WW - 1)


# --- launchers ------------------------------------------------------------------------------------


def launch_dbias(
    sizes, plan, pointers, strides, scalars, settings, dbias_table, dlogit_scale
) -> None:
    """The gradients of large windows; pointers are those that the other passes took."""
    heads, device, bias = sizes.heads, pointers[0].device, pointers[4]
    height, width = bias.shape[2:]
    tiles = height // plan.block * cdiv(width, plan.block_loop)
    splits = dbias_splits(heads * tiles, sizes.windows, multiprocessors(device))
    per_program = cdiv(sizes.windows, splits)
    splits = cdiv(sizes.windows, per_program)
    fp32 = {"dtype": torch.float32, "device": device}
    dbias = dscale = None
    if dbias_table is not None:
        dbias = torch.empty((splits, heads, height, width), **fp32)
    if dlogit_scale is not None:
        dscale = torch.empty((splits * tiles, heads), **fp32)
    _dbias_kernel[(heads * tiles * splits,)](
        *pointers, dbias, dscale, heads, sizes.rows, sizes.columns, sizes.windows, per_program,
        *strides, *scalars, HEIGHT=height, WIDTH=width, **settings,
    )  # fmt: skip
    finish_gradients(dbias, dscale, sizes.window, dbias_table, dlogit_scale)


def finish_gradients(dbias, dscale, window, dbias_table, dlogit_scale) -> None:
    """Adds partial sums dbias (parts, heads, HEIGHT, WIDTH) and dscale (parts, heads)."""
    if dscale is not None:
        sum_partials(dscale, dlogit_scale)
    if dbias is None:
        return
    total = dbias[0]
    if dbias.shape[0] > 1:
        total = torch.empty_like(total)
        sum_partials(dbias, total)
    heads, height, width = total.shape
    block = min(64, max(16, power_of_two(2 * window[1] - 1)))
    with on_device(total):
        _dtable_kernel[(heads, 2 * window[0] - 1, cdiv(2 * window[1] - 1, block))](
            total, dbias_table, heads, WINDOW=window, HEIGHT=height, WIDTH=width,
            BLOCK_X=min(32, power_of_two(window[1])), BLOCK_DX=block, num_warps=4,
        )  # fmt: skip
