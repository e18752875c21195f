"""Triton backend of patch_merge_layer_norm: forward and backward.

    row (b, i, j) of the merged map = pixels (2i + s % 2, 2j + s // 2) of x, s = 0..3
    y = (row - mean) * rstd * weight + bias
    dx = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)), wdy = weight * dy, to the same pixels

A row is a tile of four runs of BLOCK_C >= C columns, read and written where its pixels lie; beyond
an odd edge it holds zeros. A pixel belongs to one row, so dx needs no sum; dweight and dbias are
summed as in add_layer_norm: a run of rows a program, then the programs in order. Rows of more than
RESIDENT_COLUMNS columns are merged by stock operators, and add_layer_norm's kernels normalize them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import (
    FLOATS,
    cdiv,
    check_like,
    check_wanted,
    collapse_rows,
    fail,
    load_columns,
    multiprocessors,
    on_device,
    power_of_two,
    store_partial,
    sum_partials,
)
from vitkernels.ops.patch_merge import reference

RESIDENT_COLUMNS = 4096  # of a padded row; the backward holds nine tensors of it
VARYING = ["rows", "rows_per_program", "inner_rows"]


@triton.jit
def _columns(C, BLOCK_C: tl.constexpr):
    """(pixel s, channel, column s * C + channel, whether there is one) of a row's tile."""
    k = tl.arange(0, 4 * BLOCK_C)
    pixel = k // BLOCK_C
    channel = k % BLOCK_C
    return pixel, channel, pixel * C + channel, channel < C


