"""Triton backward of attention: three deterministic kernels that recompute the probabilities.

    delta = rowsum(dout * out);  p = exp(s - lse);  ds = p * (dout v^T - delta)
    _dq_kernel     one block of queries:  dq = scale * ds k, and delta for the others
    _dkv_kernel    one block of keys:     dk = scale * ds^T q,  dv = p^T dout
    _dbias_kernel  one tile of the bias:  dbias = sum of ds (_triton_dbias.py)

Up to WHOLE_ROW keys stay in shared memory while a program of _dq_kernel walks over the blocks of a
head. Nothing is added atomically: the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import (
    capability,
    check_like,
    dot_dtype,
    dropout_scalars,
    multiprocessors,
    on_device,
    stages,
)
from vitkernels.ops.attention._triton_dbias import launch_dbias
from vitkernels.ops.attention._triton_forward import unpack
from vitkernels.ops.attention._triton_plans import BackwardPlan, backward_plan, blocks_of_a_head
from vitkernels.ops.attention._triton_tiles import (
    VARYING,
    add_dot,
    bias_pointer,
    bias_view,
    check_attention,
    check_packed,
    first_of,
    head_pointer,
    heads,
    load_lse,
    load_parts,
    load_tiles,
    mask_view,
    scale_tiles,
    score_gradients,
    store_tiles,
    zero_tiles,
)


@triton.jit(do_not_specialize=VARYING)
def _dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, mask_ptr, seed_ptr, dq_ptr,
    delta_ptr,
    H, Nq, Nk, groups, blocks_per_program, main,
    dout_strides, q_strides, k_strides, v_strides, out_strides, dq_strides, bias_strides, scale,
    threshold, keep_scale,
    D: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, BIAS_IS_BOOL: tl.constexpr,
    LOOP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LOOP: tl.constexpr, PARTS: tl.constexpr,
    DIMS: tl.constexpr,
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
    if bias_ptr is not None:
        bias_ptr = bias_pointer(bias_ptr, b, h, bias_strides)
    if mask_ptr is not None:
        mask_ptr += b.to(tl.int64) * Nk
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
        dout = load_tiles(dout_ptr, row, Nq, dout_strides, D, DIMS, UNIT, DOT, True)
        out = load_tiles(out_ptr, row, Nq, out_strides, D, DIMS, UNIT, DOT, True)
        delta = tl.zeros((BLOCK,), tl.float32)
        for n in tl.static_range(len(DIMS)):
            delta += tl.sum(dout[n].to(tl.float32) * out[n].to(tl.float32), 1)
        tl.store(delta_ptr + row, delta, mask=row < Nq)

        if dq_ptr is not None:
            q = load_tiles(q_ptr, row, Nq, q_strides, D, DIMS, UNIT, DOT, True)
            lse = load_lse(lse_ptr, row, Nq)
            dq = zero_tiles(BLOCK, DIMS)
            if LOOP:
                for start in range(0, main, BLOCK_LOOP):
                    column = start + tl.arange(0, BLOCK_LOOP)
                    k = load_tiles(k_ptr, column, Nk, k_strides, D, DIMS, UNIT, DOT, False)
                    v = load_tiles(v_ptr, column, Nk, v_strides, D, DIMS, UNIT, DOT, False)
                    _, ds = score_gradients(
                        q, k, dout, v, lse[:, None], delta[:, None], head, i, column[None, :],
                        bias_ptr, mask_ptr,
                        seed_ptr, bias_strides, Nq, Nk, scale, threshold, keep_scale, BIAS_IS_BOOL,
                        False,
                    )  # fmt: skip
                    dq = add_dot(dq, ds, k)
                k_rest = load_parts(k_ptr, main, Nk, k_strides, D, PARTS, DIMS, UNIT, DOT)
                v_rest = load_parts(v_ptr, main, Nk, v_strides, D, PARTS, DIMS, UNIT, DOT)
            for n in tl.static_range(len(PARTS)):
                j = (main + first_of(PARTS, n) + tl.arange(0, PARTS[n]))[None, :]
                _, ds = score_gradients(
                    q, k_rest[n], dout, v_rest[n], lse[:, None], delta[:, None], head, i, j,
                    bias_ptr, mask_ptr,
                    seed_ptr, bias_strides, Nq, Nk, scale, threshold, keep_scale, BIAS_IS_BOOL,
                    n == len(PARTS) - 1,
                )  # fmt: skip
                dq = add_dot(dq, ds, k_rest[n])
            store_tiles(dq_ptr, scale_tiles(dq, scale), row, Nq, dq_strides, D, DIMS, UNIT)


@triton.jit(do_not_specialize=VARYING)
def _dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, bias_ptr, mask_ptr, seed_ptr, dk_ptr, dv_ptr,
    H, Nq, Nk, groups, blocks_per_program, main,
    dout_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides, bias_strides, scale,
    threshold, keep_scale,
    D: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, BIAS_IS_BOOL: tl.constexpr,
    LOOP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LOOP: tl.constexpr, PARTS: tl.constexpr,
    DIMS: tl.constexpr,
):  # fmt: skip
    """dk and dv, either may be None; tiles are transposed, (keys, queries). Grid: (groups * H *
    B,).

    Queries [0, main) go in a loop over BLOCK_LOOP (only if LOOP), the rest in the static tiles
    PARTS.
    """
    head = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    b = head // H
    h = head % H
    dout_ptr = head_pointer(dout_ptr, b, h, dout_strides, UNIT)
    q_ptr = head_pointer(q_ptr, b, h, q_strides, UNIT)
    k_ptr = head_pointer(k_ptr, b, h, k_strides, UNIT)
    v_ptr = head_pointer(v_ptr, b, h, v_strides, UNIT)
    if bias_ptr is not None:
        bias_ptr = bias_pointer(bias_ptr, b, h, bias_strides)
    if mask_ptr is not None:
        mask_ptr += b.to(tl.int64) * Nk
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
        k = load_tiles(k_ptr, column, Nk, k_strides, D, DIMS, UNIT, DOT, True)
        v = load_tiles(v_ptr, column, Nk, v_strides, D, DIMS, UNIT, DOT, True)
        dk = zero_tiles(BLOCK, DIMS)
        dv = zero_tiles(BLOCK, DIMS)
        if LOOP:
            for start in range(0, main, BLOCK_LOOP):
                row = start + tl.arange(0, BLOCK_LOOP)
                q = load_tiles(q_ptr, row, Nq, q_strides, D, DIMS, UNIT, DOT, False)
                dout = load_tiles(dout_ptr, row, Nq, dout_strides, D, DIMS, UNIT, DOT, False)
                lse = load_lse(lse_ptr, row, Nq)
                delta = tl.load(delta_ptr + row, mask=row < Nq, other=0.0)
                p, ds = score_gradients(
                    k, q, v, dout, lse[None, :], delta[None, :], head, row[None, :], j, bias_ptr,
                    mask_ptr,
                    seed_ptr, bias_strides, Nq, Nk, scale, threshold, keep_scale, BIAS_IS_BOOL,
                    False,
                )  # fmt: skip
                if dv_ptr is not None:
                    dv = add_dot(dv, p, dout)
                if dk_ptr is not None:
                    dk = add_dot(dk, ds, q)
            q_rest = load_parts(q_ptr, main, Nq, q_strides, D, PARTS, DIMS, UNIT, DOT)
            dout_rest = load_parts(dout_ptr, main, Nq, dout_strides, D, PARTS, DIMS, UNIT, DOT)
        for n in tl.static_range(len(PARTS)):
            row = main + first_of(PARTS, n) + tl.arange(0, PARTS[n])
            lse = load_lse(lse_ptr, row, Nq)
            delta = tl.load(delta_ptr + row, mask=row < Nq, other=0.0)
            p, ds = score_gradients(
                k, q_rest[n], v, dout_rest[n], lse[None, :], delta[None, :], head, row[None, :], j,
                bias_ptr, mask_ptr,
                seed_ptr, bias_strides, Nq, Nk, scale, threshold, keep_scale, BIAS_IS_BOOL, False,
            )  # fmt: skip
            if dv_ptr is not None:
                dv = add_dot(dv, p, dout_rest[n])
            if dk_ptr is not None:
                dk = add_dot(dk, ds, q_rest[n])
        if dv_ptr is not None:
            dv_head = head_pointer(dv_ptr, b, h, dv_strides, UNIT)
            store_tiles(dv_head, dv, column, Nk, dv_strides, D, DIMS, UNIT)
        if dk_ptr is not None:
            dk_head = head_pointer(dk_ptr, b, h, dk_strides, UNIT)
            store_tiles(dk_head, scale_tiles(dk, scale), column, Nk, dk_strides, D, DIMS, UNIT)


# --- launchers -----------------------------------------------------------------------------------


def launch_backward(
    dout, q, k, v, out, lse, bias, key_padding_mask, seed, scale, dropout_p, dq, dk, dv, need_dbias
):  # fmt: skip
    """Writes dq, dk, dv (views of any strides, or None) and returns dbias."""
    B, Nq, H, D = q.shape
    Nk = k.shape[1]
    lse = lse.contiguous()
    processors = multiprocessors(q.device)
    some = [g for g in (dq, dk, dv) if g is not None]
    (dout, q, k, v, out, *_), (s_dout, s_q, s_k, s_v, s_out, *s_some), unit = heads(
        dout, q, k, v, out, *some
    )
    s_dq, s_dk, s_dv = (s_some.pop(0) if g is not None else (0, 0, 0) for g in (dq, dk, dv))
    bias_in, bias_strides, bias_is_bool = bias_view(bias, B, H, Nq, Nk)
    masks = (bias_in, mask_view(key_padding_mask), seed if dropout_p > 0 else None)
    scalars = (bias_strides, scale, *dropout_scalars(dropout_p))
    common = {"D": D, "UNIT": unit, "DOT": dot_dtype(q.dtype)}
    delta = torch.empty_like(lse)
    with on_device(q):
        plain = bias is None and key_padding_mask is None and dropout_p == 0
        masked, sm = key_padding_mask is not None or dropout_p > 0, capability(q.device)
        limits = {"narrow": masked or sm < 90, "tensor_memory": 100 <= sm < 120}
        resident = plain and stages(q.device, 2) > 1  # 112 KB of shared memory on sm_89
        plan = backward_plan(Nq, Nk, D, q.dtype, resident=resident, **limits)
        groups, per_program = blocks_of_a_head(plan, Nq, B, H, processors)
        _dq_kernel[(groups * H * B,)](
            dout, q, k, v, out, lse, *masks, dq, delta, H, Nq, Nk, groups, per_program, plan.main,
            s_dout, s_q, s_k, s_v, s_out, s_dq, *scalars, **common, **_tiles(plan, q.device),
            BIAS_IS_BOOL=bias_is_bool,
        )  # fmt: skip
        if dk is not None or dv is not None:
            plan = backward_plan(Nk, Nq, D, q.dtype, **limits)
            groups, per_program = blocks_of_a_head(plan, Nk, B, H, processors)
            _dkv_kernel[(groups * H * B,)](
                dout, q, k, v, lse, delta, *masks, dk, dv, H, Nq, Nk, groups, per_program,
                plan.main, s_dout, s_q, s_k, s_v, s_dk, s_dv, *scalars, **common,
                **_tiles(plan, q.device), BIAS_IS_BOOL=bias_is_bool,
            )  # fmt: skip
        if not need_dbias or bias is None:
            return None
        pointers, strides = (dout, q, k, v, lse, delta, *masks), (s_dout, s_q, s_k, s_v)
        full = (B, H, Nq, Nk)
        plan = backward_plan(Nq, 1, D, q.dtype, **limits)
        return launch_dbias(pointers, strides, scalars, common, bias, full, processors, plan)


def _tiles(plan: BackwardPlan, device: torch.device) -> dict:
    return {
        "LOOP": plan.main > 0,
        "BLOCK": plan.block,
        "BLOCK_LOOP": plan.block_loop,
        "PARTS": plan.parts,
        "DIMS": plan.dims,
        "num_warps": plan.num_warps,
        "num_stages": stages(device, plan.num_stages),
    }


def _check_saved(op, dout, out, lse, shape, lse_shape, dtype, bias, need_dbias):
    check_like(op, "dout", dout, shape)
    check_like(op, "out", out, shape, (dtype,))
    check_like(op, "lse", lse, lse_shape, (torch.float32,))
    if need_dbias and bias is not None:
        check_like(op, "bias", bias, bias.shape)


def attention_bwd(
    dout, q, k, v, out, lse, bias, key_padding_mask, seed, scale, dropout_p, output_mask
):
    op = "attention_bwd"
    check_attention(op, q, k, v, bias, key_padding_mask, seed, dropout_p)
    B, Nq, H, _ = q.shape
    _check_saved(op, dout, out, lse, q.shape, (B, H, Nq), q.dtype, bias, output_mask[3])
    dq, dk, dv = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if wanted else None
        for t, wanted in zip((q, k, v), output_mask[:3], strict=True)
    )
    dbias = launch_backward(
        dout, q, k, v, out, lse, bias, key_padding_mask, seed, scale, dropout_p, dq, dk, dv,
        output_mask[3],
    )  # fmt: skip
    return dq, dk, dv, dbias


def attention_qkvpacked_bwd(
    dout, qkv, num_heads, out, lse, bias, key_padding_mask, seed, scale, dropout_p, output_mask
):  # fmt: skip
    op = "attention_qkvpacked_bwd"
    check_packed(op, qkv, num_heads)
    q, k, v = unpack(qkv, 3, num_heads)
    check_attention(op, q, k, v, bias, key_padding_mask, seed, dropout_p)
    B, N, width = qkv.shape
    shapes = (B, N, width // 3), (B, num_heads, N)
    _check_saved(op, dout, out, lse, *shapes, qkv.dtype, bias, output_mask[1])
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if output_mask[0] else None
    gradients = (None, None, None) if dqkv is None else unpack(dqkv, 3, num_heads)
    (dout,), (out,) = unpack(dout, 1, num_heads), unpack(out, 1, num_heads)
    dbias = launch_backward(
        dout, q, k, v, out, lse, bias, key_padding_mask, seed, scale, dropout_p, *gradients,
        output_mask[1],
    )  # fmt: skip
    return dqkv, dbias
