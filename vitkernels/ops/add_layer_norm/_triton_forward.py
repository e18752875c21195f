"""Triton forward of add_layer_norm and layer_norm_add, and what their backward shares with it.

    add_layer_norm   z = residual + row_scale[b] * gamma * dropout(x);  y = LayerNorm(z)
    layer_norm_add   y = residual + row_scale[b] * LayerNorm(x)

Rows of up to RESIDENT_COLUMNS columns stay in registers; longer ones are read again for each pass.
Strides are (outer, inner, column): row r = i * inner_rows + j lies at i * outer + j * inner.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import (
    FLOATS,
    cdiv,
    check_dropout,
    check_like,
    collapse_rows,
    dropout_scalars,
    fail,
    keep_mask,
    load_columns,
    on_device,
    power_of_two,
)

RESIDENT_COLUMNS = 8192
LOOP_COLUMNS = 4096
VARYING = ["rows", "rows_per_sample", "inner_rows", "rows_per_program", "programs", "threshold"]


# --- mathematics shared by forward and backward ------------------------------------------------


@triton.jit
def through_branch(value, index, gamma, scale, seed_ptr, threshold, keep_scale):
    """row_scale * gamma * keep / (1 - p) * value: x in the forward, g in the backward."""
    if scale is not None:
        value = tl.where(scale != 0.0, value, 0.0)
    if seed_ptr is not None:
        value = value * tl.where(keep_mask(tl.load(seed_ptr), index, threshold), keep_scale, 0.0)
    if gamma is not None:
        value = value * gamma
    if scale is not None:
        value = value * scale
    return value


@triton.jit
def load_rows(ptr, row, col, mask, inner_rows, strides):
    """A (rows, columns) tile in fp32; a None pointer is a tensor of zeros."""
    if ptr is None:
        return tl.zeros(mask.shape, tl.float32)
    else:
        outer = row // inner_rows
        inner = row - outer * inner_rows
        offset = outer.to(tl.int64) * strides[0] + inner.to(tl.int64) * strides[1]
        pointers = ptr + offset[:, None] + (col.to(tl.int64) * strides[2])[None, :]
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, value, row, col, mask, C):
    offset = row.to(tl.int64)[:, None] * C + col[None, :]
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_row_scale(ptr, row, rows, rows_per_sample):
    return tl.load(ptr + row // rows_per_sample, mask=row < rows, other=0.0)[:, None]


@triton.jit
def read_mask(mask, scale):
    """Rows whose scale is 0 are dropped, not read: NaN or Inf in a dropped row stays there."""
    if scale is None:
        return mask
    else:
        return mask & (scale != 0.0)


# --- forward -------------------------------------------------------------------------------------


@triton.jit
def _load_z(
    x_ptr, residual_ptr, gamma_ptr, seed_ptr, row, col, mask, scale, C, inner_rows, x_strides,
    residual_strides, threshold, keep_scale, ADD_AFTER: tl.constexpr,
):  # fmt: skip
    """What is normalized, as an fp32 tile; a sum is rounded as new_residual stores it."""
    if residual_ptr is None or ADD_AFTER:
        return load_rows(x_ptr, row, col, mask, inner_rows, x_strides)
    else:
        x = load_rows(x_ptr, row, col, read_mask(mask, scale), inner_rows, x_strides)
        residual = load_rows(residual_ptr, row, col, mask, inner_rows, residual_strides)
        gamma = load_columns(gamma_ptr, col, C, 1.0)
        index = row.to(tl.int64)[:, None] * C + col[None, :]
        z = residual + through_branch(x, index, gamma, scale, seed_ptr, threshold, keep_scale)
        return z.to(residual_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _store_normalized(
    z, mean, rstd, y_ptr, residual_ptr, weight_ptr, bias_ptr, row, col, mask, scale, C, inner_rows,
    residual_strides, ADD_AFTER: tl.constexpr,
):  # fmt: skip
    y = (z - mean[:, None]) * rstd[:, None]
    y = y * load_columns(weight_ptr, col, C, 1.0) + load_columns(bias_ptr, col, C, 0.0)
    if ADD_AFTER:
        y = through_branch(y, None, None, scale, None, 0, 0.0)
        y += load_rows(residual_ptr, row, col, mask, inner_rows, residual_strides)
    store_rows(y_ptr, y, row, col, mask, C)


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, gamma_ptr, row_scale_ptr, seed_ptr,
    y_ptr, new_residual_ptr, mean_ptr, rstd_ptr,
    rows, C, rows_per_sample, inner_rows, x_strides, residual_strides, eps, threshold, keep_scale,
    ADD_AFTER: tl.constexpr, RESIDENT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Both forwards (ADD_AFTER: layer_norm_add). Grid: (ceil(rows / BLOCK_R),).

    RESIDENT: BLOCK_C >= C, z stays in registers and the variance is the mean square of z - mean.
    Otherwise the statistics of the column blocks are merged (Chan), and z is computed a second time
    for y. Limits: rows < 2^31 - BLOCK_R.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_C)
    scale = row_scale_ptr
    if row_scale_ptr is not None:
        scale = load_row_scale(row_scale_ptr, row, rows, rows_per_sample)

    if RESIDENT:
        mask = (row < rows)[:, None] & (col < C)[None, :]
        z = _load_z(
            x_ptr, residual_ptr, gamma_ptr, seed_ptr, row, col, mask, scale, C, inner_rows,
            x_strides,
            residual_strides, threshold, keep_scale, ADD_AFTER,
        )  # fmt: skip
        if new_residual_ptr is not None:
            store_rows(new_residual_ptr, z, row, col, mask, C)
        mean = tl.sum(z, 1) / C
        centred = tl.where((col < C)[None, :], z - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) / C
    else:
        mean = tl.zeros((BLOCK_R,), tl.float32)
        squares = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, C, BLOCK_C):
            here = start + col
            mask = (row < rows)[:, None] & (here < C)[None, :]
            z = _load_z(
                x_ptr, residual_ptr, gamma_ptr, seed_ptr, row, here, mask, scale, C, inner_rows,
                x_strides,
                residual_strides, threshold, keep_scale, ADD_AFTER,
            )  # fmt: skip
            if new_residual_ptr is not None:
                store_rows(new_residual_ptr, z, row, here, mask, C)
            seen = start * 1.0
            count = tl.minimum(C - start, BLOCK_C) * 1.0
            block_mean = tl.sum(z, 1) / count
            centred = tl.where((here < C)[None, :], z - block_mean[:, None], 0.0)
            delta = block_mean - mean
            mean += delta * (count / (seen + count))
            squares += tl.sum(centred * centred, 1)
            squares += delta * delta * (seen * (count / (seen + count)))
        variance = squares / C

    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)

    if RESIDENT:
        _store_normalized(
            z, mean, rstd, y_ptr, residual_ptr, weight_ptr, bias_ptr, row, col, mask, scale, C,
            inner_rows,
            residual_strides, ADD_AFTER,
        )  # fmt: skip
    else:
        for start in range(0, C, BLOCK_C):
            here = start + col
            mask = (row < rows)[:, None] & (here < C)[None, :]
            z = _load_z(
                x_ptr, residual_ptr, gamma_ptr, seed_ptr, row, here, mask, scale, C, inner_rows,
                x_strides,
                residual_strides, threshold, keep_scale, ADD_AFTER,
            )  # fmt: skip
            _store_normalized(
                z, mean, rstd, y_ptr, residual_ptr, weight_ptr, bias_ptr, row, here, mask, scale, C,
                inner_rows,
                residual_strides, ADD_AFTER,
            )  # fmt: skip


# --- launch settings: by registers and spills on sm_90 (test_triton_compile.py), not timed ------


def forward_plan(C: int) -> tuple[bool, int, int, int]:
    """(RESIDENT, BLOCK_R, BLOCK_C, num_warps): 32 elements a thread, one warp to C = 1024."""
    if C > RESIDENT_COLUMNS:
        return False, 1, LOOP_COLUMNS, 8
    block_c = max(16, power_of_two(C))
    return True, max(1, min(32, 1024 // block_c)), block_c, max(1, block_c // 1024)


# --- launchers -----------------------------------------------------------------------------------


def contiguous(*vectors):
    return [None if v is None else v.contiguous() for v in vectors]


def rows_per_sample(rows, row_scale):
    return 1 if row_scale is None else rows // max(1, row_scale.numel())


def check_norm(op, name, x, others, vectors, row_scale, seed=None, dropout_p=0.0, out_dtype=None):
    """Checks x, called `name`, {name: tensor} of x's shape and of shape (C,), and the options."""
    if x.ndim == 0 or x.shape[-1] == 0:
        fail(op, name, "of shape (..., C) with C >= 1", tuple(x.shape))
    check_like(op, name, x, x.shape)
    for other, tensor in others.items():
        check_like(op, other, tensor, x.shape)
    for vector, tensor in vectors.items():
        check_like(op, vector, tensor, x.shape[-1:])
    check_like(op, "row_scale", row_scale, x.shape[:-1][:1], (torch.float32,))
    check_dropout(op, seed, dropout_p)
    if out_dtype is not None and out_dtype not in FLOATS:
        fail(op, "the output's dtype", "float32, bfloat16 or float16", out_dtype)


