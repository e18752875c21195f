"""One contest: check every contender by the error model, then time those that passed beside stock.

A kernel that fails its check is recorded as failed and not timed; one that refuses the call, or
cannot run here, is recorded with its reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, testing
from .clock import Contender, Limits, copies_for, medians
from .outcome import FAILED, NOT_RUN, PASSED, Outcome, outcome_of
from .shapes import HAS_PATHS, PATHS, Contest
from .subject import BOTH, FORWARD, Subject, normal

KERNELS = ("cuda", "triton")
STOCK = "torch"  # the composition that `auto` takes where no kernel has won
MEMORY_BOUND = (
    "add_layer_norm", "layer_norm_add", "patch_merge_layer_norm", "distillation_loss",
)  # fmt: skip
# Of a gradient of a few long sums, such as logit_scale's, the yardstick's own error is a lottery.
FEW, FEW_SLACK = 32, 8.0
Within = Callable[[], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class Way:
    """A function of the inputs, what is entered around it, and whether it is a kernel of ours."""

    function: Callable
    within: Within = contextlib.nullcontext
    ours: bool = False


def ours(subject: Subject, paths: bool) -> dict[str, Way]:
    """Our kernels by name; with `paths` the CUDA paths one by one beside the launcher's choice."""
    found = {name: Way(subject.ours(name), ours=True) for name in KERNELS}
    if paths and subject.op in HAS_PATHS and _native.missing["cuda"] is None:
        for path in PATHS:
            within = lambda path=path: testing.cuda_path(path)  # noqa: E731
            found[f"cuda {path}"] = Way(subject.ours("cuda"), within, ours=True)
    return found


