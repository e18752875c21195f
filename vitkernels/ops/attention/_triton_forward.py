"""Triton forward of attention: out = dropout(softmax(scale * q k^T + bias)) v and lse.

Up to WHOLE_ROW keys in 16 bits, a block of queries sees its whole row of scores at once
(single-pass softmax, no rescaling) and the keys and values of the head stay in shared memory for
every block of queries. Beyond that a loop over blocks of keys with online softmax precedes the same
single pass over the rest of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import dot_dtype, dropout_scalars, multiprocessors, on_device, stages
from vitkernels.ops.attention._triton_plans import blocks_of_a_head, forward_plan
from vitkernels.ops.attention._triton_tiles import (
    LN2,
    VARYING,
    add_dot,
    bias_pointer,
    bias_view,
    check_attention,
    check_packed,
    dot_rows,
    finish_scores,
    finite_or_zero,
    first_of,
    head_pointer,
    heads,
    kept,
    load_parts,
    load_tiles,
    mask_view,
    scale_tiles,
    store_tiles,
    zero_tiles,
)


@triton.jit
def _dropped(p, seed_ptr, head, i, j, Nq, Nk, threshold):
    """The survivors of dropout; 1 / (1 - p) waits for the end of the row."""
    if seed_ptr is None:
        return p
    else:
        return p * tl.where(kept(seed_ptr, head, i, j, Nq, Nk, threshold), 1.0, 0.0)


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, seed_ptr, out_ptr, lse_ptr,
    H, Nq, Nk, groups, blocks_per_program, main,
    q_strides, k_strides, v_strides, out_strides, bias_strides, scale, threshold, keep_scale,
    D: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, BIAS_IS_BOOL: tl.constexpr,
    LOOP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LOOP: tl.constexpr, PARTS: tl.constexpr,
    DIMS: tl.constexpr,
):  # fmt: skip
    """Grid: (groups * H * B,); a group is blocks_per_program query blocks of one head.

    Keys [0, main) go in a loop over BLOCK_LOOP (only if LOOP), the rest at once in the static tiles
    PARTS. Limits: D <= 256, Nq and Nk < 2^31 - BLOCK, groups * H * B < 2^31.
    """
    head = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    b = head // H
    h = head % H
    q_ptr = head_pointer(q_ptr, b, h, q_strides, UNIT)
    k_ptr = head_pointer(k_ptr, b, h, k_strides, UNIT)
    v_ptr = head_pointer(v_ptr, b, h, v_strides, UNIT)
    out_ptr = head_pointer(out_ptr, b, h, out_strides, UNIT)
    if bias_ptr is not None:
        bias_ptr = bias_pointer(bias_ptr, b, h, bias_strides)
    if mask_ptr is not None:
        mask_ptr += b.to(tl.int64) * Nk
    lse_ptr += head.to(tl.int64) * Nq

    if not LOOP:
        k_rest = load_parts(k_ptr, 0, Nk, k_strides, D, PARTS, DIMS, UNIT, DOT)
        v_rest = load_parts(v_ptr, 0, Nk, v_strides, D, PARTS, DIMS, UNIT, DOT)
    first_block = group * blocks_per_program
    last_block = tl.minimum(first_block + blocks_per_program, tl.cdiv(Nq, BLOCK))
    for block in range(first_block, last_block):
        row = block * BLOCK + tl.arange(0, BLOCK)
        i = row[:, None]
        q = load_tiles(q_ptr, row, Nq, q_strides, D, DIMS, UNIT, DOT, True)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        out = zero_tiles(BLOCK, DIMS)

        if LOOP:
            for start in range(0, main, BLOCK_LOOP):
                column = start + tl.arange(0, BLOCK_LOOP)
                j = column[None, :]
                k = load_tiles(k_ptr, column, Nk, k_strides, D, DIMS, UNIT, DOT, False)
                s = finish_scores(
                    dot_rows(q, k), i, j, bias_ptr, mask_ptr, bias_strides, Nq, Nk, scale,
                    BIAS_IS_BOOL, False,
                )  # fmt: skip
                new_top = tl.maximum(top, tl.max(s, 1))
                base = finite_or_zero(new_top)
                rescale = tl.exp2(top - base)
                p = tl.exp2(s - base[:, None])
                top = new_top
                total = total * rescale + tl.sum(p, 1)
                v = load_tiles(v_ptr, column, Nk, v_strides, D, DIMS, UNIT, DOT, False)
                p = _dropped(p, seed_ptr, head, i, j, Nq, Nk, threshold)
                out = add_dot(scale_tiles(out, rescale[:, None]), p, v)
            k_rest = load_parts(k_ptr, main, Nk, k_strides, D, PARTS, DIMS, UNIT, DOT)
            v_rest = load_parts(v_ptr, main, Nk, v_strides, D, PARTS, DIMS, UNIT, DOT)

        scores = ()
        new_top = top
        for n in tl.static_range(len(PARTS)):
            j = (main + first_of(PARTS, n) + tl.arange(0, PARTS[n]))[None, :]
            s = finish_scores(
                dot_rows(q, k_rest[n]), i, j, bias_ptr, mask_ptr, bias_strides, Nq, Nk, scale,
                BIAS_IS_BOOL, n == len(PARTS) - 1,
            )  # fmt: skip
            new_top = tl.maximum(new_top, tl.max(s, 1))
            scores = scores + (s,)
        base = finite_or_zero(new_top)
        if LOOP:
            rescale = tl.exp2(top - base)
            total = total * rescale
            out = scale_tiles(out, rescale[:, None])
        for n in tl.static_range(len(PARTS)):
            j = (main + first_of(PARTS, n) + tl.arange(0, PARTS[n]))[None, :]
            p = tl.exp2(scores[n] - base[:, None])
            total += tl.sum(p, 1)
            p = _dropped(p, seed_ptr, head, i, j, Nq, Nk, threshold)
            out = add_dot(out, p, v_rest[n])

        # A fully masked row has total 0: output 0, log-sum-exp -inf.
        factor = keep_scale / tl.where(total == 0.0, 1.0, total)
        store_tiles(out_ptr, scale_tiles(out, factor[:, None]), row, Nq, out_strides, D, DIMS, UNIT)
        lse = tl.where(total == 0.0, float("-inf"), (new_top + tl.log2(total)) * LN2)
        tl.store(lse_ptr + row, lse, mask=row < Nq)


def launch_forward(q, k, v, bias, key_padding_mask, seed, scale, dropout_p, out, lse):
    """q, out (B,Nq,H,D) and k, v (B,Nk,H,D), any strides; writes out and lse."""
    B, Nq, H, D = q.shape
    Nk = k.shape[1]
    plain = bias is None and key_padding_mask is None and dropout_p == 0
    plan = forward_plan(Nk, D, q.dtype, plain)
    (q, k, v, out), strides, unit = heads(q, k, v, out)
    bias, bias_strides, bias_is_bool = bias_view(bias, B, H, Nq, Nk)
    groups, per_program = blocks_of_a_head(plan, Nq, B, H, multiprocessors(q.device))
    with on_device(q):
        _forward_kernel[(groups * H * B,)](
            q, k, v, bias, mask_view(key_padding_mask), seed if dropout_p > 0 else None, out, lse,
            H, Nq, Nk, groups, per_program, plan.main, *strides, bias_strides, scale,
            *dropout_scalars(dropout_p),
            D=D, UNIT=unit, DOT=dot_dtype(q.dtype), BIAS_IS_BOOL=bias_is_bool, LOOP=plan.main > 0,
            BLOCK=plan.block, BLOCK_LOOP=plan.block_loop, PARTS=plan.parts, DIMS=plan.dims,
            num_warps=plan.num_warps, num_stages=stages(q.device, plan.num_stages),
        )  # fmt: skip


def attention_fwd(q, k, v, bias, key_padding_mask, seed, scale, dropout_p):
    check_attention("attention_fwd", q, k, v, bias, key_padding_mask, seed, dropout_p)
    return _forward(q, k, v, bias, key_padding_mask, seed, scale, dropout_p)


def _forward(q, k, v, bias, key_padding_mask, seed, scale, dropout_p):
    B, Nq, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Nq), dtype=torch.float32, device=q.device)
    launch_forward(q, k, v, bias, key_padding_mask, seed, scale, dropout_p, out, lse)
    return out, lse


def unpack(packed: torch.Tensor, parts: int, num_heads: int) -> list[torch.Tensor]:
    """(B, N, parts * H * D) as `parts` views (B, N, H, D)."""
    return list(packed.unflatten(2, (parts, num_heads, -1)).unbind(2))


def attention_qkvpacked_fwd(qkv, num_heads, bias, key_padding_mask, seed, scale, dropout_p):
    op = "attention_qkvpacked_fwd"
    check_packed(op, qkv, num_heads)
    q, k, v = unpack(qkv, 3, num_heads)
    check_attention(op, q, k, v, bias, key_padding_mask, seed, dropout_p)
    out, lse = _forward(q, k, v, bias, key_padding_mask, seed, scale, dropout_p)
    return out.flatten(2), lse
