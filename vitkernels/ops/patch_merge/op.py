"""patch_merge_layer_norm: public function, backends, schemas, fakes, autograd."""

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
from . import reference

Tensor = torch.Tensor
EVERY_FLOAT = _checks.FLOAT_DTYPES


# Order of preference. x, weight, bias and y each have their own dtype.
BACKENDS = (
    Backend("cpu"),
    Backend("cuda"),
    Backend("triton"),
    Backend("torch", EVERY_FLOAT),
    Backend("reference", EVERY_FLOAT),
)


def patch_merge_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """2 x 2 patch merging and LayerNorm in one pass: what Swin does between two stages, before the
    reduction.

    ``y = LayerNorm(merge(x)) * weight + bias``; ``merge`` joins the channels of pixels (0,0),
    (1,0), (0,1), (1,1) (row, column) of each 2 x 2 patch, zeros standing for pixels beyond an odd
    edge; biased variance over the 4 * C channels.

    Args:
        x: (B, H, W, C), fp32, bf16, fp16 (float64: reference). Any strides.
        weight, bias: LayerNorm parameters, (4 * C,), or None for 1 and 0. They may stay fp32.
        eps: added to the variance.
        backend: None or one of "cpu", "cuda", "triton", "torch", "reference"; see
        ``vitkernels.use_backend``.

    Returns:
        y: (B, ceil(H / 2), ceil(W / 2), 4 * C), contiguous, in x's dtype (under torch.autocast: the
        autocast dtype).

    Raises:
        TypeError, ValueError: naming the operator, the argument, what was expected and what came.

    Source: Liu et al. 2021, section 3.1 (Swin).
    """
    _check(x, weight, bias, eps)
    out_dtype = computed_dtype(x.dtype, x.device)
    dtypes = tuple(t.dtype for t in (x, weight, bias) if t is not None) + (out_dtype,)
    training = needs_autograd(x, weight, bias)
    sizes = (4 * x.shape[-1],)
    chosen = choose(
        "patch_merge_layer_norm",
        BACKENDS,
        backend,
        x.device,
        dtypes,
        training=training,
        sizes=sizes,
    )
    args = (x, weight, bias, float(eps), out_dtype)
    if chosen == "torch":
        return _stock(*args)
    if training:
        return _PatchMergeLayerNorm.apply(chosen, *args)[0]
    return overload("patch_merge_layer_norm_fwd", chosen)(*args)[0]


# --- checks ---------------------------------------------------------------------------------------


def _check(x, weight, bias, eps):
    op = "patch_merge_layer_norm"
    _checks.tensor(op, "x", x, ndim=4, meaning="(B, H, W, C)")
    if 0 in x.shape[1:]:
        _checks.fail(op, "x", "of shape (B, H, W, C) with H, W, C >= 1", _checks.describe(x))
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            shape = (4 * x.shape[3],)
            _checks.tensor(op, name, parameter, like=x, shape=shape, meaning="(4 * C,)")
    _checks.eps(op, eps)


# --- backend "torch": stock operators, visible to autograd and torch.compile ----------------------


def _stock(x, weight, bias, eps, out_dtype):
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
        return F.layer_norm(reference.merge(x), (4 * x.shape[3],), weight, bias, eps).to(out_dtype)


# --- raw operators --------------------------------------------------------------------------------


def _fake_patch_merge_layer_norm_fwd(x, weight, bias, eps, out_dtype):
    B, H, W, C = x.shape
    merged = (B, (H + 1) // 2, (W + 1) // 2)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = (x.new_empty(merged, dtype=dtype) for _ in range(2))
    return x.new_empty((*merged, 4 * C), dtype=out_dtype), mean, rstd


def _fake_patch_merge_layer_norm_bwd(dy, x, mean, rstd, weight, bias, output_mask):
    return tuple(
        t.new_empty(t.shape) if wanted else None
        for t, wanted in zip((x, weight, bias), output_mask, strict=True)
    )


declare(
    "patch_merge_layer_norm_fwd",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=_fake_patch_merge_layer_norm_fwd,
    reference=reference.patch_merge_layer_norm_fwd,
    regime=lambda x, *_: ("patch_merge_layer_norm", (4 * x.shape[-1],), ""),
)
declare(
    "patch_merge_layer_norm_bwd",
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias,"
    " bool[] output_mask) -> (Tensor? dx, Tensor? dweight, Tensor? dbias)",
    fake=_fake_patch_merge_layer_norm_bwd,
    reference=reference.patch_merge_layer_norm_bwd,
    regime=lambda dy, x, *_: ("patch_merge_layer_norm", (4 * x.shape[-1],), ""),
)


# --- autograd -------------------------------------------------------------------------------------


@keep_signature
class _PatchMergeLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(backend, *args):
        return overload("patch_merge_layer_norm_fwd", backend)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        backend, x, weight, bias, _, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.backend = backend

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy, _dmean, _drstd):
        if dy is None:
            return (None,) * 6
        output_mask = list(ctx.needs_input_grad[1:4])
        grads = overload("patch_merge_layer_norm_bwd", ctx.backend)(dy, *saved, output_mask)
        return None, *grads, None, None
