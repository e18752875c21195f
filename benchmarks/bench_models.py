"""Whole models beside timm and torch.compile of it: the race of `vitkernels bench`, with our aims.

ViT-S/16, batch 8, as the targets name it. The check before the clock, the turns and the memory are
those of the command; only the aims are added here.
"""

from __future__ import annotations

import torch

from vitkernels.cli.bench import FORWARD, TRAIN, report
from vitkernels.cli.bench.race import Plan, Race, Result

from .shapes import DTYPES, MODEL_TARGETS

MODEL, BATCH = "vit_small_patch16_224", 8


def run(seconds: float) -> tuple[Race, list[Result]]:
    """Every case, printed as it comes; torch's threads are those that the caller has set."""
    plan = Plan(MODEL, BATCH, DTYPES, (FORWARD, TRAIN), torch.device("cpu"), {}, seconds=seconds)
    race = Race(plan)
    print(report.headline(race), flush=True)
    results = []
    for case in race.cases():
        results.append(race.run(case))
        print(f"\n{text(results[-1])}", flush=True)
    return race, results


def text(result: Result) -> str:
    lines = [
        f"{MODEL} ({BATCH}) {result.case.title}",
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


def targets(results: list[Result]) -> list[tuple[str, str, float, float, float]]:
    """(case, peer, measured ratio, must, stretch) of each aim whose peer ran and was equal."""
    found = []
    for result in results:
        aims = MODEL_TARGETS.get((result.case.dtype, result.case.direction), {})
        for entry in result.entries:
            ratio = result.ratio(entry)
            if entry.name in aims and ratio is not None:
                title = f"{MODEL} {result.case.title}"
                found.append((title, entry.name, ratio, *aims[entry.name]))
    return found


def failures(results: list[Result]) -> list[str]:
    return [f"{MODEL} {result.case.title}" for result in results if not result.equal]
