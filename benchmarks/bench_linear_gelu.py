"""linear_gelu and linear, beside eager PyTorch, torch.compile of it, and oneDNN's fused kernel."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from vitkernels.ops import linear, linear_gelu
from vitkernels.ops.linear_gelu import reference

from .harness import BOTH, FORWARD, Case
from .shapes import DTYPES, LINEAR_GELU_TARGETS, LINEAR_TARGETS


def eager(x, weight, bias, gelu):
    h = F.linear(x, weight, bias)
    return F.gelu(h) if gelu else h


def onednn(x, weight, bias, gelu):
    """What torch.compile calls with frozen weights; it has no gradient."""
    post = ("gelu", [], "none") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *post)


def truth(x, weight, bias, gelu):
    activation = reference.ERF if gelu else reference.IDENTITY
    return reference.linear_gelu(x, weight, bias, activation, x.dtype)[0]


def make_inputs(shape, dtype, seed):
    rows, K, N = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    return [t.to(dtype) for t in (normal(rows, K), normal(N, K) * 1.4 / K**0.5, normal(N) / 2)]


def case(op, name, shape, dtype, direction) -> Case:
    gelu = op == "linear_gelu"
    flops, moved = reference.cost(shape, dtype.itemsize, gelu=gelu)
    functions = {
        "vitkernels": linear_gelu if gelu else linear,
        "eager": functools.partial(eager, gelu=gelu),
    }
    if direction == BOTH:
        more_flops, more = reference.cost(shape, dtype.itemsize, backward=True, gelu=gelu)
        flops, moved = flops + more_flops, moved + more
    elif hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        functions["oneDNN"] = functools.partial(onednn, gelu=gelu)
    targets = LINEAR_GELU_TARGETS if gelu else LINEAR_TARGETS
    aimed = targets.get((name, dtype, direction), {})
    return Case(
        op,
        name,
        shape,
        dtype,
        direction,
        lambda seed: make_inputs(shape, dtype, seed),
        functions,
        functools.partial(truth, gelu=gelu),
        (flops, moved),
        {peer: target for peer, target in aimed.items() if peer != "oneDNN" or peer in functions},
        kernels=("oneDNN",),
    )


def cases(everything: bool = False, op: str | None = None) -> list[Case]:
    """The shapes with targets; with `everything` all of sample_inputs()."""
    every = [
        case(op, name, shape, dtype, direction)
        for op in ([op] if op else ("linear_gelu", "linear"))
        for name, shape in reference.sample_inputs()
        for dtype in DTYPES
        for direction in (FORWARD, BOTH)
    ]
    return every if everything else [c for c in every if c.targets]
