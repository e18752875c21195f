"""python -m benchmarks.gpu.status [--out FOLDER] [--write]

What the hardware records of a folder say: the README's table of where each kernel has run, and the
dispatch tables shipped with the package. Without --write it prints both; with it README.md and
vitkernels/records/ are brought up to date. What never ran says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from vitkernels.evidence.contest import KERNELS
from vitkernels.evidence.outcome import FAILED, FINISHED, PASSED, REFUSED
from vitkernels.evidence.record import BadRecord, read_folder, write_whole
from vitkernels.evidence.shapes import MODULES
from vitkernels.evidence.verdicts import dispatch_records

from . import RESULTS, ROOT

BEGIN, END = (
    "<!-- gpu-status: made by `python -m benchmarks.gpu.status --write` -->",
    "<!-- end -->",
)
NEVER = "has not run on a GPU"
TITLES = {"cuda": "CUDA C++", "triton": "Triton"}
PARTS = ("numerics", "determinism", "sanitize")


def written(backend: str) -> list[str]:
    """The operators that have this kernel."""
    place = {"cuda": "csrc/{0}/{0}_cuda.cu", "triton": "vitkernels/ops/{0}/_triton.py"}[backend]
    return [op for op, slice_ in MODULES.items() if (ROOT / place.format(slice_)).exists()]


def status_table(records: list[dict[str, Any]]) -> str:
    """A line for each kernel and GPU; operators of which the same is known share one."""
    lines = ["| kernels | operators | on a GPU |", "|---|---|---|"]
    tables = dispatch_records(records)
    for backend in KERNELS:
        said: dict[str, list[str]] = {}
        for op in written(backend):
            told = [_of_gpu(op, backend, of_gpu, tables) for of_gpu in _by_gpu(records)]
            text = "; ".join(filter(None, told)) or NEVER
            said.setdefault(text, []).append(f"`{op}`")
        lines += [
            f"| {TITLES[backend]} | {', '.join(ops)} | {text} |" for text, ops in said.items()
        ]
    return "\n".join(lines)


def _by_gpu(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The records of each GPU's newest commit."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["facts"]["gpu"], []).append(record)
    return [
        [r for r in of_gpu if r["facts"]["commit"] == of_gpu[-1]["facts"]["commit"]]
        for of_gpu in found.values()
    ]


def _of_gpu(op: str, backend: str, records: list[dict], tables: dict[str, Any]) -> str:
    """ "NVIDIA H200 (sm_90), 2026-12-01: numerics 812 of 812, ..., wins in 14 of 20 regimes"."""
    parts = []
    for part in PARTS:
        counts = Counter(
            case["status"]
            for record in records
            if record["part"] == part
            for case in record["cases"].values()
            if (case.get("op"), case.get("backend")) == (op, backend)
        )
        of_part = counts.total() - counts[REFUSED]
        if sum(counts[status] for status in FINISHED):
            failed = f" ({counts[FAILED]} FAILED)" if counts[FAILED] else ""
            parts.append(f"{part} {counts[PASSED]} of {of_part}{failed}")
        else:
            parts.append(f"{part} not run")
    facts = records[-1]["facts"]
    regimes = tables.get(facts["compute_capability"], {}).get("operators", {}).get(op, {})
    if regimes:
        wins = sum(entry["backend"] == backend for entry in regimes.values())
        parts.append(f"wins in {wins} of {len(regimes)} regimes")
    elif all(part.endswith("not run") for part in parts):
        return ""
    else:
        parts.append("not timed")
    where = f"{facts['gpu']} ({facts['compute_capability']}), {facts['date'][:10]}"
    return f"{where}: {', '.join(parts)}"


def in_readme(text: str, table: str) -> str:
    """The README with the table between its two marks."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise BadRecord(f"README.md has no {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.status")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="of records")
    parser.add_argument("--write", action="store_true", help="README.md and vitkernels/records/")
    options = parser.parse_args(arguments)
    try:
        if not options.out.is_dir():
            raise BadRecord(f"--out: the folder {options.out} does not exist")
        records = read_folder(options.out)
        table, tables = status_table(records), dispatch_records(records)
        if not options.write:
            print(table)
            print(json.dumps(tables, indent=1))
            return 0
        write(ROOT, table, tables)
    except BadRecord as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def write(root: Path, table: str, tables: dict[str, Any]) -> None:
    readme = root / "README.md"
    write_whole(readme, in_readme(readme.read_text(), table))
    folder = root / "vitkernels" / "records"
    for arch, of_arch in tables.items():
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"{arch}.json", json.dumps({arch: of_arch}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
