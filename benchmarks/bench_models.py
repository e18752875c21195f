"""Whole models beside timm and torch.compile of it: the race of `vitkernels bench`, with our aims.

ViT-S/16 and Swin-T, batch 8, as the targets name them. The check before the clock, the turns and
the memory are those of the command; only the aims are added here.
"""

from __future__ import annotations

import torch

from vitkernels.cli.bench import FORWARD, TRAIN, report
from vitkernels.cli.bench.contenders import OURS
from vitkernels.cli.bench.race import Plan, Race, Result

from .shapes import ATTENTION_MEMORY_TARGETS, DTYPES, MODEL_TARGETS

BATCH = 8

Raced = tuple[Race, list[Result]]


def run(seconds: float) -> list[Raced]:
    """Every case, printed as it comes; torch's threads are those that the caller has set."""
    return [_run(model, seconds) for model in MODEL_TARGETS]


def _run(model: str, seconds: float) -> Raced:
    plan = Plan(model, BATCH, DTYPES, (FORWARD, TRAIN), torch.device("cpu"), {}, seconds=seconds)
    race = Race(plan)
    print(report.headline(race), flush=True)
    results = []
    for case in race.cases():
        results.append(race.run(case))
        print(f"\n{text(model, results[-1])}", flush=True)
    return race, results


def text(model: str, result: Result) -> str:
    lines = [
        f"{model} ({BATCH}) {result.case.title}",
        f"  {'':24}{'best ms':>9}{'median ms':>11}{'CPU ms':>9}{'peak MiB':>10}{'ratio':>8}"
        f"{'by CPU':>8}",
    ]
    for entry in sorted(result.entries, key=lambda entry: entry.best):
        clocks = "".join(
            f"{1e3 * value:{width}.1f}"
            for value, width in ((entry.best, 9), (entry.median, 11), (entry.cpu, 9))
        )
        peak = "-" if entry.peak is None else f"{entry.peak / 2**20:.0f}"
        ratios = [report.times(result.ratio(entry, by)) for by in ("best", "cpu")]
        lines.append(f"  {entry.name:24}{clocks}{peak:>10}{ratios[0]:>8}{ratios[1]:>8}")
    return "\n".join(lines)


def targets(raced: list[Raced]) -> list[tuple[str, str, float, float, float]]:
    """(case, peer, measured ratio, must, stretch) of each aim whose peer ran and was equal."""
    found = []
    for race, results in raced:
        model = race.plan.model
        for result in results:
            aims = MODEL_TARGETS[model].get((result.case.dtype, result.case.direction), {})
            of_memory = ATTENTION_MEMORY_TARGETS.get(model, {})
            kept = result.entry(OURS).attention
            for entry in result.entries:
                ratio, title = result.ratio(entry), f"{model} {result.case.title}"
                if entry.name in aims and ratio is not None:
                    found.append((title, entry.name, ratio, *aims[entry.name]))
                if entry.name in of_memory and kept is not None and entry.attention is not None:
                    title = f"{title}, attention's memory"
                    found.append(
                        (title, entry.name, entry.attention / kept, *of_memory[entry.name])
                    )
    return found


def failures(raced: list[Raced]) -> list[str]:
    return [
        f"{race.plan.model} {result.case.title}"
        for race, results in raced
        for result in results
        if not result.equal
    ]
