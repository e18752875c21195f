"""Triton backend of distillation_loss: the gradients are made in the forward.

    class head      loss = sum of t' (lse - x), dx = softmax(x) * sum of t' - t'
    soft            loss = T^2 KL(softmax(t / T) || softmax(x / T)), dx = T (softmax - softmax)
    hard            the class head's, of the teacher's largest logit

A program takes BLOCK_R rows, one head after the other. Over the columns it keeps the largest value
and the sum of exponentials from it (of student and teacher together), then goes over them once more
for the gradient. The second reading finds its rows in L1, or in L2: 132 programs of one row of
65,536 classes hold 17 MB (class head) and 35 MB (student and teacher) in 16 bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vitkernels._triton import FLOATS, cdiv, check_like, check_wanted, fail, on_device, power_of_two
from vitkernels.ops.distillation_loss.reference import units

VARYING = ["B"]


@triton.jit
def _load(
    ptr, row, start, K, strides, other: tl.constexpr, ALIGN: tl.constexpr, BLOCK_K: tl.constexpr
):
    """(tile of a head in fp32, its columns); `other` beyond the last column."""
    col = start + tl.arange(0, BLOCK_K)
    offset = (row.to(tl.int64) * strides[0] * ALIGN)[:, None] + (col.to(tl.int64) * strides[1])[
        None, :
    ]
    return tl.load(ptr + offset, mask=(col < K)[None, :], other=other).to(tl.float32), col


@triton.jit
def _store(ptr, value, row, col, K):
    """Into a contiguous (B, K) tensor."""
    offset = row.to(tl.int64)[:, None] * K + col[None, :]
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=(col < K)[None, :])


@triton.jit
def _finite(top):
    """What exponents are taken from: 0 as long as all values were -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _rescaled(sum, top, x, scale):
    """The sum of exponentials and the largest value, both with the tile x counted in."""
    new_top = tl.maximum(top, tl.max(x, 1))
    e = tl.exp((x - _finite(new_top)[:, None]) * scale)
    return sum * tl.exp((top - _finite(new_top)) * scale) + tl.sum(e, 1), new_top, e