@triton.jit
def _pixels(row, pixel, channel, real, rows, H, W, strides):
    """(offsets, mask) of a tile of rows in a map of these strides."""
    rows_h = (H + 1) // 2
    rows_w = (W + 1) // 2
    above = row // rows_w
    b = above // rows_h
    h = 2 * (above - b * rows_h)[:, None] + (pixel % 2)[None, :]
    w = 2 * (row - above * rows_w)[:, None] + (pixel // 2)[None, :]
    mask = (row < rows)[:, None] & real[None, :] & (h < H) & (w < W)
    offset = (b.to(tl.int64) * strides[0])[:, None] + h.to(tl.int64) * strides[1]
    offset += w.to(tl.int64) * strides[2] + (channel.to(tl.int64) * strides[3])[None, :]
    return offset, mask


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, H, W, C, x_strides, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(rows / BLOCK_R),). Limits: C <= BLOCK_C, rows < 2^31 - BLOCK_R."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    pixel, channel, col, real = _columns(C, BLOCK_C)
    offset, mask = _pixels(row, pixel, channel, real, rows, H, W, x_strides)
    z = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(z, 1) / (4 * C)
    centred = tl.where(real[None, :], z - mean[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / (4 * C) + eps))
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    # Columns that are none lie past every parameter, so that no value of theirs is read.
    there = tl.where(real, col, 4 * C)
    y = centred * rstd[:, None] * load_columns(weight_ptr, there, 4 * C, 1.0)
    y += load_columns(bias_ptr, there, 4 * C, 0.0)
    out = row.to(tl.int64)[:, None] * (4 * C) + col[None, :]
    inside = (row < rows)[:, None] & real[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _backward_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, H, W, C, rows_per_program, inner_rows, dy_strides, x_strides, dx_strides,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: (programs,), each a run of rows_per_program rows. dweight_ptr and dbias_ptr are
    (programs, 4 * C) partial sums. Limits: C <= BLOCK_C, rows < 2^31 - BLOCK_R."""
    program = tl.program_id(0)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    pixel, channel, col, real = _columns(C, BLOCK_C)
    there = tl.where(real, col, 4 * C)
    weight = load_columns(weight_ptr, there, 4 * C, 1.0)
    dweight = tl.zeros((BLOCK_R, 4 * BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_R, 4 * BLOCK_C), tl.float32)

    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row < last)[:, None] & real[None, :]
        outer = row // inner_rows
        inner = row - outer * inner_rows
        at = outer.to(tl.int64) * dy_strides[0] + inner.to(tl.int64) * dy_strides[1]
        at = at[:, None] + (col.to(tl.int64) * dy_strides[2])[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        offset, mask = _pixels(row, pixel, channel, real, last, H, W, x_strides)
        z = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < last, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < last, other=0.0)
        xhat = tl.where(inside, (z - mean[:, None]) * rstd[:, None], 0.0)
        if dx_ptr is not None:
            wdy = dy * weight
            wdy_mean = tl.sum(wdy, 1) / (4 * C)
            wdy_xhat_mean = tl.sum(wdy * xhat, 1) / (4 * C)
            centred = wdy - wdy_mean[:, None] - xhat * wdy_xhat_mean[:, None]
            offset, mask = _pixels(row, pixel, channel, real, last, H, W, dx_strides)
            dx = (rstd[:, None] * centred).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + offset, dx, mask=mask)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy

    store_partial(dweight_ptr, dweight, program, there, 4 * C)
    store_partial(dbias_ptr, dbias, program, there, 4 * C)


# --- launch settings: by registers and spills on sm_90 (test_triton_compile.py), not timed ------


def forward_plan(C: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_C, num_warps): 16 elements a thread, each with an address of its own."""
    block_c = max(4, power_of_two(C))
    return max(1, min(32, 128 // block_c)), block_c, max(1, block_c // 128)


def backward_plan(rows: int, C: int, processors: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_R, BLOCK_C, num_warps, rows_per_program, programs): 8 elements a thread."""
    block_c = max(4, power_of_two(C))
    block_r, num_warps = max(1, 256 // block_c), min(16, max(4, block_c // 64))
    most = processors * max(1, 16 // num_warps)
    rows_per_program = cdiv(cdiv(max(rows, 1), most), block_r) * block_r
    return block_r, block_c, num_warps, rows_per_program, cdiv(max(rows, 1), rows_per_program)


# --- launchers -----------------------------------------------------------------------------------


def _check(op, x, weight, bias):
    """The shape (B, ceil(H / 2), ceil(W / 2)) of the merged map, without its channels."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        fail(op, "x", "of shape (B, H, W, C) with H, W, C >= 1", tuple(x.shape))
    B, H, W, C = x.shape
    check_like(op, "x", x, x.shape)
    check_like(op, "weight", weight, (4 * C,))
    check_like(op, "bias", bias, (4 * C,))
    return B, cdiv(H, 2), cdiv(W, 2)


def _contiguous(vector):
    return None if vector is None else vector.contiguous()


def _is_resident(C):
    return 4 * power_of_two(C) <= RESIDENT_COLUMNS


def patch_merge_layer_norm_fwd(x, weight, bias, eps, out_dtype):
    op = "patch_merge_layer_norm_fwd"
    merged = _check(op, x, weight, bias)
    if out_dtype not in FLOATS:
        fail(op, "out_dtype", "float32, bfloat16 or float16", out_dtype)
    _, H, W, C = x.shape
    if not _is_resident(C):
        wide = (None, weight, bias, None, None, None, 0.0, eps, out_dtype)
        forward = torch.ops.vitkernels.add_layer_norm_fwd.triton
        y, _, mean, rstd = forward(reference.merge(x), *wide)
        return y, mean, rstd
    y = torch.empty((*merged, 4 * C), dtype=out_dtype, device=x.device)
    mean = torch.empty(merged, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    block_r, block_c, num_warps = forward_plan(C)
    with on_device(x):
        _forward_kernel[(cdiv(mean.numel(), block_r),)](
            x, _contiguous(weight), _contiguous(bias), y, mean, rstd, mean.numel(), H, W, C,
            x.stride(), eps, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=num_warps,
        )  # fmt: skip
    return y, mean, rstd


def patch_merge_layer_norm_bwd(dy, x, mean, rstd, weight, bias, output_mask):
    op = "patch_merge_layer_norm_bwd"
    merged = _check(op, x, weight, bias)
    columns = 4 * x.shape[3]
    check_like(op, "dy", dy, (*merged, columns))
    check_like(op, "mean", mean, merged, (torch.float32,))
    check_like(op, "rstd", rstd, merged, (torch.float32,))
    check_wanted(op, output_mask, {"x": x, "weight": weight, "bias": bias})
    if not _is_resident(x.shape[3]):
        return _wide_backward(dy, x, mean, rstd, weight, bias, output_mask)
    dx, dweight, dbias = (
        torch.empty(t.shape, dtype=t.dtype, device=x.device) if wanted else None
        for t, wanted in zip((x, weight, bias), output_mask, strict=True)
    )
    _launch_backward(dy, x, mean, rstd, weight, dx, dweight, dbias)
    return dx, dweight, dbias


def _launch_backward(dy, x, mean, rstd, weight, dx, dweight, dbias):
    _, H, W, C = x.shape
    rows = mean.numel()
    inner_rows, (dy,), (dy_strides,) = collapse_rows(dy)
    plan = backward_plan(rows, C, multiprocessors(x.device))
    block_r, block_c, num_warps, rows_per_program, programs = plan
    partials = [
        None if p is None else torch.empty((programs, 4 * C), dtype=torch.float32, device=x.device)
        for p in (dweight, dbias)
    ]
    dx_strides = x.stride() if dx is None else dx.stride()
    with on_device(x):
        _backward_kernel[(programs,)](
            dy, x, mean.contiguous(), rstd.contiguous(), _contiguous(weight), dx, *partials,
            rows, H, W, C, rows_per_program, inner_rows, dy_strides, x.stride(), dx_strides,
            BLOCK_R=block_r, BLOCK_C=block_c, num_warps=num_warps,
        )  # fmt: skip
    for partial, gradient in zip(partials, (dweight, dbias), strict=True):
        if gradient is not None:
            sum_partials(partial, gradient)


def _wide_backward(dy, x, mean, rstd, weight, bias, output_mask):
    mask = [False, output_mask[0], output_mask[1], output_mask[2], False]
    _, dz, dweight, dbias, _ = torch.ops.vitkernels.add_layer_norm_bwd.triton(
        dy, None, reference.merge(x), mean, rstd, None, weight, bias, None, None, None, 0.0,
        x.dtype, mask,
    )  # fmt: skip
    dx = None if dz is None else reference.unmerge(dz, x.shape[1:3]).contiguous()
    return dx, dweight, dbias
