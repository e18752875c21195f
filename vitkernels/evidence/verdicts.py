"""From records to dispatch: in each regime, the kernel that passed every check and won.

A kernel has passed in a regime when at least one case ran there and none of its cases failed, in
any part; a failure outside the regimes (determinism, sanitizer) counts against every regime of the
operator. It has won when it is faster than the stock composition that `auto` would take instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .contest import KERNELS, STOCK
from .facts import HARDWARE
from .outcome import FAILED

KERNELS_PART, TUNE_PART = "kernels", "tune"
MARGIN = 1.02  # a kernel must be this much faster: less is noise


def dispatch_records(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What `_dispatch` loads: {"sm_90": {"facts": ..., "operators": {op: {regime: entry}}}}.

    Of each compute capability the newest commit counts, oldest record first: a kernel that was
    changed since must prove itself again. What was never timed is not in it.
    """
    records = [r for r in records if r["kind"] == HARDWARE]
    found: dict[str, Any] = {}
    for arch in dict.fromkeys(r["facts"]["compute_capability"] for r in records):
        of_arch = [r for r in records if r["facts"]["compute_capability"] == arch]
        of_arch = [r for r in of_arch if r["facts"]["commit"] == of_arch[-1]["facts"]["commit"]]
        barred = _failed(of_arch)
        for record in of_arch:
            if record["part"] not in (KERNELS_PART, TUNE_PART):
                continue
            into = found.setdefault(arch, {"facts": {}, "operators": {}})
            into["facts"] = record["facts"]
            for op, regimes in _timed(record).items():
                for regime, contests in regimes.items():
                    entry = _entry(contests, barred.get(op, {}), regime)
                    into["operators"].setdefault(op, {})[regime] = entry
    return found


def _timed(record: dict[str, Any]) -> dict[str, dict[str, list[dict]]]:
    """operator -> regime -> contests that were timed."""
    found: dict[str, dict[str, list[dict]]] = {}
    for case in record["cases"].values():
        if "seconds" in case:
            of_op = found.setdefault(case["op"], {})
            of_op.setdefault(case["regime"], []).append(case)
    return found


def _failed(records: list[dict[str, Any]]) -> dict[str, dict[str, set[str | None]]]:
    """operator -> kernel -> the regimes in which a case of it failed; None stands for all."""
    found: dict[str, dict[str, set[str | None]]] = {}
    for record in records:
        for case in record["cases"].values():
            if "unfit" in case:
                for name, outcome in case["unfit"].items():
                    if outcome["status"] == FAILED:
                        of_op = found.setdefault(case["op"], {})
                        of_op.setdefault(name.split()[0], set()).add(case["regime"])
            elif case["status"] == FAILED and "regime" in case:  # the process died: of any kernel
                for kernel in KERNELS:
                    of_op = found.setdefault(case["op"], {})
                    of_op.setdefault(kernel, set()).add(case["regime"])
            elif case["status"] == FAILED and "backend" in case:
                regimes = case.get("regimes") or [None]
                found.setdefault(case["op"], {}).setdefault(case["backend"], set()).update(regimes)
    return found


def _entry(contests: list[dict], barred: dict[str, set[str | None]], regime: str) -> dict:
    """The winner of a regime, or why there is none; the ratio is a geometric mean of contests."""
    ratios, why = {}, {}
    for kernel in KERNELS:
        if barred.get(kernel, set()) & {regime, None}:
            why[kernel] = "a check failed"
        elif not all(kernel in c["seconds"] for c in contests):
            reasons = [c["unfit"][kernel].get("why") for c in contests if kernel in c["unfit"]]
            why[kernel] = (reasons and reasons[0]) or "not timed"
        elif not all(STOCK in c["seconds"] for c in contests):
            why[kernel] = "stock PyTorch was not timed beside it"
        else:
            logs = [math.log(c["seconds"][STOCK] / c["seconds"][kernel]) for c in contests]
            ratios[kernel] = round(math.exp(sum(logs) / len(logs)), 3)
    best = max(ratios, key=ratios.__getitem__, default=None)
    winner = best if best is not None and ratios[best] >= MARGIN else None
    return {"backend": winner, "times_faster_than_stock": ratios, **({"why": why} if why else {})}
