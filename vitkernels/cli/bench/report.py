"""What a race came to: tables, timm's CSV columns, a JSON record."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import os
from pathlib import Path

import torch

from ..._version import __version__
from ..info import cpu_name
from ..output import table as make_table
from ..usage import whole_file
from . import FORWARD, TRAIN, memory
from .contenders import OURS
from .race import Race, Result

# timm's columns first, in the order of its published tables; then what those tables say by their
# file names, and what they do not have.
COLUMNS = (
    "model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size",
    "param_count", "infer_gmacs", "infer_macts",
    "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size",
    "contender", "dtype", "device", "threads", "infer_best_step_time", "infer_peak_mib",
    "infer_speedup", "train_best_step_time", "train_peak_mib", "train_speedup",
)  # fmt: skip


def headline(race: Race) -> str:
    plan, cost = race.plan, race.cost
    H, W = race.image_size
    where = f"{machine(race)}, torch {torch.__version__}, load {load()}"
    lines = [
        f"vitkernels {__version__} on {where}",
        f"{plan.model}: {cost.parameters / 1e6:.2f} M parameters, {cost.macs / 1e9:.2f} GMACs an "
        f"image, batch {plan.batch} of {H}x{W}, {plan.backend!r} backend",
    ]
    if race.sources.yardstick_name != "timm":
        lines.append(
            "timm is not installed (pip install 'vitkernels[timm]'): the race is against the same "
            "model on stock PyTorch operators"
        )
    return "\n".join(lines)


def table(result: Result):
    train = result.case.direction == TRAIN
    made = make_table(
        "", "images/s", "median ms", "best ms", "CPU ms", "peak MiB",
        *["attention MiB"] * train, "error", "ratio", "by CPU",
        title=result.case.title,
    )  # fmt: skip
    for entry in sorted(result.entries, key=lambda e: e.best):
        said = [times(result.ratio(entry, by)) for by in ("best", "cpu")]
        if entry.excess > 1:
            said = ["DIFFERS:", f"{entry.excess:.1f}x the error allowed"]
        made.add_row(
            entry.name,
            f"{result.batch / entry.median:.1f}",
            f"{1e3 * entry.median:.1f}",
            f"{1e3 * entry.best:.1f}",
            f"{1e3 * entry.cpu:.1f}",
            mebibytes(entry.peak),
            *[mebibytes(entry.attention)] * train,
            f"{entry.error:.1e}",
            *(said if entry.name != OURS or entry.excess > 1 else ("", "")),
        )
    return made


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def footnote(race: Race) -> str:
    return (
        "ratio: the best time over ours, of alternating rounds; by CPU: the same of the processor "
        "time of all threads, which a busy machine disturbs less; peak: "
        f"{memory.method(race.plan.device)}; attention: what its modules keep for the backward, of "
        "that; error: of the logits, or of the loss where it trains, "
        f"relative to float64; load now {load()}"
    )


def machine(race: Race) -> str:
    device = race.plan.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} thread(s)"


def load() -> str:
    try:
        return f"{os.getloadavg()[0]:.1f} of {os.cpu_count()} cores"
    except OSError:
        return "unknown"


# --- files ----------------------------------------------------------------------------------------


def rows(race: Race, results: list[Result]) -> list[dict]:
    """One row for each contender and dtype, forward and training step side by side."""
    found: dict[tuple, dict] = {}
    for result in results:
        prefix = "infer" if result.case.direction == FORWARD else "train"
        for entry in result.entries:
            row = found.setdefault((entry.name, result.case.dtype), _row(race, entry, result))
            ratio = result.ratio(entry)
            row |= {
                f"{prefix}_samples_per_sec": round(race.plan.batch / entry.median, 2),
                f"{prefix}_step_time": round(1e3 * entry.median, 3),
                f"{prefix}_best_step_time": round(1e3 * entry.best, 3),
                f"{prefix}_batch_size": race.plan.batch,
                f"{prefix}_img_size": race.image_size[-1],
                f"{prefix}_peak_mib": "" if entry.peak is None else round(entry.peak / 2**20, 1),
                f"{prefix}_speedup": "" if ratio is None else round(1 / ratio, 3),
            }
    return list(found.values())


def _row(race: Race, entry, result: Result) -> dict:
    plan, cost = race.plan, race.cost
    return dict.fromkeys(COLUMNS, "") | {
        "model": plan.model,
        "param_count": round(cost.parameters / 1e6, 2),
        "infer_gmacs": round(cost.macs / 1e9, 2),
        "infer_macts": round(cost.activations / 1e6, 2),
        "contender": entry.name,
        "dtype": str(result.case.dtype).removeprefix("torch."),
        "device": plan.device.type,
        "threads": torch.get_num_threads(),
    }


def write_csv(path: Path, race: Race, results: list[Result]) -> None:
    with whole_file(path) as building, building.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows(race, results))


def write_json(path: Path, race: Race, results: list[Result]) -> None:
    with whole_file(path) as building:
        building.write_text(json.dumps(record(race, results), indent=1) + "\n")


def record(race: Race, results: list[Result]) -> dict:
    plan = race.plan
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(race),
        "load": load(),
        "versions": {"vitkernels": __version__, "torch": torch.__version__},
        "model": plan.model,
        "batch": plan.batch,
        "image_size": race.image_size,
        "threads": torch.get_num_threads(),
        "device": plan.device.type,
        "backend": plan.backend,
        "yardstick": race.sources.yardstick_name,
        "peak_is": memory.method(plan.device),
        "results": [
            {
                "direction": result.case.direction,
                "dtype": str(result.case.dtype),
                "title": result.case.title,
                "equal": result.equal,
                "contenders": [
                    dataclasses.asdict(entry) | {"ratio": result.ratio(entry)}
                    for entry in result.entries
                ],
            }
            for result in results
        ],
    }
