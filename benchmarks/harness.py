"""Times our operator beside its peers, alternating in one process, and only after a check passed.

What is compared: every peer gets the same inputs in the same memory layout, rotated through copies
that together exceed the caches; each round calls all of them in a random order; the best and the
median of many rounds are kept. A ratio is the peer's best time over ours: above 1 we are faster.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from vitkernels import testing
from vitkernels.evidence.subject import BOTH, FORWARD, Subject

__all__ = ["BOTH", "FORWARD", "Case", "Limits", "Result", "case_of", "measure"]

Inputs = Sequence[torch.Tensor]
CACHE_BYTES = 64 << 20
SHORTEST_SAMPLE = 0.001  # seconds; shorter calls are repeated inside one sample


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator at one shape, dtype and direction.

    functions: name -> function of the inputs; "vitkernels" is ours, "eager" the yardstick of the
    check, the rest are further peers; "compile X" is torch.compile of X and is made here, but not
    for those in `kernels`, which hold one stock kernel.
    truth: the same function in float64. targets: peer -> (must, stretch), a ratio; the peer "best"
    is the fastest of all peers.
    """

    op: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    direction: str
    make_inputs: Callable[[int], Inputs]
    functions: dict[str, Callable]
    truth: Callable
    cost: tuple[float, float]  # FLOPs, least bytes
    targets: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    frozen: tuple[int, ...] = ()  # positions of float inputs that get no gradient
    loss: bool = False  # the output is a loss: 1 comes in, as from loss.backward()

    @property
    def title(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return f"{self.op} {self.name} {self.shape} {short[self.dtype]} {self.direction}"

    def compiled(self) -> list[str]:
        return [name for name in self.functions if name not in ("vitkernels", *self.kernels)]

    def runners(self) -> dict[str, Callable[[Inputs, Inputs], object]]:
        """name -> call(inputs, output gradients), with the backward where the direction has it."""
        functions = dict(self.functions)
        for name in self.compiled():
            compiled = torch.compile(self.functions[name], dynamic=False)
            functions[f"compile {name}"] = compiled
        run = _forward if self.direction == FORWARD else _forward_and_backward
        return {name: functools.partial(run, function) for name, function in functions.items()}


def case_of(subject: Subject, name: str, dtype: torch.dtype, direction: str, targets: dict) -> Case:
    """A subject of vitkernels.evidence beside eager and the stock ways that it knows."""
    return Case(
        subject.op,
        name,
        subject.shape,
        dtype,
        direction,
        lambda seed: subject.make(seed, dtype),
        {"vitkernels": subject.ours(None), "eager": subject.eager, **subject.peers},
        subject.truth,
        subject.cost_of(dtype, direction),
        targets.get((name, dtype, direction), {}),
    )


def _forward(function, inputs, _grads):
    with torch.no_grad():
        return testing.as_tuple(function(*inputs))


def _forward_and_backward(function, inputs, grads):
    outputs = testing.as_tuple(function(*inputs))
    return (*outputs, *torch.autograd.grad(outputs, _differentiated(inputs), grads))


def _differentiated(inputs):
    """All but uint8 images, class ids, and what is frozen."""
    return [t for t in inputs if t.requires_grad]


# ---- The check


def problem_of(case: Case, seed: int = 0) -> tuple[Inputs, Inputs]:
    """Random inputs, and random gradients of the outputs where the direction needs them."""
    inputs = [t.detach() for t in case.make_inputs(seed)]
    if case.direction == FORWARD:
        return inputs, []
    inputs = [
        t.requires_grad_() if t.is_floating_point() and i not in case.frozen else t
        for i, t in enumerate(inputs)
    ]
    with torch.no_grad():
        outputs = testing.as_tuple(case.functions["eager"](*inputs))
    if case.loss:
        return inputs, [torch.ones_like(o) for o in outputs]
    generator = torch.Generator().manual_seed(seed + 1000)
    return inputs, [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]


def check(case: Case, runners: dict[str, Callable]) -> None:
    """Ours within the error model, and every peer the same function; AssertionError otherwise."""
    inputs, grads = problem_of(case)
    run = _forward if case.direction == FORWARD else _forward_and_backward
    doubles = [
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in inputs
    ]
    exact = run(case.truth, doubles, [g.double() for g in grads])
    results = {name: runner(inputs, grads) for name, runner in runners.items()}
    outputs = len(exact) - (len(_differentiated(inputs)) if grads else 0)
    for name, result in results.items():
        slack = 1.0 if name == "vitkernels" else 4.0
        for part in (slice(0, outputs), slice(outputs, None)):
            if exact[part]:
                testing.assert_close_to_truth(
                    result[part],
                    results["eager"][part],
                    exact[part],
                    dtype=case.dtype,
                    what=f"{case.title}: {name}",
                    slack=slack,
                )


# ---- The clock


@dataclasses.dataclass
class Timing:
    best: float  # seconds of one call
    median: float


def time_alternating(
    calls: dict[str, Callable[[int], object]], seconds: float
) -> dict[str, Timing]:
    """Best and median seconds of call(round), all of them in turn, for `seconds` in total."""
    repeats = {}
    for name, call in calls.items():
        for i in range(3):
            call(i)
        start = time.perf_counter()
        call(0)
        once = time.perf_counter() - start
        repeats[name] = max(1, round(SHORTEST_SAMPLE / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, end = list(calls), time.perf_counter() + seconds
    rng = random.Random(0)
    while time.perf_counter() < end or len(samples[order[0]]) < 5:
        rng.shuffle(order)
        for name in order:
            call, n = calls[name], repeats[name]
            start = time.perf_counter()
            for i in range(n):
                call(i)
            samples[name].append((time.perf_counter() - start) / n)
    return {name: Timing(min(s), statistics.median(s)) for name, s in samples.items()}


@dataclasses.dataclass
class Result:
    case: Case
    timings: dict[str, Timing]
    share: float  # of the faster machine limit that applies: memory or matrix products
    bound: str

    def ratio(self, peer: str) -> float:
        return self.timings[peer].best / self.timings["vitkernels"].best

    @property
    def best_peer(self) -> str:
        peers = [name for name in self.timings if name != "vitkernels"]
        return min(peers, key=lambda name: self.timings[name].best)

    def targets(self) -> list[tuple[str, float, float, float]]:
        """(peer, measured ratio, must, stretch) of each target."""
        named = [(self.best_peer if p == "best" else p, *t) for p, t in self.case.targets.items()]
        return [(peer, self.ratio(peer), must, stretch) for peer, must, stretch in named]


def measure(case: Case, limits: Limits, seconds: float, warm: bool = False) -> Result:
    """Check, then time. A failing check raises AssertionError: there is nothing to report.

    warm: the same inputs every time, as when the layer before has just written them.
    """
    torch._dynamo.reset()
    runners = case.runners()
    check(case, runners)
    first = problem_of(case)
    size = sum(t.numel() * t.element_size() for part in first for t in part)
    copies = 1 if warm else min(32, max(2, CACHE_BYTES // max(size, 1)))
    problems = [first, *(problem_of(case, seed) for seed in range(1, copies))]
    calls = {
        name: lambda i, runner=runner: runner(*problems[i % copies])
        for name, runner in runners.items()
    }
    timings = time_alternating(calls, seconds)
    flops, moved = case.cost
    memory = moved / limits.bytes_per_second
    products = not case.op.endswith("norm")  # the rest of the operators are matrix products
    compute = flops / limits.flops_per_second[case.dtype] if products else 0
    bound = "memory" if memory > compute else "products"
    return Result(case, timings, max(memory, compute) / timings["vitkernels"].best, bound)


# ---- The machine's limits


@dataclasses.dataclass(frozen=True)
class Limits:
    bytes_per_second: float
    flops_per_second: dict[torch.dtype, float]

    @staticmethod
    def measured(seconds: float = 0.5) -> Limits:
        """Copy bandwidth (read plus write) over 128 MB, and square matrix products by the faster of
        torch.mm (MKL in fp32) and oneDNN."""
        source, target = (torch.ones(32 << 20) for _ in range(2))
        copies = time_alternating({"copy": lambda _: target.copy_(source)}, seconds)
        flops = {}
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
            products = {"mm": lambda _, a=a, b=b: a @ b}
            if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
                products["oneDNN"] = lambda _, a=a, b=b: torch.ops.mkldnn._linear_pointwise(
                    a, b, None, "none", [], ""
                )
            timings = time_alternating(products, seconds).values()
            flops[dtype] = 2 * 1024**3 / min(timing.best for timing in timings)
        return Limits(2 * source.numel() * 4 / copies["copy"].best, flops)
