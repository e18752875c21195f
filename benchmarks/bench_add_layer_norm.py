"""add_layer_norm with LayerScale and DropPath, beside eager PyTorch and torch.compile of it."""

from __future__ import annotations

from vitkernels.evidence.add_layer_norm import subject
from vitkernels.ops.add_layer_norm import reference

from .harness import BOTH, FORWARD, Case, case_of
from .shapes import DTYPES, LAYER_NORM_TARGETS


def cases(everything: bool = False) -> list[Case]:
    """The shapes with targets; with `everything` all of sample_inputs()."""
    every = [
        case_of(subject("add_layer_norm", shape), name, dtype, direction, LAYER_NORM_TARGETS)
        for name, shape in reference.sample_inputs()
        for dtype in DTYPES
        for direction in (FORWARD, BOTH)
    ]
    return every if everything else [c for c in every if c.targets]
