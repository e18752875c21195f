"""Triton backward of window attention: recomputed probabilities, and nothing added atomically.

    p = exp(s - lse);  ds = p * (dout v^T - delta);  delta = rowsum(p * dout v^T) = rowsum(dout out)
    dq = scale * ds k,  dk = scale * ds^T q,  dv = p^T dout,  dbias = sum of ds over the windows

Windows to 64 tokens: `_window_kernel` has all of it in one pass and keeps the sum of ds of its
windows in registers. Larger ones, and heads beyond 64 channels: _triton_passes.py. With cosines
(logit_scale), the gradients of q and k pass through the normalisation at the store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import (
    check_like,
    check_wanted,
    dot_dtype,
    dropout_scalars,
    multiprocessors,
    on_device,
    stages,
)
from vitkernels.ops.window_attention._triton_dbias import finish_gradients
from vitkernels.ops.window_attention._triton_passes import launch_passes
from vitkernels.ops.window_attention._triton_plans import (
    backward_plan,
    one_pass,
    programs_of_a_head,
    windows_per_program,
)
from vitkernels.ops.window_attention._triton_tiles import (
    LOG2E,
    VARYING,
    add_dot,
    check_windows,
    dot_rows,
    expand_bias,
    follows_logit_scale,
    input_gradient,
    lengths,
    load_bias,
    load_rows,
    locate,
    maps,
    mask_by_bias,
    scaled_products,
    score_factor,
    statistics_offset,
    store_rows,
    token_offsets,
    unit_rows,
    windows_of_a_program,
    with_dropout,
)

MINUS_ZERO = tl.constexpr(-(2**31))  # its bits


@triton.jit
def _spread_nan(p, lse, SHIFT: tl.constexpr):
    """p, with NaN at the seams of a row too if its softmax is NaN, as in the reference."""
    if SHIFT[0] > 0 or SHIFT[1] > 0:
        p += tl.where(lse > float("-inf"), 0.0, float("nan"))[:, None]
    return p


@triton.jit
def _zero_at_seams(ds, p, SHIFT: tl.constexpr):
    """0 where p is -0.0: there dp may be NaN."""
    if SHIFT[0] > 0 or SHIFT[1] > 0:
        ds = tl.where(p.to(tl.int32, bitcast=True) == MINUS_ZERO, 0.0, ds)
    return ds


@triton.jit(do_not_specialize=VARYING)
def _window_kernel(
    dout_ptr, qkv_ptr, lse_ptr, bias_ptr, logit_scale_ptr, seed_ptr, dqkv_ptr, dbias_ptr,
    dlogit_scale_ptr,
    heads, batch, rows, columns, windows_per_program,
    dout_strides, qkv_strides, dqkv_strides, scale, threshold, keep_scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Windows that are one tile, of one kind in a program. Grid: (heads * programs of a head,).

    Leaves the sums of its windows in dbias (programs of a head, heads, BLOCK, BLOCK) and
    dlogit_scale (programs of a head, heads). dqkv_ptr and these two may be None.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    CHECK: tl.constexpr = N < BLOCK
    h = tl.program_id(0) % heads
    group = tl.program_id(0) // heads
    factor = score_factor(logit_scale_ptr, h, scale)
    kind, area, first, last = windows_of_a_program(
        group, batch, rows, columns, windows_per_program, SHIFT
    )
    bias_ptr += (kind * heads + h).to(tl.int64) * (BLOCK * BLOCK)
    q_ptr = qkv_ptr + h * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    dout_ptr += h * D
    token = tl.arange(0, BLOCK)
    dbias = tl.zeros((BLOCK, BLOCK), tl.float32)
    dlogit_scale = tl.zeros((BLOCK,), tl.float32)
    # Marks a seam, as exp2 has no negative results; the literal -0.0 would become 0.0.
    minus_zero = tl.full((), MINUS_ZERO, tl.int32).to(tl.float32, bitcast=True)

    for window in range(first, last):
        place = locate(window, area)
        statistics = statistics_offset(place, heads, h, N)
        offset = token_offsets(token, place, qkv_strides, WINDOW, SHIFT, UNIT)
        dout_offset = token_offsets(token, place, dout_strides, WINDOW, SHIFT, UNIT)
        q = load_rows(q_ptr, offset, token, N, D, DIM, DOT, CHECK)
        k = load_rows(k_ptr, offset, token, N, D, DIM, DOT, CHECK)
        v = load_rows(v_ptr, offset, token, N, D, DIM, DOT, CHECK)
        dout = load_rows(dout_ptr, dout_offset, token, N, D, DIM, DOT, CHECK)
        lse = tl.load(lse_ptr + statistics + token, mask=token < N, other=0.0) * LOG2E
        q_length = None if logit_scale_ptr is None else lengths(q)
        k_length = None if logit_scale_ptr is None else lengths(k)
        bias = load_bias(bias_ptr, 0, 0, BLOCK, BLOCK, BLOCK)
        s = scaled_products(dot_rows(q, k), factor, q_length, k_length) + bias
        p = mask_by_bias(tl.exp2(s - lse[:, None]), bias, minus_zero, None, kind, SHIFT)
        dropped, dp = with_dropout(
            _spread_nan(p, lse, SHIFT), dot_rows(dout, v), seed_ptr, statistics, token[:, None],
            token[None, :], N, threshold, keep_scale,
        )  # fmt: skip
        # Large scores leave p off by a factor, of which the mean of dp must not know.
        delta = tl.sum(p * dp, 1) / tl.sum(p, 1)
        if CHECK:  # padded queries would take NaN from one key to all
            delta = tl.where(token < N, delta, 0.0)
        ds = _zero_at_seams(p * (dp - delta[:, None]), p, SHIFT)
        if dbias_ptr is not None:
            dbias += ds
        zero = tl.zeros((BLOCK, DIM), tl.float32)
        offset = token_offsets(token, place, dqkv_strides, WINDOW, SHIFT, UNIT)
        if dqkv_ptr is not None:
            dv = add_dot(zero, tl.trans(dropped.to(DOT)), dout)
            store_rows(dqkv_ptr + (2 * heads + h) * D, dv, offset, token, N, D, DIM)
        ds = ds.to(DOT)
        if dqkv_ptr is not None or dlogit_scale_ptr is not None:
            if logit_scale_ptr is not None:  # again, because registers are short in between
                qkv_offset = token_offsets(token, place, qkv_strides, WINDOW, SHIFT, UNIT)
                q = load_rows(q_ptr, qkv_offset, token, N, D, DIM, DOT, CHECK)
                k = load_rows(k_ptr, qkv_offset, token, N, D, DIM, DOT, CHECK)
                q_length = lengths(q)
                k_length = lengths(k)
            dq = add_dot(zero, ds, unit_rows(k, k_length))
            dq, along = input_gradient(dq, q, q_length, factor)
        if dlogit_scale_ptr is not None:
            dlogit_scale += along
        if dqkv_ptr is not None:
            store_rows(dqkv_ptr + h * D, dq, offset, token, N, D, DIM)
            dk = add_dot(zero, tl.trans(ds), unit_rows(q, q_length))
            dk, _ = input_gradient(dk, k, k_length, factor)
            store_rows(dqkv_ptr + (heads + h) * D, dk, offset, token, N, D, DIM)

    slot = group.to(tl.int64) * heads + h
    if dbias_ptr is not None:
        here = token[:, None] * BLOCK + token[None, :]
        tl.store(dbias_ptr + slot * (BLOCK * BLOCK) + here, dbias)
    if dlogit_scale_ptr is not None:
        dlogit_scale *= follows_logit_scale(logit_scale_ptr, h)
        tl.store(dlogit_scale_ptr + slot, tl.sum(dlogit_scale, 0))


# --- launchers ------------------------------------------------------------------------------------


def window_attention_bwd(
    dout, qkv, out, lse, bias_table, logit_scale, seed,
    Wh, Ww, shift_h, shift_w, num_heads, scale, dropout_p, output_mask,
):  # fmt: skip
    op = "window_attention_bwd"
    sizes = check_windows(
        op, qkv, bias_table, logit_scale, seed, Wh, Ww, shift_h, shift_w, num_heads, dropout_p
    )
    shape = (*qkv.shape[:3], sizes.heads * sizes.D)
    statistics = (sizes.B, sizes.rows * sizes.columns, sizes.heads, sizes.N)
    check_like(op, "dout", dout, shape)
    check_like(op, "out", out, shape, (qkv.dtype,))
    check_like(op, "lse", lse, statistics, (torch.float32,))
    check_wanted(
        op, output_mask, {"qkv": qkv, "bias_table": bias_table, "logit_scale": logit_scale}
    )
    dqkv, dbias_table, dlogit_scale = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if wanted else None
        for t, wanted in zip((qkv, bias_table, logit_scale), output_mask, strict=True)
    )
    if sizes.B == 0:
        for sums in (dbias_table, dlogit_scale):
            if sums is not None:
                sums.zero_()
    elif any(output_mask):
        # fp32 made from 16 bits in the kernel would be multiplied in tf32 on sm_100.
        dout, lse = dout.to(qkv.dtype), lse.contiguous()
        logit_scale = None if logit_scale is None else logit_scale.contiguous()
        options = (logit_scale, seed if dropout_p > 0 else None)
        scalars = (scale, *dropout_scalars(dropout_p))
        plan = backward_plan(sizes.N, sizes.D, qkv.dtype)
        launch = _launch_one_pass if one_pass(plan, sizes.N) else launch_passes
        with on_device(qkv):
            launch(
                sizes, plan, dout, qkv, out, lse, bias_table, options, scalars, dqkv, dbias_table,
                dlogit_scale,
            )  # fmt: skip
    return dqkv, dbias_table, dlogit_scale


def _launch_one_pass(
    sizes, plan, dout, qkv, out, lse, bias_table, options, scalars, dqkv, dbias_table, dlogit_scale
):  # fmt: skip
    heads, tile = sizes.heads, plan.block
    per_program = windows_per_program(
        sizes.windows, heads, multiprocessors(qkv.device), backward=True
    )
    groups = programs_of_a_head(*sizes.map_of_windows, sizes.shift, per_program)
    device = qkv.device
    fp32 = {"dtype": torch.float32, "device": device}
    dbias = None if dbias_table is None else torch.empty((groups, heads, tile, tile), **fp32)
    dscale = None if dlogit_scale is None else torch.empty((groups, heads), **fp32)
    bias = expand_bias(bias_table, sizes.window, tile, tile, shift=sizes.shift)
    (dout, qkv, *_), (s_dout, s_qkv, *s_dqkv), unit = maps(
        dout, qkv, *([] if dqkv is None else [dqkv])
    )
    _window_kernel[(heads * groups,)](
        dout, qkv, lse, bias, *options, dqkv, dbias, dscale, heads, *sizes.map_of_windows,
        per_program, s_dout, s_qkv, *(s_dqkv or [(0, 0, 0)]), *scalars,
        WINDOW=sizes.window, SHIFT=sizes.shift, D=sizes.D, UNIT=unit, DOT=dot_dtype(qkv.dtype),
        BLOCK=tile, DIM=plan.dim, num_warps=plan.num_warps,
        num_stages=stages(device, plan.num_stages),
    )  # fmt: skip
    finish_gradients(dbias, dscale, sizes.window, dbias_table, dlogit_scale)
