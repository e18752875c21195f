"""add_layer_norm and layer_norm_add: public functions, backends, schemas, fakes, autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import _checks
from ..._autograd import once_differentiable
from ..._dispatch import (
    Backend,
    choose,
    computed_dtype,
    declare,
    keep_signature,
    needs_autograd,
    overload,
)
from .._random import draw_seed
from . import reference

Tensor = torch.Tensor
EVERY_FLOAT = _checks.FLOAT_DTYPES

# Order of preference. Every kernel takes any C, any layout, and x, residual and y in fp32, bf16 or
# fp16 independently.
BACKENDS = (
    Backend("cpu"),
    Backend("cuda"),
    Backend("triton"),
    Backend("torch", EVERY_FLOAT),
    Backend("reference", EVERY_FLOAT),
)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual add and LayerNorm in one pass, with dropout, LayerScale and DropPath on the branch.

    ``new_residual = residual + row_scale[b] * gamma * dropout(x)``; ``y = LayerNorm(new_residual) *
    weight + bias``, biased variance over the last dimension. With ``residual=None``: ``y =
    LayerNorm(x)``, and x itself is returned.

    Args:
        x: branch output, (..., C), fp32, bf16, fp16 (float64: reference). Any strides.
        residual: the residual stream, shape of x, its own dtype (bf16 branch with fp32 stream is
        usual), or None. weight, bias: LayerNorm parameters, (C,), or None for 1 and 0. They may
        stay fp32. eps: added to the variance.
        gamma: LayerScale, (C,), or None.
        row_scale: DropPath's factor of each sample, (x.shape[0],): 0 or 1 / keep_prob. It gets no
        gradient. A sample
            with factor 0 is not read.
        dropout_p: probability in [0, 1) of zeroing an element of x; kept ones are divided by 1 - p.
        out_dtype: dtype of y; default the autocast dtype under torch.autocast, else x.dtype.
        backend: None or one of "cpu", "cuda", "triton", "torch", "reference"; see
        ``vitkernels.use_backend``.

    Returns:
        (y, new_residual): y (..., C) in out_dtype, new_residual (..., C) in residual.dtype, both
        contiguous.

    Raises:
        TypeError, ValueError: naming the operator, the argument, what was expected and what came.

    Source: LayerNorm, Ba et al. 2016; LayerScale, Touvron et al. 2021 (CaiT); DropPath, Huang et
    al. 2016.
    """
    _check_add_layer_norm(x, residual, weight, bias, eps, gamma, row_scale, dropout_p, out_dtype)
    out_dtype = out_dtype or computed_dtype(x.dtype, x.device)
    tensors = (x, residual, weight, bias, gamma)
    dtypes = (*(t.dtype for t in tensors if t is not None), out_dtype)
    training = needs_autograd(*tensors)
    sizes = x.shape[-1:]
    chosen = choose(
        "add_layer_norm", BACKENDS, backend, x.device, dtypes, training=training, sizes=sizes
    )
    seed = draw_seed(x) if dropout_p > 0.0 else None
    row_scale = None if row_scale is None else row_scale.to(_stat_dtype(x)).contiguous()
    args = (*tensors, row_scale, seed, float(dropout_p), float(eps), out_dtype)
    if chosen == "torch":
        return _stock_add_layer_norm(*args)
    if training:
        y, new_residual, _, _ = _AddLayerNorm.apply(chosen, *args)
    else:
        y, new_residual, _, _ = overload("add_layer_norm_fwd", chosen)(*args)
    return y, x if residual is None else new_residual


