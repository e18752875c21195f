"""patch_merge_layer_norm beside eager PyTorch (timm's PatchMerging before its reduction) and
torch.compile of it."""

from __future__ import annotations

from vitkernels.evidence.patch_merge import subject
from vitkernels.ops.patch_merge import reference

from .harness import BOTH, FORWARD, Case, case_of
from .shapes import DTYPES, PATCH_MERGE_TARGETS

OP = "patch_merge_layer_norm"


def cases(everything: bool = False) -> list[Case]:
    """The shapes with targets; with `everything` all of sample_inputs()."""
    every = [
        case_of(subject(OP, shape), name, dtype, direction, PATCH_MERGE_TARGETS)
        for name, shape in reference.sample_inputs()
        for dtype in DTYPES
        for direction in (FORWARD, BOTH)
    ]
    return every if everything else [c for c in every if c.targets]
