"""The short table that a part prints last."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vitkernels.evidence.contest import KERNELS, STOCK
from vitkernels.evidence.facts import HARDWARE
from vitkernels.evidence.outcome import FAILED, NOT_RUN, STATUSES
from vitkernels.evidence.record import Record


def table(record: Record) -> str:
    """Where it ran, then a line for each kernel (numerics) or contest (times), then the sums."""
    part = record.content["part"]
    rows = {"kernels": _contests, "models": _models}.get(part, _kernels)(record.cases)
    return "\n".join([where(record.content), *rows, *_problems(record), summary(record)])


def where(content: dict[str, Any]) -> str:
    facts = content["facts"]
    if content["kind"] != HARDWARE:
        return f"{content['part']}: NO GPU: emulator and interpreter on a CPU, no hardware record"
    return (
        f"{content['part']}: {facts['gpu']} ({facts['compute_capability']}), driver "
        f"{facts['driver']}, torch {facts['torch']}, Triton {facts['triton']}, commit "
        f"{facts['commit'][:10]}, {facts['date'][:10]}"
    )


def summary(record: Record) -> str:
    counts = Counter(case["status"] for case in record.cases.values())
    return ", ".join(f"{counts[s]} {s}" for s in STATUSES) + f" of {len(record.cases)} cases"


def _problems(record: Record) -> list[str]:
    cases = record.cases
    failed = {name: case for name, case in cases.items() if case["status"] == FAILED}
    lines = [f"FAILED {name}: {case.get('why', '')}" for name, case in failed.items()]
    reasons = Counter(case.get("why") for case in cases.values() if case["status"] == NOT_RUN)
    return [*lines, *(f"not run ({n}): {why}" for why, n in reasons.items())]


def _kernels(cases: dict[str, dict[str, Any]]) -> list[str]:
    """operator, kernel -> how many of each status."""
    counts: dict[tuple[str, str], Counter] = {}
    for case in cases.values():
        kernel = f"{case['backend']} {case['path']}".strip()
        counts.setdefault((case["op"], kernel), Counter())[case["status"]] += 1
    width = max((len(f"{op} {kernel}") for op, kernel in counts), default=0)
    head = f"{'':{width}}" + "".join(f"{status:>9}" for status in STATUSES)
    return [
        head,
        *(
            f"{f'{op} {kernel}':{width}}" + "".join(f"{of[status]:9}" for status in STATUSES)
            for (op, kernel), of in sorted(counts.items())
        ),
    ]


def _contests(cases: dict[str, dict[str, Any]]) -> list[str]:
    """Our fastest that passed: time, share of the floor, ratio to the best other and to stock."""
    timed = {name: case for name, case in cases.items() if "seconds" in case}
    width = max(map(len, timed), default=0)
    head = f"{'':{width}}{'ours':>14}{'us':>10}{'of floor':>10}{'best other':>20}{'ratio':>8}"
    lines = [f"{head}{'stock':>8}"]
    for name, case in timed.items():
        seconds = case["seconds"]
        mine = [n for n in seconds if n.split()[0] in KERNELS]
        if not mine:
            lines.append(f"{name:{width}}{'none passed':>14}")
            continue
        ours = min(mine, key=seconds.__getitem__)
        other = min((n for n in seconds if n not in mine), key=seconds.__getitem__, default=None)
        line = f"{name:{width}}{ours:>14}{1e6 * seconds[ours]:10.1f}"
        line += f"{case['floor_seconds'] / seconds[ours]:10.0%}"
        if other is not None:
            line += f"{other:>20}{seconds[other] / seconds[ours]:7.2f}x"
        if STOCK in seconds:
            line += f"{seconds[STOCK] / seconds[ours]:7.2f}x"
        lines.append(line)
    return lines


def _models(cases: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, case in cases.items():
        seconds = case.get("seconds_of", {})
        ours = seconds.get("vitkernels")
        if ours is None:
            continue
        others = ", ".join(
            f"{seconds[other] / ours:.2f}x {other}" for other in seconds if other != "vitkernels"
        )
        rate = case["batch"] / ours
        lines.append(f"{name}: {1e3 * ours:.2f} ms, {rate:.0f} images/s; {others}")
    return lines


def status_of(cases: list[dict[str, Any]]) -> int:
    """0 all have run and none failed; 1 a case failed; 3 some have not run."""
    statuses = {case["status"] for case in cases}
    return 1 if FAILED in statuses else 3 if NOT_RUN in statuses else 0