def problem(
    subject: Subject, seed: int, dtype: torch.dtype, direction: str, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs, and gradients of the outputs where the direction needs them: random ones, and 1 for
    a scalar, which is a loss."""
    inputs = subject.make(seed, dtype, device)
    if direction == FORWARD:
        return inputs, []
    learned = inputs[: subject.with_gradient]
    for tensor in filter(torch.is_floating_point, learned):
        tensor.requires_grad_()
    with torch.no_grad():
        outputs = testing.as_tuple(subject.eager(*inputs))
    random = normal(seed + 1000, device)
    return inputs, [
        (random(*o.shape) if o.ndim else torch.ones_like(o)).to(o.dtype) for o in outputs
    ]


def run_once(function: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple:
    """Outputs, then gradients of the floating inputs where gradients come in."""
    if not grads:
        with torch.no_grad():
            return testing.as_tuple(function(*inputs))
    outputs = testing.as_tuple(function(*inputs))
    leaves = [t for t in inputs if t.requires_grad]
    return (*outputs, *torch.autograd.grad(outputs, leaves, list(grads)))


@dataclasses.dataclass
class Truth:
    """What the contenders of one contest are compared with."""

    title: str
    dtype: torch.dtype
    inputs: list[Tensor]
    grads: list[Tensor]
    base: tuple
    exact: tuple

    @staticmethod
    def of(contest: Contest, subject: Subject, device: torch.device) -> Truth:
        inputs, grads = problem(subject, 0, contest.dtype, contest.direction, device)
        doubles = [
            t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for t in inputs
        ]
        exact = run_once(subject.truth, doubles, [g.double() for g in grads])
        base = run_once(subject.eager, inputs, grads)
        return Truth(contest.name, contest.dtype, inputs, grads, base, exact)

    def check(self, way: Way, name: str) -> None:
        """AssertionError unless the results are within the error model."""
        with way.within():
            results = run_once(way.function, self.inputs, self.grads)
        outputs = len(results) - sum(t.requires_grad for t in self.inputs)
        if not self.grads:
            outputs = len(results)
        truncating = _native.INTERPRET and name == "triton"
        few = [i for i in range(outputs, len(results)) if self.exact[i].numel() < FEW]
        grads = [i for i in range(outputs, len(results)) if i not in few]
        for part, slack in ((range(outputs), 1.0), (grads, 1.0), (few, FEW_SLACK)):
            if part:
                testing.assert_close_to_truth(
                    [results[i] for i in part],
                    [self.base[i] for i in part],
                    [self.exact[i] for i in part],
                    dtype=self.dtype,
                    what=f"{self.title}: {name}",
                    truncating_stores=truncating,
                    slack=slack if way.ours else 4.0 * slack,
                )


def run_contest(
    contest: Contest,
    device: torch.device,
    limits: Limits,
    *,
    seconds: float = 0.5,
    paths: bool = True,
    check_batch: int | None = None,
    peers: Callable[[Contest, Subject], dict[str, Way]] | None = None,
) -> Outcome:
    """Check, then time. Failed when one of our kernels fails its check.

    check_batch: samples that are checked; None: all. peers: (contest, subject) -> further stock
    ways. The outcome's facts: regime, cost and floor, `seconds` of each that was timed, `passed`
    and `unfit` (name -> why) of our kernels, `peers_unfit` of the others.
    """
    small = device.type == "cpu"
    subject = contest.row.subject(str(device), small=small)
    checked = subject
    if check_batch is not None:
        checked = contest.row.subject(str(device), small=small, batch=check_batch)
    products = contest.row.op not in MEMORY_BOUND
    cost = subject.cost_of(contest.dtype, contest.direction)
    facts: dict[str, Any] = {
        "op": contest.row.op,
        "shape": list(subject.shape),
        "regime": subject.regime(contest.dtype, contest.direction),
        "flops": cost[0],
        "bytes": cost[1],
        "floor_seconds": limits.floor(*cost, contest.dtype, products),
    }

    def ways_of(one: Subject) -> dict[str, Way]:
        stock = {STOCK: Way(one.ours(STOCK)), "eager": Way(one.eager)}
        return {**ours(one, paths), **stock, **(peers(contest, one) if peers else {})}

    ways = ways_of(checked)
    outcomes = check_ways(ways, Truth.of(contest, checked, device))
    unfit = {name: o for name, o in outcomes.items() if o.status != PASSED}
    ways = ways if checked is subject else ways_of(subject)  # compiled ones are kept
    good = {name: way for name, way in ways.items() if name not in unfit}
    facts["passed"] = [name for name, way in good.items() if way.ours]
    facts["unfit"] = {n: o.as_json() for n, o in unfit.items() if n.split()[0] in KERNELS}
    facts["peers_unfit"] = {n: o.as_json() for n, o in unfit.items() if n not in facts["unfit"]}
    facts["seconds"] = time_ways(good, contest, subject, device, seconds)
    wrong = {name: o for name, o in facts["unfit"].items() if o["status"] == FAILED}
    why = "; ".join(f"{name}: {o['why']}" for name, o in wrong.items())
    return Outcome(FAILED if wrong else PASSED, why, facts)


def check_ways(ways: dict[str, Way], truth: Truth) -> dict[str, Outcome]:
    """name -> what came of its check."""

    def outcome(name: str, way: Way) -> Outcome:
        missing = _native.missing[name.split()[0]] if way.ours else None
        if missing is not None:
            return Outcome(NOT_RUN, missing)
        return outcome_of(lambda: truth.check(way, name))

    return {name: outcome(name, way) for name, way in ways.items()}


def time_ways(
    ways: dict[str, Way],
    contest: Contest,
    subject: Subject,
    device: torch.device,
    seconds: float,
) -> dict[str, float]:
    """Median seconds of each way on rotated inputs."""
    first = problem(subject, 0, contest.dtype, contest.direction, device)
    size = sum(t.numel() * t.element_size() for part in first for t in part)
    copies = copies_for(size) if device.type == "cuda" else 1
    problems = [
        first,
        *(problem(subject, i, contest.dtype, contest.direction, device) for i in range(1, copies)),
    ]

    def contender(way: Way) -> Contender:
        return Contender(lambda i: run_once(way.function, *problems[i % copies]), way.within)

    contenders = {name: contender(way) for name, way in ways.items()}
    return medians(contenders, seconds, device, least=5 if device.type == "cuda" else 1)


__all__ = ["BOTH", "FORWARD", "KERNELS", "STOCK", "Way", "run_contest"]
