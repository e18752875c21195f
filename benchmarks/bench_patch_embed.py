"""patch_embed from uint8 images, beside the chain of stock operators, eager and compiled."""

from __future__ import annotations

from vitkernels.evidence.patch_embed import subject
from vitkernels.ops.patch_embed import reference

from .harness import BOTH, FORWARD, Case, case_of
from .shapes import DTYPES, PATCH_EMBED_TARGETS


def cases(everything: bool = False) -> list[Case]:
    """The shapes with targets; with `everything` all of sample_inputs()."""
    every = [
        case_of(subject("patch_embed", shape), name, dtype, direction, PATCH_EMBED_TARGETS)
        for name, shape in reference.sample_inputs()
        for dtype in DTYPES
        for direction in (FORWARD, BOTH)
    ]
    return every if everything else [c for c in every if c.targets]
