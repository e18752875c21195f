"""distillation_loss beside the original DeiT repository's composition, eager and by torch.compile.

`python -m benchmarks.bench_distillation_loss` prints the memory of a forward and backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from vitkernels.ops import distillation_loss
from vitkernels.ops.distillation_loss import reference

from .harness import BOTH, FORWARD, Case, problem_of
from .shapes import DISTILLATION_TARGETS, DTYPES

ALPHA, TEMPERATURE = 0.5, 3.0


def eager(logits, distill_logits, teacher_logits, targets):
    """DistillationLoss of the original with the batch's mean; 16-bit logits in fp32, as autocast
    makes it."""
    logits, distill_logits, teacher_logits = (
        reference.widen(t) for t in (logits, distill_logits, teacher_logits)
    )
    base = F.cross_entropy(logits, targets)
    student = F.log_softmax(distill_logits / TEMPERATURE, dim=1)
    teacher = F.log_softmax(teacher_logits / TEMPERATURE, dim=1)
    distillation = F.kl_div(student, teacher, reduction="sum", log_target=True)
    distillation = distillation * (TEMPERATURE * TEMPERATURE) / len(logits)
    return base * (1 - ALPHA) + distillation * ALPHA


def fused(logits, distill_logits, teacher_logits, targets):
    # A head's output is no leaf; neither are these.
    logits, distill_logits = logits.view_as(logits), distill_logits.view_as(distill_logits)
    options = {"alpha": ALPHA, "temperature": TEMPERATURE}
    return distillation_loss(logits, distill_logits, teacher_logits, targets, **options)


def truth(logits, distill_logits, teacher_logits, targets):
    options = (ALPHA, TEMPERATURE, False, 0.0, False)
    return reference.distillation_loss(logits, distill_logits, teacher_logits, targets, *options)


def make_inputs(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    heads = [(2 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3)]
    return [*heads, torch.randint(0, shape[1], shape[:1], generator=generator)]


def case(name, shape, dtype, direction) -> Case:
    return Case(
        "distillation_loss",
        name,
        tuple(shape),
        dtype,
        direction,
        lambda seed: make_inputs(shape, dtype, seed),
        {"vitkernels": fused, "eager": eager},
        truth,
        reference.cost(shape, dtype.itemsize, gradient=direction == BOTH),
        DISTILLATION_TARGETS.get((name, dtype, direction), {}),
        frozen=(2,),
        loss=True,
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


def peak_bytes(call, inputs, grads) -> int:
    """The most that one call has allocated at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call(inputs, grads)
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


if __name__ == "__main__":
    for one in cases():
        inputs, grads = problem_of(one)
        peaks = {name: peak_bytes(call, inputs, grads) for name, call in one.runners().items()}
        ours = peaks["vitkernels"]
        parts = [f"{name} {peak >> 10} KiB ({ours / peak:.0%})" for name, peak in peaks.items()]
        print(f"{one.title}: {', '.join(parts)}")
