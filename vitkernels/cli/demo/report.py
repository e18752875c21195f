"""The report folder: complete or not there at all."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..usage import UsageError
from .photos import Row

FILES = (
    "report.json",
    "report.md",
    "curves.png",
    "timings.json",
    "timings.csv",
    "attention_last_block.png",
    "attention_rollout.png",
)


def check_folder(out: Path) -> None:
    """Refuse before any work what could not be written at the end."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: {out} is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "report.json").is_file():
        raise UsageError(f"--out: {out} holds something else: name a new folder or an old report")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"--out: cannot write in {out.parent}: {error.strerror}") from error


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, moved to `out` at the end; on an error nothing of it is left."""
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield building
        building.chmod(0o755)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
            out.rename(old / "old")
            building.rename(out)
            shutil.rmtree(old)
        else:
            building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_timings(folder: Path, rows: list[Row]) -> None:
    table = [dataclasses.asdict(row) for row in rows]
    (folder / "timings.json").write_text(json.dumps(table, indent=2) + "\n")
    with (folder / "timings.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(table)


def write_report(folder: Path, facts: dict, rows: list[Row]) -> None:
    (folder / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "report.md").write_text(_markdown(facts, rows))


def cells(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        row.dtype,
        f"fused ({row.backend})" if row.contender == "fused" else row.contender,
        f"{row.images_per_second:.1f}",
        f"{row.milliseconds:.0f}",
        f"{row.peak_mib:.0f}",
        f"{row.max_difference:.1e}",
        f"{row.relative_difference:.1e}",
    )


HEADINGS = ("model", "dtype", "on", "images/s", "ms/batch", "peak MiB", "max diff", "relative")


def _markdown(facts: dict, rows: list[Row]) -> str:
    digits, agreement, photos = facts["digits"], facts["agreement"], facts["photographs"]
    outcome = "Passed" if facts["passed"] else "FAILED"
    table = [HEADINGS, ("---",) * len(HEADINGS), *map(cells, rows)]
    return f"""# vitkernels demo

{outcome}{" (--quick: no claim about accuracy)" if facts["quick"] else ""}.
vitkernels {facts["versions"]["vitkernels"]}, torch {facts["versions"]["torch"]},
{facts["machine"]}, fused on backend {facts["backend"]}, {facts["seconds"]:.0f} s in all.

## Handwritten digits

{digits["accuracy"]:.2%} of {digits["held_out"]} held-out images right after {digits["epochs"]}
epochs (moving average of the weights) in {digits["seconds"]:.0f} s.

![curves](curves.png)

{agreement["steps"]} more steps from step {agreement["from_step"]}, on identical batches: the losses
of fused and reference differ by at most {agreement["difference"]:.1e}. Allowed are
{agreement["allowed"]:.1e}, the larger of 1e-4 and 3 times the {agreement["divergence"]:.1e} between
the reference in fp32 and in float64.

## Photographs

{", ".join(photos["models"])}, random weights, batch {photos["batch"]},
CPU threads: {photos["threads"]}; best of alternating rounds. Peak MiB is what torch's allocator
held during the call beyond the model and its input (on CPU from the profiler's events; what oneDNN
takes by malloc is not in it). Differences are of the logits, against float64 with the same weights,
and relative to the largest logit.

{chr(10).join("| " + " | ".join(row) + " |" for row in table)}

{photos["timm"]}

## Where the models look

![last block](attention_last_block.png)

![rollout](attention_rollout.png)
"""
