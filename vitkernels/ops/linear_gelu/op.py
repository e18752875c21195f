"""linear_gelu and linear: public functions, backends, schemas, fakes, autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

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
    without_matrix_unit,
)
from . import reference
from .reference import ACTIVATIONS, IDENTITY

Tensor = torch.Tensor
EVERY_FLOAT = _checks.FLOAT_DTYPES


# Order of preference. x, weight and bias each have their own dtype; products are in y's.
BACKENDS = (
    Backend("cpu", auto=without_matrix_unit),
    Backend("cuda"),
    Backend("triton"),
    Backend("torch", EVERY_FLOAT),
    Backend("reference", EVERY_FLOAT),
)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    save_preactivation: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Linear layer and GELU in one pass: the first half of a Transformer's MLP.

    ``y = GELU(x weight^T + bias)``; bias and GELU act on the product before it is rounded.

    Args:
        x: (..., K), fp32, bf16, fp16 (float64: reference). Any strides.
        weight: (N, K). bias: (N,) or None. They may stay fp32 beside a 16-bit x: the product's
        operands are rounded to y's dtype, and each gradient has its parameter's dtype.
        approximate: "none" (erf), "tanh", or "quick" (h * sigmoid(1.702 h), OpenAI CLIP).
        save_preactivation: False recomputes ``x weight^T + bias`` in the backward: one more
        product, and one tensor of y's size less to keep.
        backend: None or one of "cpu", "cuda", "triton", "torch", "reference"; see
        ``vitkernels.use_backend``.

    Returns:
        y: (..., N), contiguous, in x's dtype (under torch.autocast: the autocast dtype).

    Raises:
        TypeError, ValueError: naming the operator, the argument, what was expected and what came.

    Source: GELU, Hendrycks and Gimpel 2016.
    """
    _check("linear_gelu", x, weight, bias)
    if not isinstance(approximate, str) or approximate not in ACTIVATIONS:
        _checks.fail("linear_gelu", "approximate", f"one of {[*ACTIVATIONS]}", repr(approximate))
    if not isinstance(save_preactivation, bool):
        got = _checks.describe(save_preactivation)
        _checks.fail("linear_gelu", "save_preactivation", "True or False", got, TypeError)
    activation = ACTIVATIONS[approximate]
    return _call("linear_gelu", x, weight, bias, activation, save_preactivation, backend)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Linear layer: ``y = x weight^T + bias``.

    Args:
        x: (..., K), fp32, bf16, fp16 (float64: reference). Any strides.
        weight: (N, K). bias: (N,) or None. They may stay fp32 beside a 16-bit x.
        backend: None or one of "cpu", "cuda", "triton", "torch", "reference"; see
        ``vitkernels.use_backend``.

    Returns:
        y: (..., N), contiguous, in x's dtype (under torch.autocast: the autocast dtype).

    Raises:
        TypeError, ValueError: naming the operator, the argument, what was expected and what came.

    Source: torch.nn.functional.linear, whose numbers it gives.
    """
    _check("linear", x, weight, bias)
    return _call("linear", x, weight, bias, IDENTITY, False, backend)


def _call(op, x, weight, bias, activation, save_preactivation, backend):
    out_dtype = computed_dtype(x.dtype, x.device)
    dtypes = tuple(t.dtype for t in (x, weight, bias) if t is not None) + (out_dtype,)
    training = needs_autograd(x, weight, bias)
    sizes = x.shape[-1:]
    chosen = choose(op, BACKENDS, backend, x.device, dtypes, training=training, sizes=sizes)
    args = (x, weight, bias, activation, save_preactivation, out_dtype)
    if chosen == "torch":
        return _stock(*args)
    if training:
        return _LinearGelu.apply(chosen, *args)[0]
    return overload("linear_gelu_fwd", chosen)(x, weight, bias, activation, False, out_dtype)[0]


# --- checks ---------------------------------------------------------------------------------------


def _check(op, x, weight, bias):
    _checks.tensor(op, "x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        _checks.fail(op, "x", "of shape (..., K) with K >= 1", _checks.describe(x))
    _checks.tensor(op, "weight", weight, like=x, ndim=2, meaning="(N, K)")
    if weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        expected = f"of shape (N, {x.shape[-1]}) = (N, K) with N >= 1"
        _checks.fail(op, "weight", expected, _checks.describe(weight))
    if bias is not None:
        _checks.tensor(op, "bias", bias, like=x, shape=weight.shape[:1], meaning="(N,)")


# --- backend "torch": stock operators, visible to autograd and torch.compile ----------------------


def _stock(x, weight, bias, activation, save_preactivation, out_dtype):
    parameters = (weight, bias)
    if not needs_autograd(x, *parameters) and _takes_onednn(x, weight, bias, out_dtype):
        return _onednn(x, weight, bias, activation)
    if activation != IDENTITY and not save_preactivation and needs_autograd(x, *parameters):
        return checkpoint(
            _stock_eager, x, weight, bias, activation, out_dtype,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return _stock_eager(x, weight, bias, activation, out_dtype)


def _stock_eager(x, weight, bias, activation, out_dtype):
    with torch.autocast(x.device.type, enabled=False):
        x, weight, bias = (None if t is None else t.to(out_dtype) for t in (x, weight, bias))
        return reference.activate(F.linear(x, weight, bias), activation).contiguous()


def _takes_onednn(x, weight, bias, out_dtype) -> bool:
    """Whether oneDNN's linear can serve: its fp32 kernels are twice MKL's on AMD (237 against 105
    GF/s a core on Zen 5), and erf and tanh GELU run in its epilogue."""
    return bool(
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.numel() > 0
        and out_dtype in (torch.float32, torch.bfloat16)
        and all(t is None or t.dtype == out_dtype for t in (x, weight, bias))
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn(x, weight, bias, activation):
    fused = activation in (reference.ERF, reference.TANH)
    algorithm = "tanh" if activation == reference.TANH else "none"
    post = ("gelu", [], algorithm) if fused else ("none", [], "")
    h = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *post)
    return h if fused else reference.activate(h, activation)


# --- raw operators --------------------------------------------------------------------------------


def _fake_linear_gelu_fwd(x, weight, bias, activation, save_preactivation, out_dtype):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)
    keep = save_preactivation and activation != IDENTITY
    return y, torch.empty_like(y) if keep else None


def _fake_linear_gelu_bwd(dy, x, weight, bias, preactivation, activation, output_mask):
    return tuple(
        t.new_empty(t.shape) if wanted else None
        for t, wanted in zip((x, weight, bias), output_mask, strict=True)
    )


def _regime(x, activation):
    return "linear" if activation == IDENTITY else "linear_gelu", x.shape[-1:], ""


declare(
    "linear_gelu_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, int activation, bool save_preactivation,"
    " ScalarType out_dtype) -> (Tensor y, Tensor? preactivation)",
    fake=_fake_linear_gelu_fwd,
    reference=reference.linear_gelu_fwd,
    regime=lambda x, weight, bias, activation, *_: _regime(x, activation),
)
declare(
    "linear_gelu_bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? preactivation, int activation,"
    " bool[] output_mask) -> (Tensor? dx, Tensor? dweight, Tensor? dbias)",
    fake=_fake_linear_gelu_bwd,
    reference=reference.linear_gelu_bwd,
    regime=lambda dy, x, weight, bias, preactivation, activation, *_: _regime(x, activation),
)


# --- autograd -------------------------------------------------------------------------------------


@keep_signature
class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(backend, *args):
        return overload("linear_gelu_fwd", backend)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        backend, x, weight, bias, activation, _, _ = inputs
        _, preactivation = output
        if preactivation is not None:
            ctx.mark_non_differentiable(preactivation)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, preactivation)
        ctx.backend, ctx.activation = backend, activation

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy, _dpreactivation):
        if dy is None:
            return (None,) * 7
        output_mask = list(ctx.needs_input_grad[1:4])
        dx, dweight, dbias = overload("linear_gelu_bwd", ctx.backend)(
            dy, *saved, ctx.activation, output_mask
        )
        return None, dx, dweight, dbias, None, None, None
