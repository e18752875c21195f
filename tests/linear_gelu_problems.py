"""Problems of linear_gelu and linear, and the plain PyTorch they are measured by."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from problems import Problem

from vitkernels.ops.linear_gelu import reference
from vitkernels.testing import SIXTEEN_BIT

APPROXIMATIONS = ("none", "tanh", "quick")


def linear_gelu_problem(
    shape,
    out_features,
    dtype=torch.float32,
    *,
    weight_dtype=None,
    bias_dtype=None,
    bias=True,
    approximate="none",
    save_preactivation=True,
    autocast=None,
    magnitude=1.0,
    seed=5,
) -> Problem:
    """`shape` and `dtype` are x's; by default the parameters have that dtype too.

    The pre-activations have a standard deviation of about 1.5 (times magnitude), so that GELU is
    met in its bend and in both of its tails.
    """
    options = {"approximate": approximate, "save_preactivation": save_preactivation}
    return _problem(
        "linear_gelu", shape, out_features, dtype, weight_dtype or dtype, bias_dtype or dtype,
        bias, options, autocast, magnitude, seed,
    )  # fmt: skip


def linear_problem(
    shape,
    out_features,
    dtype=torch.float32,
    *,
    weight_dtype=None,
    bias_dtype=None,
    bias=True,
    autocast=None,
    magnitude=1.0,
    seed=5,
) -> Problem:
    return _problem(
        "linear", shape, out_features, dtype, weight_dtype or dtype, bias_dtype or dtype, bias, {},
        autocast, magnitude, seed,
    )  # fmt: skip


def _problem(op, shape, N, dtype, weight_dtype, bias_dtype, bias, options, autocast, magnitude,
             seed):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    K, out_dtype = shape[-1], autocast or dtype

    def normal(size, scale=1.0):
        return scale * torch.randn(size, generator=generator)

    inputs = {
        "x": (magnitude * normal(tuple(shape))).to(dtype),
        "weight": normal((N, K), 1.4 / K**0.5).to(weight_dtype),
        "bias": normal((N,), 0.5 * magnitude).to(bias_dtype) if bias else None,
    }
    return Problem(
        op,
        inputs,
        options,
        spec_linear_gelu,
        functools.partial(eager_linear_gelu, out_dtype=out_dtype),
        ("y",),
        (("x",), ("weight", "bias")),
        out_dtype if out_dtype in SIXTEEN_BIT else None,
        seed,
        autocast,
    )


def spec_linear_gelu(*, x, weight, bias, seed, approximate=None, save_preactivation=None):
    """The truth: the specification, differentiated by autograd."""
    activation = reference.ACTIVATIONS.get(approximate, reference.IDENTITY)
    return reference.linear_gelu(x, weight, bias, activation, x.dtype)[0]


def eager_linear_gelu(
    *, x, weight, bias, seed, approximate=None, save_preactivation=None, out_dtype=None
):
    """The yardstick: timm's Linear and GELU, as autocast would cast them."""
    x, weight, bias = (None if t is None else t.to(out_dtype) for t in (x, weight, bias))
    h = F.linear(x, weight, bias)
    if approximate is None:
        return h
    return h * torch.sigmoid(1.702 * h) if approximate == "quick" else F.gelu(
        h, approximate=approximate
    )  # fmt: skip
