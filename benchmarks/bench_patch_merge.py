"""patch_merge_layer_norm beside eager PyTorch (timm's PatchMerging before its reduction) and
torch.compile of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitkernels.ops import patch_merge_layer_norm
from vitkernels.ops.patch_merge import reference

from .harness import BOTH, FORWARD, Case
from .shapes import DTYPES, PATCH_MERGE_TARGETS

EPS = 1e-5


def eager(x, weight, bias):
    """What timm's PatchMerging does: pad, reshape, permute, LayerNorm."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    B, H, W, C = x.shape
    x = x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return F.layer_norm(x, (4 * C,), weight, bias, EPS)


def truth(x, weight, bias):
    return reference.patch_merge_layer_norm(x, weight, bias, EPS, x.dtype)[0]


def make_inputs(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    C = 4 * shape[-1]
    return [normal(*shape), 1 + normal(C) / 2, normal(C)]


def case(name, shape, dtype, direction) -> Case:
    size = dtype.itemsize
    flops, moved = reference.cost(shape, size, size)
    if direction == BOTH:
        more_flops, more = reference.cost(shape, size, size, backward=True)
        flops, moved = flops + more_flops, moved + more
    return Case(
        "patch_merge_layer_norm",
        name,
        tuple(shape),
        dtype,
        direction,
        lambda seed: make_inputs(shape, dtype, seed),
        {
            "vitkernels": lambda *inputs: patch_merge_layer_norm(*inputs, EPS),
            "eager": eager,
        },
        truth,
        (flops, moved),
        PATCH_MERGE_TARGETS.get((name, dtype, direction), {}),
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