@triton.jit
def _class_head(
    x_ptr, t_ptr, dx_ptr, row, id, K, x_strides, t_strides, smoothing, grad,
    SOFT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Cross entropy of rows with classes `id`, or with targets t_ptr where SOFT. grad has rows."""
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    sum = tl.zeros((BLOCK_R,), tl.float32)
    weighted, deviations, targets, seen = sum, sum, sum, 0
    for start in range(0, K, BLOCK_K):
        x, col = _load(x_ptr, row, start, K, x_strides, float("-inf"), ALIGN, BLOCK_K)
        before = _finite(top)
        sum, top, _ = _rescaled(sum, top, x, 1.0)
        shift = before - _finite(top)
        inside = (col < K)[None, :]
        centred = x - _finite(top)[:, None]
        if smoothing != 0.0:
            deviations += seen * shift + tl.sum(tl.where(inside, centred, 0.0), 1)
        if SOFT:
            t, _ = _load(t_ptr, row, start, K, t_strides, 0.0, ALIGN, BLOCK_K)
            weighted += tl.where(targets == 0.0, 0.0, targets * shift)
            weighted += tl.sum(tl.where(t == 0.0, 0.0, t * centred), 1)
            targets += tl.sum(t, 1)
        seen += BLOCK_K

    hit, spread = 1.0 - smoothing, smoothing / K
    if SOFT:
        mass = hit * targets + smoothing
    else:
        valid = (id >= 0) & (id < K)
        at = x_ptr + row.to(tl.int64) * x_strides[0] * ALIGN + id.to(tl.int64) * x_strides[1]
        x_id = tl.load(at, mask=valid, other=float("nan")).to(tl.float32)
        weighted, mass = x_id - _finite(top), tl.full((BLOCK_R,), 1.0, tl.float32)
    loss = mass * tl.log(sum) - spread * deviations
    loss -= tl.where(hit == 0.0, 0.0, hit * weighted)

    if dx_ptr is not None:
        factor = grad * mass / sum
        for start in range(0, K, BLOCK_K):
            x, col = _load(x_ptr, row, start, K, x_strides, float("-inf"), ALIGN, BLOCK_K)
            dx = tl.exp(x - _finite(top)[:, None]) * factor[:, None] - (grad * spread)[:, None]
            if SOFT:
                t, _ = _load(t_ptr, row, start, K, t_strides, 0.0, ALIGN, BLOCK_K)
                dx -= (grad * hit)[:, None] * t
            else:
                dx -= tl.where(col[None, :] == id[:, None], (grad * hit)[:, None], 0.0)
            _store(dx_ptr, dx, row, col, K)
    return loss


@triton.jit
def _soft_head(
    x_ptr, t_ptr, dx_ptr, row, K, x_strides, t_strides, scale, grad,
    ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """T^2 KL(softmax(t * scale) || softmax(x * scale)), scale = 1 / T."""
    x_top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    x_sum = tl.zeros((BLOCK_R,), tl.float32)
    t_top, t_sum, weighted = x_top, x_sum, x_sum
    for start in range(0, K, BLOCK_K):
        x, _ = _load(x_ptr, row, start, K, x_strides, float("-inf"), ALIGN, BLOCK_K)
        t, col = _load(t_ptr, row, start, K, t_strides, float("-inf"), ALIGN, BLOCK_K)
        x_before, t_before, t_top_before, t_sum_before = (
            _finite(x_top),
            _finite(t_top),
            t_top,
            t_sum,
        )
        x_sum, x_top, _ = _rescaled(x_sum, x_top, x, scale)
        t_sum, t_top, e = _rescaled(t_sum, t_top, t, scale)
        shift = (t_before - _finite(t_top)) - (x_before - _finite(x_top))
        earlier = weighted + tl.where(t_sum_before == 0.0, 0.0, t_sum_before * shift)
        weighted = earlier * tl.exp((t_top_before - _finite(t_top)) * scale)
        difference = (t - _finite(t_top)[:, None]) - (x - _finite(x_top)[:, None])
        weighted += tl.sum(tl.where(e == 0.0, 0.0, e * difference), 1)

    kl = weighted / t_sum * scale - tl.log(t_sum) + tl.log(x_sum)
    if dx_ptr is not None:
        x_factor, t_factor = grad / x_sum, grad / t_sum
        for start in range(0, K, BLOCK_K):
            x, col = _load(x_ptr, row, start, K, x_strides, float("-inf"), ALIGN, BLOCK_K)
            t, _ = _load(t_ptr, row, start, K, t_strides, float("-inf"), ALIGN, BLOCK_K)
            dx = tl.exp((x - _finite(x_top)[:, None]) * scale) * x_factor[:, None]
            dx -= tl.exp((t - _finite(t_top)[:, None]) * scale) * t_factor[:, None]
            _store(dx_ptr, dx, row, col, K)
    return kl / (scale * scale)


@triton.jit
def _decision(
    t_ptr, row, K, strides, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """(the first of the largest logits, 1 or NaN where there was a NaN) of each row."""
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    id = tl.zeros((BLOCK_R,), tl.int32)
    valid = tl.full((BLOCK_R,), 1.0, tl.float32)
    for start in range(0, K, BLOCK_K):
        t, col = _load(t_ptr, row, start, K, strides, float("-inf"), ALIGN, BLOCK_K)
        high = tl.max(t, 1)
        here = tl.min(tl.where(t == high[:, None], col[None, :], K), 1)
        id = tl.where(high > top, here, id)
        top = tl.maximum(top, high)
        valid = tl.where(tl.max((t != t).to(tl.int32), 1) > 0, float("nan"), valid)
    return id, valid


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    logits_ptr, distill_ptr, teacher_ptr, targets_ptr, dlogits_ptr, ddistill_ptr, losses_ptr,
    B, columns, logits_strides, distill_strides, teacher_strides, targets_strides, ids_stride,
    class_weight, distill_weight, class_grad, distill_grad, smoothing, scale,
    SOFT_TARGETS: tl.constexpr, HARD: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(B / BLOCK_R),). losses_ptr: (B,), each row's part of the loss.

    columns and the first of each pair of strides are divided by ALIGN, so that the compiler knows
    it for a factor of K and of every row's offset: 16-byte loads of 1000 classes depend on it.
    Rows beyond the last are the last once more: the same numbers, to the same places."""
    K = columns * ALIGN
    row = tl.minimum(tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), B - 1)
    valid = tl.full((BLOCK_R,), 1.0, tl.float32)
    id = tl.zeros((BLOCK_R,), tl.int64)
    if not SOFT_TARGETS:
        id = tl.load(targets_ptr + row.to(tl.int64) * ids_stride)
    loss = class_weight * _class_head(
        logits_ptr, targets_ptr, dlogits_ptr, row, id, K, logits_strides, targets_strides,
        smoothing, valid * class_grad, SOFT_TARGETS, ALIGN, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    if HARD:
        id, valid = _decision(teacher_ptr, row, K, teacher_strides, ALIGN, BLOCK_R, BLOCK_K)
        loss += distill_weight * valid * _class_head(
            distill_ptr, teacher_ptr, ddistill_ptr, row, id, K, distill_strides,
            teacher_strides, 0.0, distill_grad * valid, False, ALIGN, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        loss += distill_weight * _soft_head(
            distill_ptr, teacher_ptr, ddistill_ptr, row, K, distill_strides, teacher_strides,
            scale, distill_grad, ALIGN, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    tl.store(losses_ptr + row, loss)


@triton.jit(do_not_specialize=VARYING)
def _total_kernel(losses_ptr, loss_ptr, B, BLOCK: tl.constexpr):
    """loss = the sum of losses (B,). Grid: (1,): one order of adding, whatever ran before."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, B, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + row, mask=row < B, other=0.0)
    tl.store(loss_ptr, tl.sum(total, 0))


@triton.jit
def _scale_kernel(dloss_ptr, kept_ptr, out_ptr, size, inverse_unit, BLOCK: tl.constexpr):
    """out = kept * dloss * inverse_unit, contiguous. Grid: (ceil(size / BLOCK),)."""
    factor = tl.load(dloss_ptr) * inverse_unit
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(kept_ptr + here, mask=here < size, other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + here, value.to(out_ptr.dtype.element_ty), mask=here < size)


# --- launch settings: by registers and spills on sm_90 (test_triton_compile.py), not timed --------


def plan(K: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_K, num_warps): 8 elements of a head a thread, wide rows by 4096 columns."""
    block_k = min(4096, max(16, power_of_two(K)))
    return max(1, 512 // block_k), block_k, min(16, max(2, block_k // 256))


SCALE_BLOCK = 2048


# --- launchers -----------------------------------------------------------------------------------


def _check_forward(op, logits, distill_logits, teacher_logits, targets, options, grad_mask):
    alpha, temperature, smoothing = options
    if logits.ndim != 2 or 0 in logits.shape:
        fail(op, "logits", "of shape (B, K) with B, K >= 1", tuple(logits.shape))
    check_like(op, "logits", logits, logits.shape)
    check_like(op, "distill_logits", distill_logits, logits.shape, (logits.dtype,))
    check_like(op, "teacher_logits", teacher_logits, logits.shape)
    if targets.ndim == 1:
        check_like(op, "targets", targets, logits.shape[:1], (torch.int64,))
    else:
        check_like(op, "targets", targets, logits.shape)
    if len(grad_mask) != 2:
        fail(op, "grad_mask", "of 2 entries", len(grad_mask))
    for name, value in (("alpha", alpha), ("label_smoothing", smoothing)):
        if not 0.0 <= value <= 1.0:
            fail(op, name, "in [0, 1]", value)
    if not 0.0 < temperature < float("inf"):
        fail(op, "temperature", "positive and finite", temperature)


def distillation_loss_fwd(
    logits, distill_logits, teacher_logits, targets, alpha, temperature, hard, label_smoothing,
    per_class, grad_mask,
):  # fmt: skip
    op, tensors = "distillation_loss_fwd", (logits, distill_logits, teacher_logits, targets)
    _check_forward(op, *tensors, (alpha, temperature, label_smoothing), grad_mask)
    B, K = logits.shape
    class_weight = (1.0 - alpha) / B
    distill_weight = alpha / (B * K if per_class and not hard else B)
    class_unit, distill_unit = units(logits.dtype, B, K, per_class)
    distill_grad = distill_weight * (1.0 if hard else temperature) * distill_unit
    grads = [
        torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if wanted else None
        for wanted in grad_mask
    ]
    losses = torch.empty(B, dtype=torch.float32, device=logits.device)
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    block_r, block_k, num_warps = plan(K)
    pairs = [t.stride() if t.ndim == 2 else (0, 0) for t in tensors]
    align = math.gcd(K, 16, *(pair[0] for pair in pairs))
    strides = [(pair[0] // align, pair[1]) for pair in pairs]
    with on_device(logits):
        _forward_kernel[(cdiv(B, block_r),)](
            *tensors, *grads, losses, B, K // align, *strides, targets.stride(0),
            class_weight, distill_weight, class_weight * class_unit, distill_grad,
            label_smoothing, 1.0 / temperature, SOFT_TARGETS=targets.ndim == 2, HARD=hard,
            ALIGN=align, BLOCK_R=block_r, BLOCK_K=block_k, num_warps=num_warps,
        )  # fmt: skip
        _total_kernel[(1,)](losses, loss, B, BLOCK=1024, num_warps=4)
    return loss, *grads


def distillation_loss_bwd(dloss, dlogits, ddistill, per_class, output_mask):
    op, kept = "distillation_loss_bwd", (dlogits, ddistill)
    check_like(op, "dloss", dloss, (), (torch.float32,))
    check_wanted(op, output_mask, {"dlogits": dlogits, "ddistill": ddistill})
    like = next((t for t in kept if t is not None), None)
    if like is None:
        return None, None
    if like.ndim != 2:
        fail(op, "dlogits", "of shape (B, K)", tuple(like.shape))
    for name, tensor in (("dlogits", dlogits), ("ddistill", ddistill)):
        check_like(op, name, tensor, like.shape, FLOATS)
    return tuple(
        _scaled(dloss, t, unit) if wanted else None
        for t, unit, wanted in zip(
            kept, units(like.dtype, *like.shape, per_class), output_mask, strict=True
        )
    )


def _scaled(dloss, kept, unit):
    kept = kept.contiguous()
    out = torch.empty_like(kept)
    with on_device(kept):
        _scale_kernel[(cdiv(kept.numel(), SCALE_BLOCK),)](
            dloss, kept, out, kept.numel(), 1.0 / unit, BLOCK=SCALE_BLOCK, num_warps=4
        )
    return out
