"""Problems of patch_merge_layer_norm, and the plain PyTorch they are measured by."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from layer_norm_problems import eager_layer_norm
from problems import Problem, lowest_precision

from vitkernels.ops.patch_merge import reference


def patch_merge_problem(
    shape,
    dtype=torch.float32,
    *,
    weight_dtype=None,
    bias_dtype=None,
    affine=("weight", "bias"),
    autocast=None,
    eps=1e-5,
    seed=5,
) -> Problem:
    """`shape` (B, H, W, C) and `dtype` are x's; by default the parameters have that dtype too."""
    weight_dtype, bias_dtype = weight_dtype or dtype, bias_dtype or dtype
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    # A mean of its own for each row, one for each pixel, and one for each channel.
    x = normal(*shape) + normal(*shape[:-1], 1) + normal(shape[-1])
    C = 4 * shape[-1]
    inputs = {
        "x": x.to(dtype),
        "weight": (1 + 0.5 * normal(C)).to(weight_dtype) if "weight" in affine else None,
        "bias": (0.5 * normal(C)).to(bias_dtype) if "bias" in affine else None,
    }
    parameters = [
        d for n, d in (("weight", weight_dtype), ("bias", bias_dtype)) if inputs[n] is not None
    ]
    out_dtype = autocast or dtype
    return Problem(
        "patch_merge_layer_norm",
        inputs,
        {"eps": eps},
        spec_patch_merge,
        functools.partial(eager_patch_merge, out_dtype=out_dtype),
        ("y",),
        (("x",), ("weight", "bias")),
        lowest_precision(dtype, out_dtype, *parameters),
        seed,
        autocast,
    )


def spec_patch_merge(*, x, weight, bias, eps, seed):
    """The truth: the specification, differentiated by autograd."""
    return reference.patch_merge_layer_norm(x, weight, bias, eps, x.dtype)[0]


def eager_patch_merge(*, x, weight, bias, eps, seed, out_dtype=None):
    """The yardstick: what timm's PatchMerging does before its reduction, in the tested dtype."""
    H, W = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    B, H, W, C = x.shape
    x = x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
    y = eager_layer_norm(x, weight, bias, eps)
    return y if out_dtype is None else y.to(out_dtype)
