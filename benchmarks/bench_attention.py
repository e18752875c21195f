"""attention and attention_qkvpacked, beside SDPA, eager PyTorch and torch.compile of each."""

from __future__ import annotations

from vitkernels.evidence.attention import subject
from vitkernels.ops.attention import reference

from .harness import BOTH, FORWARD, Case, case_of
from .shapes import ATTENTION_TARGETS, DTYPES


def cases(everything: bool = False, op: str | None = None) -> list[Case]:
    """The shapes with targets; with `everything` all of sample_inputs()."""
    every = [
        case_of(subject(op, shape), name, dtype, direction, ATTENTION_TARGETS)
        for op in ([op] if op else ("attention", "attention_qkvpacked"))
        for name, shape in reference.sample_inputs()
        for dtype in DTYPES
        for direction in (FORWARD, BOTH)
    ]
    return every if everything else [c for c in every if c.targets]