def layer_norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    row_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm of the branch, then the residual add: the res-post-norm of SwinV2.

    ``out = residual + row_scale[b] * (LayerNorm(x) * weight + bias)``, biased variance over the
    last dimension.

    Args:
        x: branch output, (..., C), fp32, bf16, fp16 (float64: reference). Any strides.
        residual: the residual stream, shape of x, its own dtype.
        weight, bias: LayerNorm parameters, (C,), or None for 1 and 0. They may stay fp32.
        eps: added to the variance.
        row_scale: DropPath's factor of each sample, (x.shape[0],). It gets no gradient.
        backend: None or one of "cpu", "cuda", "triton", "torch", "reference"; see
        ``vitkernels.use_backend``.

    Returns:
        out: (..., C) in residual.dtype, contiguous.

    Raises:
        TypeError, ValueError: naming the operator, the argument, what was expected and what came.

    Source: Swin Transformer V2, Liu et al. 2022, section 3.2.
    """
    _check_layer_norm_add(x, residual, weight, bias, eps, row_scale)
    dtypes = tuple(t.dtype for t in (x, residual, weight, bias) if t is not None)
    training = needs_autograd(x, residual, weight, bias)
    sizes = x.shape[-1:]
    chosen = choose(
        "layer_norm_add", BACKENDS, backend, x.device, dtypes, training=training, sizes=sizes
    )
    row_scale = None if row_scale is None else row_scale.to(_stat_dtype(x)).contiguous()
    args = (x, residual, weight, bias, row_scale, float(eps))
    if chosen == "torch":
        return _stock_layer_norm_add(*args)
    if training:
        return _LayerNormAdd.apply(chosen, *args)[0]
    return overload("layer_norm_add_fwd", chosen)(*args)[0]


# --- checks ---------------------------------------------------------------------------------------


def _check_add_layer_norm(x, residual, weight, bias, eps, gamma, row_scale, dropout_p, out_dtype):
    op = "add_layer_norm"
    _check_layer_norm(op, x, weight, bias, eps, row_scale)
    _checks.dropout_p(op, dropout_p)
    if gamma is not None:
        _checks.tensor(op, "gamma", gamma, like=x, shape=x.shape[-1:], meaning="(C,)")
    if residual is not None:
        _checks.tensor(op, "residual", residual, like=x, shape=x.shape, meaning="the shape of x")
    elif gamma is not None or row_scale is not None or dropout_p > 0.0:
        got = "None beside gamma, row_scale or dropout_p"
        _checks.fail(op, "residual", "a tensor when the branch is scaled or dropped", got)
    if out_dtype is not None and out_dtype not in EVERY_FLOAT:
        _checks.fail(
            op, "out_dtype", "float32, bfloat16, float16 or float64", repr(out_dtype), TypeError
        )


def _check_layer_norm_add(x, residual, weight, bias, eps, row_scale):
    op = "layer_norm_add"
    _check_layer_norm(op, x, weight, bias, eps, row_scale)
    _checks.tensor(op, "residual", residual, like=x, shape=x.shape, meaning="the shape of x")


def _check_layer_norm(op, x, weight, bias, eps, row_scale):
    _checks.tensor(op, "x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        _checks.fail(op, "x", "of shape (..., C) with C >= 1", _checks.describe(x))
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _checks.tensor(op, name, parameter, like=x, shape=x.shape[-1:], meaning="(C,)")
    _checks.eps(op, eps)
    if row_scale is not None:
        if x.ndim < 2:
            _checks.fail(
                op, "x", "of shape (B, ..., C) when row_scale is given", _checks.describe(x)
            )
        _checks.tensor(op, "row_scale", row_scale, like=x, shape=x.shape[:1], meaning="(B,)")
        _checks.no_grad_tensor(op, "row_scale", row_scale)


# --- backend "torch": stock operators, visible to autograd and torch.compile ----------------------


def _stock_add_layer_norm(
    x, residual, weight, bias, gamma, row_scale, seed, dropout_p, eps, out_dtype
):
    z = x
    if residual is not None:
        z = (residual + reference.branch(x, gamma, row_scale, seed, dropout_p)).to(residual.dtype)
    return _stock_layer_norm(z, weight, bias, eps).to(out_dtype), z


def _stock_layer_norm_add(x, residual, weight, bias, row_scale, eps):
    y = _stock_layer_norm(x, weight, bias, eps)
    return (residual + reference.branch(y, None, row_scale, None, 0.0)).to(residual.dtype)


def _stock_layer_norm(x, weight, bias, eps):
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


# --- raw operators --------------------------------------------------------------------------------


def _stat_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _stats(x):
    return x.new_empty(x.shape[:-1], dtype=_stat_dtype(x))


def _fake_add_layer_norm_fwd(
    x, residual, weight, bias, gamma, row_scale, seed, dropout_p, eps, out_dtype
):
    y = x.new_empty(x.shape, dtype=out_dtype)
    z = x if residual is None else residual
    return y, None if residual is None else residual.new_empty(x.shape), _stats(z), _stats(z)


def _fake_add_layer_norm_bwd(
    dy,
    dnew_residual,
    z,
    mean,
    rstd,
    x,
    weight,
    bias,
    gamma,
    row_scale,
    seed,
    dropout_p,
    x_dtype,
    output_mask,
):
    like = (z.new_empty(z.shape, dtype=x_dtype), z.new_empty(z.shape), weight, bias, gamma)
    return tuple(
        t.new_empty(t.shape) if wanted else None
        for t, wanted in zip(like, output_mask, strict=True)
    )


def _fake_layer_norm_add_fwd(x, residual, weight, bias, row_scale, eps):
    return residual.new_empty(x.shape), _stats(x), _stats(x)


def _fake_layer_norm_add_bwd(dout, x, mean, rstd, weight, bias, row_scale, output_mask):
    return tuple(
        t.new_empty(t.shape) if wanted else None
        for t, wanted in zip((x, weight, bias), output_mask, strict=True)
    )


declare(
    "add_layer_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? gamma, Tensor? row_scale,"
    " Tensor? seed, float dropout_p, float eps, ScalarType out_dtype)"
    " -> (Tensor y, Tensor? new_residual, Tensor mean, Tensor rstd)",
    fake=_fake_add_layer_norm_fwd,
    reference=reference.add_layer_norm_fwd,
    regime=lambda x, *_: ("add_layer_norm", x.shape[-1:], ""),
)
declare(
    "add_layer_norm_bwd",
    "(Tensor? dy, Tensor? dnew_residual, Tensor z, Tensor mean, Tensor rstd, Tensor? x,"
    " Tensor? weight, Tensor? bias, Tensor? gamma, Tensor? row_scale, Tensor? seed,"
    " float dropout_p, ScalarType x_dtype, bool[] output_mask)"
    " -> (Tensor? dx, Tensor? dresidual, Tensor? dweight, Tensor? dbias, Tensor? dgamma)",
    fake=_fake_add_layer_norm_bwd,
    reference=reference.add_layer_norm_bwd,
    regime=lambda dy, dnew_residual, z, *_: ("add_layer_norm", z.shape[-1:], ""),
)
declare(
    "layer_norm_add_fwd",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? row_scale, float eps)"
    " -> (Tensor out, Tensor mean, Tensor rstd)",
    fake=_fake_layer_norm_add_fwd,
    reference=reference.layer_norm_add_fwd,
    regime=lambda x, *_: ("layer_norm_add", x.shape[-1:], ""),
)
declare(
    "layer_norm_add_bwd",
    "(Tensor dout, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias,"
    " Tensor? row_scale, bool[] output_mask) -> (Tensor? dx, Tensor? dweight, Tensor? dbias)",
    fake=_fake_layer_norm_add_bwd,
    reference=reference.layer_norm_add_bwd,
    regime=lambda dout, *_: ("layer_norm_add", dout.shape[-1:], ""),
)


# --- autograd -------------------------------------------------------------------------------------


@keep_signature
class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(backend, *args):
        return overload("add_layer_norm_fwd", backend)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        backend, x, residual, weight, bias, gamma, row_scale, seed, dropout_p, _, _ = inputs
        _, new_residual, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        z = x if residual is None else new_residual
        branch = (
            x if ctx.needs_input_grad[5] else None
        )  # only gamma's gradient reads the branch again
        ctx.save_for_backward(z, mean, rstd, branch, weight, bias, gamma, row_scale, seed)
        ctx.backend, ctx.dropout_p, ctx.x_dtype = backend, dropout_p, x.dtype
        ctx.has_residual = residual is not None

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy, dnew_residual, _dmean, _drstd):
        if dy is None and dnew_residual is None:
            return (None,) * 11
        z, mean, rstd, x, weight, bias, gamma, row_scale, seed = saved
        _, need_x, need_residual, need_weight, need_bias, need_gamma, *_ = ctx.needs_input_grad
        # An unscaled branch and the residual stream have one and the same gradient: it is computed
        # once.
        same = (
            ctx.has_residual
            and gamma is None
            and row_scale is None
            and seed is None
            and ctx.x_dtype == z.dtype
        )
        output_mask = [
            need_x and not same,
            need_residual or (need_x and same),
            need_weight and dy is not None,
            need_bias and dy is not None,
            need_gamma,
        ]
        dx, dresidual, dweight, dbias, dgamma = overload("add_layer_norm_bwd", ctx.backend)(
            dy, dnew_residual, z, mean, rstd, x, weight, bias, gamma, row_scale, seed,
            ctx.dropout_p, ctx.x_dtype, output_mask,
        )  # fmt: skip
        if same:
            dx, dresidual = dresidual if need_x else None, dresidual if need_residual else None
        return None, dx, dresidual, dweight, dbias, dgamma, None, None, None, None, None


@keep_signature
class _LayerNormAdd(torch.autograd.Function):
    @staticmethod
    def forward(backend, *args):
        return overload("layer_norm_add_fwd", backend)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        backend, x, _, weight, bias, row_scale, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, rstd, weight, bias, row_scale)
        ctx.backend = backend

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout, _dmean, _drstd):
        if dout is None:
            return (None,) * 7
        _, need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
        output_mask = [need_x, need_weight, need_bias]
        dx = dweight = dbias = None
        if any(output_mask):
            dx, dweight, dbias = overload("layer_norm_add_bwd", ctx.backend)(
                dout, *saved, output_mask
            )
        return None, dx, dout if need_residual else None, dweight, dbias, None, None
