"""Triton backward of add_layer_norm and layer_norm_add.

    wdy = weight * dy
    g = dnew_residual + rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)), which is dresidual
    dx = row_scale[b] * gamma * keep / (1 - p) * g

A fixed number of programs runs over contiguous runs of rows, each leaving one partial sum of
dweight, dbias and dgamma, which a second kernel adds in a fixed order: no atomics, the same bits
every time. Rows of more than RESIDENT_COLUMNS columns take two steps: one program per row, then one
per block of columns and run of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import (
    cdiv,
    collapse_rows,
    dropout_scalars,
    fail,
    load_columns,
    multiprocessors,
    on_device,
    power_of_two,
    store_partial,
)
from vitkernels.ops.add_layer_norm._triton_forward import (
    LOOP_COLUMNS,
    VARYING,
    check_norm,
    check_statistics,
    contiguous,
    load_row_scale,
    load_rows,
    read_mask,
    rows_per_sample,
    store_rows,
    through_branch,
)

RESIDENT_COLUMNS = 4096  # 8192 spills with dropout or an fp32 residual


@triton.jit
def _load_gradients(
    dy_ptr, dnew_residual_ptr, z_ptr, weight_ptr, row, col, mask, mean, rstd, scale, C, inner_rows,
    dy_strides, dnew_residual_strides, z_strides, SCALE_DY: tl.constexpr,
):  # fmt: skip
    """dy (scaled if the scale came after the normalization), weight * dy, xhat, dnew_residual."""
    if SCALE_DY:
        dy = load_rows(dy_ptr, row, col, read_mask(mask, scale), inner_rows, dy_strides)
        dy = through_branch(dy, None, None, scale, None, 0, 0.0)
    else:
        dy = load_rows(dy_ptr, row, col, mask, inner_rows, dy_strides)
    z = load_rows(z_ptr, row, col, mask, inner_rows, z_strides)
    xhat = (z - mean[:, None]) * rstd[:, None]
    dnew_residual = load_rows(dnew_residual_ptr, row, col, mask, inner_rows, dnew_residual_strides)
    return dy, dy * load_columns(weight_ptr, col, C, 1.0), xhat, dnew_residual


@triton.jit
def _z_gradient(dy_ptr, wdy, xhat, dnew_residual, rstd, wdy_xhat_mean, wdy_mean):
    """dnew_residual + the LayerNorm backward of dy."""
    if dy_ptr is None:
        return dnew_residual
    else:
        centred = wdy - wdy_mean[:, None] - xhat * wdy_xhat_mean[:, None]
        return dnew_residual + rstd[:, None] * centred


@triton.jit
def _store_gradients(
    dz, dx_ptr, dresidual_ptr, gamma_ptr, seed_ptr, row, col, mask, scale, C, threshold, keep_scale,
    SCALE_DY: tl.constexpr,
):  # fmt: skip
    if dresidual_ptr is not None:
        store_rows(dresidual_ptr, dz, row, col, mask, C)
    if dx_ptr is not None:
        dx = dz
        if not SCALE_DY:
            gamma = load_columns(gamma_ptr, col, C, 1.0)
            index = row.to(tl.int64)[:, None] * C + col[None, :]
            dx = through_branch(dz, index, gamma, scale, seed_ptr, threshold, keep_scale)
        store_rows(dx_ptr, dx, row, col, mask, C)


@triton.jit
def _gamma_gradient(
    dz, x_ptr, seed_ptr, row, col, mask, scale, C, inner_rows, x_strides, threshold, keep_scale,
):  # fmt: skip
    x = load_rows(x_ptr, row, col, read_mask(mask, scale), inner_rows, x_strides)
    index = row.to(tl.int64)[:, None] * C + col[None, :]
    return dz * through_branch(x, index, None, scale, seed_ptr, threshold, keep_scale)


@triton.jit(do_not_specialize=VARYING)
def _backward_kernel(
    dy_ptr, dnew_residual_ptr, z_ptr, mean_ptr, rstd_ptr, x_ptr, weight_ptr, gamma_ptr,
    row_scale_ptr, seed_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, dgamma_ptr,
    rows, C, rows_per_sample, inner_rows, rows_per_program,
    dy_strides, dnew_residual_strides, z_strides, x_strides, threshold, keep_scale,
    SCALE_DY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Both backwards for resident rows (SCALE_DY: layer_norm_add).

    Grid: (programs,), each a run of rows_per_program rows. dweight_ptr, dbias_ptr and dgamma_ptr
    are (programs, C) partial sums. Limits: C <= BLOCK_C, rows < 2^31 - BLOCK_R.
    """
    program = tl.program_id(0)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    col = tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dgamma = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)

    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < last)[:, None] & (col < C)[None, :]
        mean = tl.load(mean_ptr + row, mask=row < last, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < last, other=0.0)
        scale = row_scale_ptr
        if row_scale_ptr is not None:
            scale = load_row_scale(row_scale_ptr, row, last, rows_per_sample)
        dy, wdy, xhat, dnew_residual = _load_gradients(
            dy_ptr, dnew_residual_ptr, z_ptr, weight_ptr, row, col, mask, mean, rstd, scale, C,
            inner_rows, dy_strides, dnew_residual_strides, z_strides, SCALE_DY,
        )  # fmt: skip
        wdy_xhat_mean = tl.sum(wdy * xhat, 1) / C
        wdy_mean = tl.sum(wdy, 1) / C
        dz = _z_gradient(dy_ptr, wdy, xhat, dnew_residual, rstd, wdy_xhat_mean, wdy_mean)
        _store_gradients(
            dz, dx_ptr, dresidual_ptr, gamma_ptr, seed_ptr, row, col, mask, scale, C, threshold,
            keep_scale, SCALE_DY,
        )  # fmt: skip
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        if dgamma_ptr is not None:
            dgamma += _gamma_gradient(
                dz, x_ptr, seed_ptr, row, col, mask, scale, C, inner_rows, x_strides, threshold,
                keep_scale,
            )  # fmt: skip

    store_partial(dweight_ptr, dweight, program, col, C)
    store_partial(dbias_ptr, dbias, program, col, C)
    store_partial(dgamma_ptr, dgamma, program, col, C)


