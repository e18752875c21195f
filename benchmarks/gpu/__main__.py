"""python -m benchmarks.gpu PART ... [--out FOLDER] [--minutes 7] [--only TEXT]

Parts: numerics, determinism, sanitize (`make test-gpu`); kernels, models (`make bench-gpu`). A run
that is cut short, or out of time, goes on where it stopped when it is started again. Exit status:
0 everything ran and passed, 1 a case failed, 2 bad usage, 3 something has not run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from vitkernels.evidence.facts import facts, kind_of
from vitkernels.evidence.record import BadRecord, Record, file_name
from vitkernels.evidence.runner import Runner, WorkerDied

from . import RESULTS, ROOT, determinism, kernels, models, numerics, sanitize
from .table import status_of, table

PARTS = {
    "numerics": numerics,
    "determinism": determinism,
    "sanitize": sanitize,
    "kernels": kernels,
    "models": models,
}
PATIENCE = {"kernels": 420.0, "models": 470.0}  # torch.compile of every peer


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m benchmarks.gpu")
    parser.add_argument("part", nargs="+", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the records")
    parser.add_argument("--minutes", type=float, default=7.0, help="of each part; then it stops")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has it")
    # The emulator and the interpreter stand in: for the tests of these commands.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    refusal = _refusal(options)
    if refusal is not None:
        parser.error(refusal)
    statuses = []
    try:
        for part in dict.fromkeys(options.part):
            statuses.append(run_part(part, options))
    except (BadRecord, WorkerDied) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted: start it again to go on", file=sys.stderr)
        return 130
    return next((status for status in (1, 3) if status in statuses), 0)


def _refusal(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, in one line."""
    unknown = [part for part in options.part if part not in PARTS]
    if unknown:
        return f"PART must be of {', '.join(PARTS)}, got {', '.join(unknown)}"
    if not options.minutes > 0:
        return f"--minutes: must be above 0, got {options.minutes:g}"
    if options.device == "cpu" and options.out is None:
        return "--device cpu: name a folder by --out: it makes no hardware record"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "no NVIDIA GPU is visible to torch: the evidence needs one"
    options.out = options.out or RESULTS
    if options.device == "cpu" and options.out.resolve() == RESULTS.resolve():
        return "--out: the folder of hardware records takes nothing of --device cpu"
    if not options.out.is_dir():
        return f"--out: the folder {options.out} does not exist: mkdir -p {options.out}"
    if not os.access(options.out, os.W_OK):
        return f"--out: {options.out} may not be written: name another folder"
    for part in options.part:
        if not _chosen(part, options):
            return f"--only: no case of {part} has {options.only!r} in its name"
    return None


def _chosen(part: str, options: argparse.Namespace) -> list[str]:
    return [name for name in PARTS[part].names(options.device) if options.only in name]


def run_part(part: str, options: argparse.Namespace) -> int:
    module, device = PARTS[part], torch.device(options.device)
    of_machine, kind = facts(device), kind_of(device)
    path = options.out / file_name(kind, part, of_machine)
    record = Record(path, kind, part, of_machine)
    record.plan(module.names(options.device), module.facts_of)
    chosen = _chosen(part, options)
    left = record.left(chosen)
    print(f"{part}: {len(left)} cases to run, into {path}", flush=True)
    started = time.monotonic()
    seconds, environment = 60 * options.minutes, _environment(options.device)
    if part == "sanitize":
        done = sanitize.run_part(record, left, options.device, seconds, environment, _say)
    else:
        arguments = {"device": options.device}
        if part == "models":
            arguments["folder"] = str(options.out)
        runner = Runner(
            record,
            f"{module.__name__}:run",
            arguments,
            seconds=seconds,
            patience=PATIENCE.get(part, 150.0),
            environment=environment,
            say=_say,
        )
        done = runner.run(left)
    print(f"\n{table(record)}")
    if not done:
        minutes = (time.monotonic() - started) / 60
        print(f"stopped after {minutes:.1f} minutes: the same command goes on")
    return status_of([record.cases[name] for name in chosen])


def _say(text: str) -> None:
    print(text, flush=True)


def _environment(device: str) -> dict[str, str]:
    """Of the worker: this checkout first; on a CPU the emulator and the interpreter."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"PYTHONPATH": os.pathsep.join(paths)}
    if device == "cpu":
        found |= {"VITKERNELS_EMULATE": "1", "TRITON_INTERPRET": "1"}
    return found


if __name__ == "__main__":
    sys.exit(main())
