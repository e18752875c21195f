"""`vitkernels tune`: check and time the kernels on this GPU, and keep what `auto` may take here."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .arguments import positive
from .usage import UsageError


def configure(commands) -> None:
    parser = commands.add_parser(
        "tune",
        help="check and time the kernels on this GPU, so that `auto` takes those that win",
        description="For each regime (operator, direction, dtype, sizes) each kernel is compared "
        "with float64 first, then timed beside the best stock PyTorch. What passed and won is "
        "written to the user's cache at the end, all of it or nothing. Exit status 1 when a kernel "
        "failed its check; `auto` does not take it.",
    )
    parser.add_argument(
        "--minutes", type=positive, default=2, metavar="N", help="then the rest stays unmeasured"
    )
    # For tests: the emulator and the interpreter stand in, and nothing is kept.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("tune: no NVIDIA GPU is visible to torch: there is nothing to tune for")
    from ..evidence.facts import facts, kind_of
    from ..evidence.outcome import FAILED
    from ..evidence.record import Record
    from ..evidence.runner import Runner, WorkerDied
    from ..evidence.shapes import contest_named, contests
    from ..evidence.tune import keep
    from ..evidence.verdicts import TUNE_PART, dispatch_records

    names = [c.name for c in contests(tune_only=True) if options.only in c.name]
    if not names:
        raise UsageError(f"--only: no call has {options.only!r} in its name")
    device = torch.device(options.device)
    record = Record(None, kind_of(device), TUNE_PART, facts(device))
    record.plan(names, lambda name: contest_named(name).facts())
    on_cpu = {"VITKERNELS_EMULATE": "1", "TRITON_INTERPRET": "1"}
    runner = Runner(
        record,
        "vitkernels.evidence.tune:run",
        {"device": options.device},
        seconds=60.0 * options.minutes,
        environment=on_cpu if device.type == "cpu" else {},
        say=lambda text: print(text, flush=True),
    )
    try:
        runner.run(names)
    except WorkerDied as error:
        raise UsageError(f"tune: {error}") from error
    found = dispatch_records([record.content])
    print("\n" + "\n".join(_table(record.cases, found)))
    if device.type != "cuda":
        print("no GPU: nothing is kept")
    elif found:
        print(f"kept in {keep(found)}; `auto` uses it from the next start of Python on")
    return 1 if any(case["status"] == FAILED for case in record.cases.values()) else 0


def _table(cases: dict[str, dict[str, Any]], found: dict[str, Any]) -> list[str]:
    """Regime by regime what `auto` takes; then what failed, and what has not been measured."""
    lines = []
    for of_arch in found.values():
        for op, regimes in of_arch["operators"].items():
            for regime, entry in regimes.items():
                ratios = entry["times_faster_than_stock"]
                told = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
                why = ", ".join(f"{name}: {text}" for name, text in entry.get("why", {}).items())
                taken = entry["backend"] or "torch"
                lines.append(f"{op} {regime}: {taken} ({'; '.join(filter(None, (told, why)))})")
    lines += [f"FAILED {n}: {c['why']}" for n, c in cases.items() if c["status"] == "failed"]
    left = sum(case["status"] == "not run" for case in cases.values())
    if left:
        lines.append(f"{left} of {len(cases)} calls were not measured: `auto` takes stock PyTorch")
    return lines