@triton.jit(do_not_specialize=VARYING)
def _backward_row_kernel(
    dy_ptr, dnew_residual_ptr, z_ptr, mean_ptr, rstd_ptr, weight_ptr, gamma_ptr, row_scale_ptr,
    seed_ptr, dx_ptr, dresidual_ptr, means_ptr,
    rows, C, rows_per_sample, inner_rows,
    dy_strides, dnew_residual_strides, z_strides, threshold, keep_scale,
    SCALE_DY: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Long rows, first step: dx, dresidual, and the means of each row. Grid: (rows,).

    means_ptr (rows, 2) holds mean(weight * dy * xhat) and mean(weight * dy) for the second step.
    """
    row = tl.program_id(0) + tl.arange(0, 1)
    col = tl.arange(0, BLOCK_C)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    scale = row_scale_ptr
    if row_scale_ptr is not None:
        scale = load_row_scale(row_scale_ptr, row, rows, rows_per_sample)
    wdy_xhat_sum = tl.zeros((1, BLOCK_C), tl.float32)
    wdy_sum = tl.zeros((1, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        here = start + col
        mask = (here < C)[None, :]
        _, wdy, xhat, _ = _load_gradients(
            dy_ptr, None, z_ptr, weight_ptr, row, here, mask, mean, rstd, scale, C, inner_rows,
            dy_strides, dnew_residual_strides, z_strides, SCALE_DY,
        )  # fmt: skip
        wdy_xhat_sum += wdy * xhat
        wdy_sum += wdy
    wdy_xhat_mean = tl.sum(wdy_xhat_sum, 1) / C
    wdy_mean = tl.sum(wdy_sum, 1) / C
    tl.store(means_ptr + 2 * row.to(tl.int64), wdy_xhat_mean)
    tl.store(means_ptr + 2 * row.to(tl.int64) + 1, wdy_mean)

    for start in range(0, C, BLOCK_C):
        here = start + col
        mask = (here < C)[None, :]
        _, wdy, xhat, dnew_residual = _load_gradients(
            dy_ptr, dnew_residual_ptr, z_ptr, weight_ptr, row, here, mask, mean, rstd, scale, C,
            inner_rows, dy_strides, dnew_residual_strides, z_strides, SCALE_DY,
        )  # fmt: skip
        dz = _z_gradient(dy_ptr, wdy, xhat, dnew_residual, rstd, wdy_xhat_mean, wdy_mean)
        _store_gradients(
            dz, dx_ptr, dresidual_ptr, gamma_ptr, seed_ptr, row, here, mask, scale, C, threshold,
            keep_scale, SCALE_DY,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _backward_column_kernel(
    dy_ptr, dnew_residual_ptr, z_ptr, mean_ptr, rstd_ptr, means_ptr, x_ptr, weight_ptr,
    row_scale_ptr, seed_ptr, dweight_ptr, dbias_ptr, dgamma_ptr,
    rows, C, rows_per_sample, inner_rows, rows_per_program,
    dy_strides, dnew_residual_strides, z_strides, x_strides, threshold, keep_scale,
    SCALE_DY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Long rows, second step: partial sums (programs, C) of the parameter gradients.

    Grid: (ceil(C / BLOCK_C), programs).
    """
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = tl.program_id(1)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dgamma = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)

    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < last)[:, None] & (col < C)[None, :]
        mean = tl.load(mean_ptr + row, mask=row < last, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < last, other=0.0)
        scale = row_scale_ptr
        if row_scale_ptr is not None:
            scale = load_row_scale(row_scale_ptr, row, last, rows_per_sample)
        dy, wdy, xhat, dnew_residual = _load_gradients(
            dy_ptr, dnew_residual_ptr, z_ptr, weight_ptr, row, col, mask, mean, rstd, scale, C,
            inner_rows, dy_strides, dnew_residual_strides, z_strides, SCALE_DY,
        )  # fmt: skip
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        if dgamma_ptr is not None:
            means = means_ptr + 2 * row.to(tl.int64)
            wdy_xhat_mean = tl.load(means, mask=row < last, other=0.0)
            wdy_mean = tl.load(means + 1, mask=row < last, other=0.0)
            dz = _z_gradient(dy_ptr, wdy, xhat, dnew_residual, rstd, wdy_xhat_mean, wdy_mean)
            dgamma += _gamma_gradient(
                dz, x_ptr, seed_ptr, row, col, mask, scale, C, inner_rows, x_strides, threshold,
                keep_scale,
            )  # fmt: skip

    store_partial(dweight_ptr, dweight, program, col, C)
    store_partial(dbias_ptr, dbias, program, col, C)
    store_partial(dgamma_ptr, dgamma, program, col, C)


