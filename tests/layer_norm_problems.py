"""Problems of add_layer_norm and layer_norm_add, and the plain PyTorch they are measured by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from problems import Problem, lowest_precision

from vitkernels.ops._random import keep_mask
from vitkernels.ops.add_layer_norm import reference


def layer_norm_problem(
    shape,
    dtype=torch.float32,
    *,
    residual_dtype=None,
    param_dtype=None,
    residual=True,
    affine=("weight", "bias"),
    gamma=True,
    row_scale=True,
    dropout_p=0.0,
    out_dtype=None,
    eps=1e-6,
    keep_prob=0.8,
    seed=5,
) -> Problem:
    """`dtype` is x's; by default residual and parameters have it too.

    1 / keep_prob is 1.25, exact in 16 bits: stock PyTorch rounds it to x's dtype, kernels must not.
    """
    param_dtype = param_dtype or dtype
    make = _Maker(shape, seed)
    if not residual:
        gamma = row_scale = False
    inputs = {
        "x": make.activation(dtype),
        "residual": make.activation(residual_dtype or dtype) if residual else None,
        "weight": make.parameter(param_dtype, 1.0) if "weight" in affine else None,
        "bias": make.parameter(param_dtype) if "bias" in affine else None,
        "gamma": make.parameter(param_dtype) if gamma else None,
    }
    options = {
        "eps": eps,
        "row_scale": make.row_scale(keep_prob) if row_scale else None,
        "dropout_p": dropout_p,
        "out_dtype": out_dtype or dtype,
    }
    stored = residual_dtype or dtype
    outputs = ("y", "new_residual")
    return Problem(
        "add_layer_norm",
        inputs,
        options,
        spec_add_layer_norm,
        eager_add_layer_norm,
        outputs,
        (("x", "residual"), ("weight", "bias", "gamma")),
        lowest_precision(dtype, stored, options["out_dtype"], param_dtype),
        seed,
    )


def layer_norm_add_problem(
    shape, dtype=torch.float32, *, residual_dtype=None, param_dtype=None, affine=("weight", "bias"),
    row_scale=True, eps=1e-5, keep_prob=0.8, seed=5,
) -> Problem:  # fmt: skip
    param_dtype = param_dtype or dtype
    make = _Maker(shape, seed)
    inputs = {
        "x": make.activation(dtype),
        "residual": make.activation(residual_dtype or dtype),
        "weight": make.parameter(param_dtype, 1.0) if "weight" in affine else None,
        "bias": make.parameter(param_dtype) if "bias" in affine else None,
    }
    options = {
        "eps": eps,
        "row_scale": make.row_scale(keep_prob) if row_scale else None,
    }
    return Problem(
        "layer_norm_add",
        inputs,
        options,
        spec_layer_norm_add,
        eager_layer_norm_add,
        ("out",),
        (("x", "residual"), ("weight", "bias")),
        lowest_precision(dtype, residual_dtype, param_dtype),
        seed,
    )


class _Maker:
    def __init__(self, shape, seed):
        self.shape = tuple(shape)
        self.generator = torch.Generator().manual_seed(seed)

    def activation(self, dtype):
        """Rows with a mean of their own, so that a wrong mean shows."""
        values = torch.randn(self.shape, generator=self.generator)
        return (values + torch.randn(*self.shape[:-1], 1, generator=self.generator)).to(dtype)

    def parameter(self, dtype, around=0.0):
        return (around + 0.5 * torch.randn(self.shape[-1], generator=self.generator)).to(dtype)

    def row_scale(self, keep_prob):
        """DropPath's: 0 for a dropped sample, 1 / keep_prob for a kept one."""
        keep = torch.rand(self.shape[0], generator=self.generator) < 0.7
        keep[0], keep[-1] = True, len(keep) == 1
        return keep.float() / keep_prob


# ---- The truth: the specification, differentiated by autograd


def spec_add_layer_norm(
    *, x, residual, weight, bias, gamma, eps, row_scale, dropout_p, out_dtype, seed
):
    y, z, _, _ = reference.add_layer_norm(
        x, residual, weight, bias, eps, gamma, row_scale, seed, dropout_p, out_dtype
    )
    return y, (x if residual is None else z)


def spec_layer_norm_add(*, x, residual, weight, bias, eps, row_scale, seed):
    return reference.layer_norm_add(x, residual, weight, bias, eps, row_scale)[0]


# ---- The yardstick: what a timm block does, in the tested dtype


def eager_branch(x, gamma, row_scale, dropout_p, seed):
    if dropout_p > 0:
        x = x * keep_mask(seed, tuple(x.shape), dropout_p) / (1 - dropout_p)
    if gamma is not None:
        x = x * gamma
    if row_scale is not None:
        x = x * row_scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return x


def eager_layer_norm(x, weight, bias, eps):
    """F.layer_norm takes parameters of x's dtype, or (both) fp32 ones beside a 16-bit x."""
    mixed = all(p is not None and p.dtype == torch.float32 for p in (weight, bias))
    if not mixed:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def eager_add_layer_norm(
    *, x, residual, weight, bias, gamma, eps, row_scale, dropout_p, out_dtype, seed
):
    z = x
    if residual is not None:
        branch = eager_branch(x, gamma, row_scale, dropout_p, seed)
        z = residual + branch.to(residual.dtype)
    return eager_layer_norm(z, weight, bias, eps).to(out_dtype), z


def eager_layer_norm_add(*, x, residual, weight, bias, eps, row_scale, seed):
    y = eager_layer_norm(x, weight, bias, eps)
    return residual + eager_branch(y, None, row_scale, 0.0, seed).to(residual.dtype)
