"""window_attention from packed qkv to packed output, beside timm's eager way, SDPA with the mask,
and torch.compile of each.

SwinV2's shapes come with cosines. What a training step keeps for the backward:
`python -m benchmarks.bench_window_attention`.
"""

from __future__ import annotations

import torch

from vitkernels.evidence.window_attention import subject
from vitkernels.ops.window_attention import reference

from .harness import BOTH, FORWARD, Case, case_of, problem_of
from .shapes import DTYPES, WINDOW_ATTENTION_TARGETS


def case(name, shape, window, shift, dtype, direction) -> Case:
    sizes = {"window": window, "shift": shift, "cosine": name.startswith("swinv2")}
    of_shape = subject("window_attention", shape, **sizes)
    return case_of(of_shape, name, dtype, direction, WINDOW_ATTENTION_TARGETS)


def cases(everything: bool = False) -> list[Case]:
    """The shapes with targets; with `everything` all of sample_inputs()."""
    every = [
        case(name, shape, window, shift, dtype, direction)
        for name, shape, window, shift in reference.sample_inputs()
        for dtype in DTYPES
        for direction in (FORWARD, BOTH)
    ]
    return every if everything else [c for c in every if c.targets]


# ---- Memory


def kept_bytes(case: Case, name: str) -> int:
    """What the forward of one function keeps for the backward, its inputs left out."""
    inputs, _ = problem_of(case)
    kept = {}
    given = {t.untyped_storage().data_ptr() for t in inputs}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.functions[name](*inputs)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in given)


def main() -> None:
    for each in (c for c in cases(everything=True) if c.direction == BOTH):
        sizes = {name: kept_bytes(each, name) / 2**20 for name in each.functions}
        text = ", ".join(f"{name} {size:.1f}" for name, size in sizes.items())
        print(f"{each.title}: MiB kept for the backward: {text}")


if __name__ == "__main__":
    main()
