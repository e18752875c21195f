"""add_layer_norm with LayerScale and DropPath, beside eager PyTorch and torch.compile of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitkernels.ops import add_layer_norm
from vitkernels.ops.add_layer_norm import reference

from .harness import BOTH, FORWARD, Case
from .shapes import DTYPES, LAYER_NORM_TARGETS

EPS = 1e-6


def eager(x, residual, weight, bias, gamma, row_scale):
    """What a timm block does: LayerScale, DropPath, add, LayerNorm."""
    stream = residual + x * gamma * row_scale.to(x.dtype)[:, None, None]
    return F.layer_norm(stream, x.shape[-1:], weight, bias, EPS), stream


def ours(x, residual, weight, bias, gamma, row_scale):
    return add_layer_norm(x, residual, weight, bias, EPS, gamma=gamma, row_scale=row_scale)


def truth(x, residual, weight, bias, gamma, row_scale):
    scale = row_scale.double()
    y, z, _, _ = reference.add_layer_norm(
        x, residual, weight, bias, EPS, gamma, scale, None, 0.0, x.dtype
    )
    return y, z


def make_inputs(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    C = shape[-1]
    return [normal(*shape), normal(*shape), 1 + normal(C) / 2, normal(C), normal(C)]


def case(name, shape, dtype, direction) -> Case:
    row_scale = (torch.arange(shape[0]) % 5 != 4).float() / 0.8  # a fifth of the samples dropped
    size = dtype.itemsize
    flops, moved = reference.cost(shape, size, size, size)
    if direction == BOTH:
        more_flops, more = reference.cost(shape, size, size, size, backward=True)
        flops, moved = flops + more_flops, moved + more
    return Case(
        "add_layer_norm",
        name,
        tuple(shape),
        dtype,
        direction,
        lambda seed: make_inputs(shape, dtype, seed),
        {
            "vitkernels": lambda *inputs: ours(*inputs, row_scale),
            "eager": lambda *inputs: eager(*inputs, row_scale),
        },
        lambda *inputs: truth(*inputs, row_scale),
        (flops, moved),
        LAYER_NORM_TARGETS.get((name, dtype, direction), {}),
    )


def cases(everything: bool = False) -> list[Case]:
    """The shapes with targets; with `everything` all of sample_inputs()."""
    every = [
        case(name, shape, dtype, direction)
        for name, shape in reference.sample_inputs()
        for dtype in DTYPES
        for direction in (FORWARD, BOTH)
    ]
    return every if everything else [c for c in every if c.targets]
