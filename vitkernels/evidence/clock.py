"""How long calls take beside each other: CUDA events on a GPU, the wall clock on a CPU.

Calls take turns in a random order; each turn runs over inputs that together exceed the L2 cache. On
a GPU a turn is queued behind a pause, so that the device never waits for Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import statistics
import time
from collections.abc import Callable

import torch

ROTATED_BYTES = 128 << 20  # the L2 of an H100 or H200 has 50 to 60 MB
LONGEST_TURN = 0.02  # seconds
CYCLES_PER_SECOND = 2.0e9  # at least the clock that torch.cuda._sleep counts


@dataclasses.dataclass(frozen=True)
class Contender:
    """call(i) runs on the i-th copy of the inputs; `within` is entered around each turn."""

    call: Callable[[int], object]
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def copies_for(size: int) -> int:
    """How many problems of `size` bytes are rotated."""
    return min(32, max(2, -(-ROTATED_BYTES // max(size, 1))))


def medians(
    contenders: dict[str, Contender], seconds: float, device: torch.device, least: int = 5
) -> dict[str, float]:
    """Median seconds of one call of each, taking turns for `seconds` in all."""
    turn = _turn_of_cuda if device.type == "cuda" else _turn_of_cpu
    repeats, pauses = {}, {}
    for name, contender in contenders.items():
        with contender.within():
            for i in range(3):
                contender.call(i)
            _wait(device)
            start = time.perf_counter()
            contender.call(0)
            queued = time.perf_counter() - start
            _wait(device)
            once = time.perf_counter() - start
        repeats[name] = max(1, min(20, round(LONGEST_TURN / max(once, 1e-7))))
        pauses[name] = 1.5 * queued * repeats[name]
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, rng, end = list(contenders), random.Random(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[order[0]]) < least:
        rng.shuffle(order)
        for name in order:
            with contenders[name].within():
                samples[name].append(turn(contenders[name].call, repeats[name], pauses[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _turn_of_cpu(call: Callable[[int], object], repeats: int, pause: float) -> float:
    start = time.perf_counter()
    for i in range(repeats):
        call(i)
    return (time.perf_counter() - start) / repeats


def _turn_of_cuda(call: Callable[[int], object], repeats: int, pause: float) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(pause * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
    before.record()
    for i in range(repeats):
        call(i)
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / repeats


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the device can do at most, measured in this run."""

    bytes_per_second: float
    flops_per_second: dict[str, float]  # "16-bit" (bf16) and "fp32" square products

    @staticmethod
    def measured(device: torch.device, seconds: float = 0.5) -> Limits:
        """A copy (read plus write) beyond the L2, and torch.mm on square matrices."""
        on_gpu = device.type == "cuda"
        n, side = (1 << 28, 8192) if on_gpu else (1 << 22, 256)
        source, target = (torch.ones(n, device=device) for _ in range(2))
        copy = Contender(lambda _: target.copy_(source))
        rates = {}
        for name, dtype in (("16-bit", torch.bfloat16), ("fp32", torch.float32)):
            # Random numbers: a GPU multiplies zeros at a higher clock.
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            found = medians({"mm": Contender(lambda _, a=a, b=b: a @ b)}, seconds, device)  # type: ignore[misc]
            rates[name] = 2 * side**3 / found["mm"]
        seconds_of_copy = medians({"copy": copy}, seconds, device)["copy"]
        return Limits(2 * 4 * n / seconds_of_copy, rates)

    def floor(self, flops: float, moved: float, dtype: torch.dtype, products: bool) -> float:
        """The least seconds of a call with this cost; without products only bytes count."""
        kind = "fp32" if dtype == torch.float32 else "16-bit"
        compute = flops / self.flops_per_second[kind] if products else 0.0
        return max(moved / self.bytes_per_second, compute)