@triton.jit
def _store_parameter(ptr, gradient, col, C, chosen):
    if ptr is not None:  # noqa: SIM102 (decided when compiling; the next one when running)
        if chosen:
            tl.store(ptr + col, gradient.to(ptr.dtype.element_ty), mask=col < C)


@triton.jit(do_not_specialize=VARYING)
def _sum_partials_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, dgamma_ptr, programs, C,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums partial_ptr (3, programs, C) over the programs. Grid: (ceil(C / BLOCK_C), 3)."""
    which = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        offset = (which * programs + part).to(tl.int64)[:, None] * C + col[None, :]
        mask = (part < programs)[:, None] & (col < C)[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    gradient = tl.sum(total, 0)
    _store_parameter(dweight_ptr, gradient, col, C, which == 0)
    _store_parameter(dbias_ptr, gradient, col, C, which == 1)
    _store_parameter(dgamma_ptr, gradient, col, C, which == 2)


# --- launch settings: by registers and spills on sm_90 (test_triton_compile.py), not timed ------


def backward_plan(rows: int, C: int, processors: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_R, BLOCK_C, num_warps, rows_per_program, programs).

    About 8 elements a thread, because nine tensors of them live at once.
    """
    if C > RESIDENT_COLUMNS:
        block_r, block_c, num_warps, most = 8, 128, 4, max(1, processors // 16)
    else:
        block_c = max(16, power_of_two(C))
        block_r, num_warps = max(1, 1024 // block_c), min(16, max(4, block_c // 256))
        most = processors * max(1, 16 // num_warps)
    rows_per_program = cdiv(cdiv(max(rows, 1), most), block_r) * block_r
    programs = cdiv(max(rows, 1), rows_per_program)
    return block_r, block_c, num_warps, rows_per_program, programs


# --- launchers -----------------------------------------------------------------------------------


def _launch_backward(
    dy, dnew_residual, z, mean, rstd, x, weight, gamma, row_scale, seed, dropout_p, dx, dresidual,
    dweight, dbias, dgamma, scale_dy,
):  # fmt: skip
    C = z.shape[-1]
    rows = mean.numel()
    inner_rows, (dy, dnew_residual, z, x), strides = collapse_rows(dy, dnew_residual, z, x)
    vectors = (mean, rstd, weight, gamma, row_scale)
    mean, rstd, weight, gamma, row_scale = contiguous(*vectors)
    plan = backward_plan(rows, C, multiprocessors(z.device))
    block_r, block_c, num_warps, rows_per_program, programs = plan
    parameters = (dweight, dbias, dgamma)
    wanted = any(p is not None for p in parameters)
    partial = torch.empty((3, programs, C) if wanted else 0, dtype=torch.float32, device=z.device)
    partials = [None if p is None else partial[i] for i, p in enumerate(parameters)]
    sizes = (rows, C, rows_per_sample(rows, row_scale), inner_rows)
    dropout = dropout_scalars(dropout_p)
    with on_device(z):
        if C <= RESIDENT_COLUMNS:
            _backward_kernel[(programs,)](
                dy, dnew_residual, z, mean, rstd, x, weight, gamma, row_scale, seed,
                dx, dresidual, *partials, *sizes, rows_per_program, *strides, *dropout,
                SCALE_DY=scale_dy, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=num_warps,
            )  # fmt: skip
        else:
            means = torch.empty((rows, 2), dtype=torch.float32, device=z.device)
            _backward_row_kernel[(rows,)](
                dy, dnew_residual, z, mean, rstd, weight, gamma, row_scale, seed,
                dx, dresidual, means, *sizes, *strides[:3], *dropout,
                SCALE_DY=scale_dy, BLOCK_C=LOOP_COLUMNS, num_warps=8,
            )  # fmt: skip
            if wanted:
                _backward_column_kernel[(cdiv(C, block_c), programs)](
                    dy, dnew_residual, z, mean, rstd, means, x, weight, row_scale, seed,
                    *partials, *sizes, rows_per_program, *strides, *dropout,
                    SCALE_DY=scale_dy, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=num_warps,
                )  # fmt: skip
        if wanted:
            _sum_partials_kernel[(cdiv(C, 32), 3)](
                partial, dweight, dbias, dgamma, programs, C, BLOCK_P=32, BLOCK_C=32, num_warps=4
            )


def _empty_like(parameter, wanted, z):
    """The gradient of a (C,) parameter, or None; None where the parameter itself is missing."""
    if not wanted or parameter is None:
        return None
    return torch.empty(z.shape[-1], dtype=parameter.dtype, device=z.device)


def add_layer_norm_bwd(
    dy, dnew_residual, z, mean, rstd, x, weight, bias, gamma, row_scale, seed, dropout_p, x_dtype,
    output_mask,
):  # fmt: skip
    op = "add_layer_norm_bwd"
    others = {"dy": dy, "dnew_residual": dnew_residual, "x": x}
    vectors = {"weight": weight, "bias": bias, "gamma": gamma}
    check_norm(op, "z", z, others, vectors, row_scale, seed, dropout_p, x_dtype)
    check_statistics(op, z, mean, rstd)
    if output_mask[4] and gamma is not None and x is None:
        fail(op, "x", "a tensor when dgamma is wanted", None)
    like = {"device": z.device}
    dx = torch.empty(z.shape, dtype=x_dtype, **like) if output_mask[0] else None
    dresidual = torch.empty(z.shape, dtype=z.dtype, **like) if output_mask[1] else None
    dweight, dbias, dgamma = (
        _empty_like(p, m, z) for p, m in zip((weight, bias, gamma), output_mask[2:], strict=True)
    )
    gradients = (dx, dresidual, dweight, dbias, dgamma)
    if dy is None and dnew_residual is None:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return gradients
    _launch_backward(
        dy, dnew_residual, z, mean, rstd, x if dgamma is not None else None, weight, gamma,
        row_scale, seed if dropout_p > 0 else None, dropout_p, *gradients, scale_dy=False,
    )  # fmt: skip
    return gradients


def layer_norm_add_bwd(dout, x, mean, rstd, weight, bias, row_scale, output_mask):
    op, vectors = "layer_norm_add_bwd", {"weight": weight, "bias": bias}
    check_norm(op, "x", x, {"dout": dout}, vectors, row_scale)
    check_statistics(op, x, mean, rstd)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if output_mask[0] else None
    dweight = _empty_like(weight, output_mask[1], x)
    dbias = _empty_like(bias, output_mask[2], x)
    _launch_backward(
        dout, None, x, mean, rstd, None, weight, None, row_scale, None, 0.0, dx, None,
        dweight, dbias, None, scale_dy=True,
    )  # fmt: skip
    return dx, dweight, dbias
