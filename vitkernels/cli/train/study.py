"""Does the teacher help? The same student from several seeds, alone and taught, and a report."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

from ..output import table
from ..usage import whole_file
from . import prepare, train
from .distill import accuracy, make_teacher
from .engine import Stopped
from .options import FILE, Options
from .parallel import World


def compare(o: Options, device, console) -> None:
    seconds = 0.0
    folder = Path(o.out)
    data, _, config = prepare(o)
    teacher = make_teacher(o, data, device, console, folder)
    right, seen = accuracy(teacher.model, data, device)
    runs = []
    for seed in range(o.seed, o.seed + o.compare_seeds):
        found = {}
        for way in ("alone", "taught"):
            out = folder / f"seed-{seed}-{way}"
            going_on = (out / FILE).exists()
            out.mkdir(exist_ok=True)
            mine = dataclasses.replace(
                o, out=str(out), seed=seed, compare_seeds=None,
                teacher=o.teacher if way == "taught" else None,
            )  # fmt: skip
            mine.save(out)
            console.print(f"seed {seed}, {way}")
            teaching = teacher if mine.teacher else None
            try:
                last = train(mine, World(), device, console, going_on, teaching)
            except Stopped as error:  # goes on with the whole study
                raise Stopped(str(error).replace(str(out), str(folder))) from error
            found[way] = last["val_accuracy"]
            rows = json.loads((out / "log.json").read_text())
            seconds += sum(row["seconds"] for row in rows)
        runs.append({"seed": seed, **found, "difference": found["taught"] - found["alone"]})
    report = summary(runs) | {
        "teacher": {"what": o.teacher, "accuracy": right / seen},
        "student": config["architecture"],
        "held_out": seen,
        "epochs": o.epochs,
        "seconds": seconds,
    }
    with whole_file(folder / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n")
    with whole_file(folder / "report.md") as path:
        path.write_text(markdown(report))
    made = table("seed", "alone", "taught", "difference")
    for r in runs:
        made.add_row(str(r["seed"]), *(_percent(r[k]) for k in ("alone", "taught")), _points(r))
    console.print(made)
    console.print(sentence(report))


def summary(runs: list[dict]) -> dict:
    """runs: seed, alone, taught, difference, as shares of the held-out images after the last
    epoch."""
    differences = [r["difference"] for r in runs]
    return {
        "runs": runs,
        "mean_alone": statistics.mean(r["alone"] for r in runs),
        "mean_taught": statistics.mean(r["taught"] for r in runs),
        "mean_difference": statistics.mean(differences),
        "least_difference": min(differences),
        "better": sum(d > 0 for d in differences),
        "holds": min(differences) > 0,
    }


def sentence(report: dict) -> str:
    n = len(report["runs"])
    return (
        f"Taught, the student is right on {_percent(report['mean_taught'])} of the held-out "
        f"images, alone on {_percent(report['mean_alone'])}: "
        f"{100 * report['mean_difference']:+.2f} points on average, better with "
        f"{report['better']} of {n} seeds, at least "
        f"{100 * report['least_difference']:+.2f} points. The margin "
        f"{'holds' if report['holds'] else 'does not hold'} over all seeds."
    )


def markdown(report: dict) -> str:
    rows = [
        f"| {r['seed']} | {_percent(r['alone'])} | {_percent(r['taught'])} | {_points(r)} |"
        for r in report["runs"]
    ]
    return "\n".join(
        [
            "# Distillation: does the teacher help?", "",
            f"Teacher: {report['teacher']['what']}, {_percent(report['teacher']['accuracy'])} of "
            f"{report['held_out']} held-out images. Student: {report['student']}, "
            f"{report['epochs']} epochs, the last weights tested; "
            f"{report['seconds']:.0f} s of training in all.", "",
            "| seed | alone | taught | difference (points) |", "|---|---|---|---|", *rows, "",
            sentence(report), "",
        ]
    )  # fmt: skip


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _points(run: dict) -> str:
    return f"{100 * run['difference']:+.2f}"
