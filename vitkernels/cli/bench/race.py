"""One case: build the contenders, compare what they compute, then let them take turns."""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..arguments import DTYPES, SHORT
from ..check import errors, excess
from . import FORWARD, TRAIN
from .contenders import OURS, Contender, Sources
from .cost import cost_of
from .memory import peak_bytes, saved_by_attention

LEAST_ROUNDS = 5
SLACK_OF_PEERS = 2.0  # torch.compile may round elsewhere than eager: twice what ours may


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is raced, and for how long."""

    model: str
    batch: int
    dtypes: tuple[torch.dtype, ...]
    directions: tuple[str, ...]
    device: torch.device
    settings: dict
    compiled: bool = True
    backend: str = "auto"
    seconds: float = 12.0
    least_rounds: int = LEAST_ROUNDS
    seed: int = 0


def plan_of(options: argparse.Namespace, device: torch.device) -> Plan:
    both = options.forward == options.train
    return Plan(
        model=options.model,
        batch=min(options.batch, 2) if options.quick else options.batch,
        dtypes=tuple(DTYPES[name] for name in options.dtype),
        directions=(FORWARD, TRAIN) if both else (FORWARD if options.forward else TRAIN,),
        device=device,
        settings={} if options.image_size is None else {"img_size": options.image_size},
        compiled=options.compile,
        backend=options.backend,
        seconds=options.seconds or (1 if options.quick else 12),
        least_rounds=2 if options.quick else LEAST_ROUNDS,
        seed=options.seed,
    )


@dataclasses.dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    direction: str

    @property
    def title(self) -> str:
        autocast = " autocast" if self.direction == TRAIN and self.dtype != torch.float32 else ""
        step = "training step" if self.direction == TRAIN else "forward"
        return f"{step}, {SHORT[self.dtype]}{autocast}"


@dataclasses.dataclass
class Entry:
    """One contender's line."""

    name: str
    best: float  # seconds
    median: float
    cpu: float  # seconds of processor time of all threads, the least of the rounds
    rounds: int
    peak: int | None  # bytes beyond what the model held
    attention: int | None  # bytes that attention keeps for the backward; of eager training only
    error: float  # of the logits or the loss, relative to float64
    excess: float  # its worst error over what the error model allows: above 1 is another function


@dataclasses.dataclass
class Result:
    case: Case
    batch: int
    entries: list[Entry]

    def ratio(self, peer: Entry, by: str = "best") -> float | None:
        """A peer's best time over ours, or its `cpu`; None where either computes something else."""
        ours = self.entry(OURS)
        if max(ours.excess, peer.excess) > 1:
            return None
        return getattr(peer, by) / getattr(ours, by)

    def entry(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)

    @property
    def equal(self) -> bool:
        return all(entry.excess <= 1 for entry in self.entries)


class Race:
    """The models, their inputs, and the cases of a plan."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.sources = Sources.make(plan.model, plan.settings, plan.seed)
        ours = self.sources.ours
        self.cost, self.image_size = cost_of(ours), ours.patch_embed.img_size
        generator = torch.Generator().manual_seed(plan.seed)
        shape = (plan.batch, ours.in_chans, *self.image_size)
        self.images = torch.randn(shape, generator=generator).to(plan.device)
        self.target = torch.randint(max(ours.num_classes, 1), (plan.batch,), generator=generator)
        self.target = self.target.to(plan.device)
        self.truths: dict[str, dict[str, Tensor]] = {}

    def cases(self) -> Iterator[Case]:
        for direction in self.plan.directions:
            for dtype in self.plan.dtypes:
                yield Case(dtype, direction)

    @property
    def steps(self) -> int:
        """How often run() says how far it is, over all cases."""
        return len(list(self.cases())) * (3 + len(self.sources.peers) + self.plan.compiled)

    def run(self, case: Case, step: Callable[[str], None] = lambda text: None) -> Result:
        plan, train = self.plan, case.direction == TRAIN
        torch._dynamo.reset()
        if case.direction not in self.truths:
            self.truths = {  # of one direction at a time: gradients in float64 are large
                case.direction: self.sources.truth(train, plan.device, self.images, self.target)
            }
        x = self.images if train else self.images.to(case.dtype)
        everyone = self.sources.contenders(
            case.dtype, train, plan.compiled, plan.backend, plan.device
        )
        found: dict[str, dict[str, float]] = {}
        for contender in everyone:
            results = contender.results(x, self.target, train)
            found[contender.name] = errors(results, self.truths[case.direction])
            step(f"{case.title}: {contender.name} checked")
        calls = {c.name: _call(c, x, self.target, train) for c in everyone}
        kept = {c.name: _attention(c, x, self.target) for c in everyone if train}
        peaks = {}
        for contender in everyone:
            calls[contender.name]()  # warm: the optimiser's state, caches of the libraries
            contender.model.zero_grad(set_to_none=True)
            peaks[contender.name] = peak_bytes(calls[contender.name], plan.device)
        samples = take_turns(calls, plan.seconds, plan.least_rounds, plan.device)
        step(f"{case.title}: timed")
        entries = [self._entry(c, case, found, peaks, kept, samples) for c in everyone]
        return Result(case, plan.batch, entries)

    def _entry(self, contender: Contender, case: Case, found, peaks, kept, samples) -> Entry:
        mine, base = found[contender.name], found[self.sources.yardstick_name]
        slack = 1.0 if contender.name == OURS else SLACK_OF_PEERS
        times = samples[contender.name]
        return Entry(
            name=contender.name,
            best=min(wall for wall, _ in times),
            median=statistics.median(wall for wall, _ in times),
            cpu=min(cpu for _, cpu in times),
            rounds=len(times),
            peak=peaks[contender.name],
            attention=kept.get(contender.name),
            error=next(iter(mine.values())),
            excess=excess(case.dtype, mine, base) / slack,
        )


def _call(contender: Contender, x: Tensor, target: Tensor, train: bool) -> Callable[[], object]:
    run = contender.step if train else contender.forward
    return lambda: run(x, target)


def _attention(contender: Contender, x: Tensor, target: Tensor) -> int | None:
    """What attention keeps in a training step; None of a compiled model, which has no modules."""
    if contender.compiled:
        return None
    kept = saved_by_attention(contender.model, lambda: contender.loss(x, target))
    contender.model.zero_grad(set_to_none=True)
    return kept


def take_turns(
    calls: dict[str, Callable[[], object]], seconds: float, least: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds of each call, in rounds of random order, for `seconds` in all."""
    for call in calls.values():
        call()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    order, rng, end = list(calls), random.Random(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[order[0]]) < least:
        rng.shuffle(order)
        for name in order:
            samples[name].append(_seconds(calls[name], device))
    return samples


def _seconds(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start, start_cpu = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, time.process_time() - start_cpu