def check_statistics(op, z, mean, rstd):
    check_like(op, "mean", mean, z.shape[:-1], (torch.float32,))
    check_like(op, "rstd", rstd, z.shape[:-1], (torch.float32,))


def _launch_forward(
    x, residual, weight, bias, gamma, row_scale, seed, dropout_p, eps, y, new_residual, add_after
):
    C = x.shape[-1]
    rows = y.numel() // C
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    inner_rows, (x, residual), strides = collapse_rows(x, residual)
    weight, bias, gamma, row_scale = contiguous(weight, bias, gamma, row_scale)
    resident, block_r, block_c, num_warps = forward_plan(C)
    with on_device(y):
        _forward_kernel[(cdiv(rows, block_r),)](
            x, residual, weight, bias, gamma, row_scale, seed, y, new_residual, mean, rstd,
            rows, C, rows_per_sample(rows, row_scale), inner_rows, *strides, eps,
            *dropout_scalars(dropout_p),
            ADD_AFTER=add_after, RESIDENT=resident, BLOCK_R=block_r, BLOCK_C=block_c,
            num_warps=num_warps,
        )  # fmt: skip
    return mean, rstd


def add_layer_norm_fwd(
    x, residual, weight, bias, gamma, row_scale, seed, dropout_p, eps, out_dtype
):
    op = "add_layer_norm_fwd"
    vectors = {"weight": weight, "bias": bias, "gamma": gamma}
    options = (row_scale, seed, dropout_p, out_dtype)
    check_norm(op, "x", x, {"residual": residual}, vectors, *options)
    if residual is None and not (gamma is None and row_scale is None and dropout_p == 0):
        fail(op, "residual", "a tensor when the branch is scaled or dropped", None)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    new_residual = None
    if residual is not None:
        new_residual = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    seed = seed if dropout_p > 0 else None
    mean, rstd = _launch_forward(
        x, residual, weight, bias, gamma, row_scale, seed, dropout_p, eps, y, new_residual,
        add_after=False,
    )  # fmt: skip
    return y, new_residual, mean, rstd


def layer_norm_add_fwd(x, residual, weight, bias, row_scale, eps):
    vectors = {"weight": weight, "bias": bias}
    check_norm("layer_norm_add_fwd", "x", x, {"residual": residual}, vectors, row_scale)
    out = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    mean, rstd = _launch_forward(
        x, residual, weight, bias, None, row_scale, None, 0.0, eps, out, None, add_after=True
    )
    return out, mean, rstd
