"""linear_gelu and linear, beside eager PyTorch, torch.compile of it, and oneDNN's fused kernel."""

from __future__ import annotations

import dataclasses
import functools

import torch

from vitkernels.evidence.linear_gelu import subject
from vitkernels.ops.linear_gelu import reference

from .harness import BOTH, FORWARD, Case, case_of
from .shapes import DTYPES, LINEAR_GELU_TARGETS, LINEAR_TARGETS


def onednn(x, weight, bias, gelu):
    """What torch.compile calls with frozen weights; it has no gradient."""
    post = ("gelu", [], "none") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *post)


def case(op, name, shape, dtype, direction) -> Case:
    gelu = op == "linear_gelu"
    targets = LINEAR_GELU_TARGETS if gelu else LINEAR_TARGETS
    made = case_of(subject(op, shape), name, dtype, direction, targets)
    functions = dict(made.functions)
    if direction == FORWARD and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        functions["oneDNN"] = functools.partial(onednn, gelu=gelu)
    aims = {p: aim for p, aim in made.targets.items() if p != "oneDNN" or p in functions}
    return dataclasses.replace(made, functions=functions, targets=aims, kernels=("oneDNN",))


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
