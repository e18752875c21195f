"""`vitkernels bench`: our model, timm's and torch.compile of it, in one run, taking turns."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import DEFAULT_MODEL, DTYPES, add_backend, add_device, one_or_many, positive
from ..usage import UsageError, check_backend, check_output_file, device_of, need, threads

FORWARD, TRAIN = "forward", "train"


def configure(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time a model beside timm and torch.compile; under five minutes",
        description="The models have the same weights and take turns, so that a busy machine is "
        "unfair to all alike. Outputs (and gradients) are compared first: there is no ratio for "
        "a model that computes something else. bfloat16 casts the model for the forward, and "
        "is autocast with float32 parameters for the training step (AdamW included, no DropPath).",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="timm's name")
    parser.add_argument("--batch", type=positive, default=8, metavar="N")
    parser.add_argument("--image-size", type=positive, metavar="N")
    parser.add_argument(
        "--dtype",
        type=one_or_many(DTYPES),
        default=["float32", "bfloat16"],
        metavar="D[,D]",
        help="float32, bfloat16, float16 (default: float32,bfloat16)",
    )
    parser.add_argument("--forward", action="store_true", help="only the forward")
    parser.add_argument("--train", action="store_true", help="only the training step")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="race torch.compile too (default); compiling takes most of the time",
    )
    parser.add_argument(
        "--seconds", type=positive, metavar="S", help="of timing for each case (default: 12)"
    )
    parser.add_argument("--quick", action="store_true", help="a batch of 2, a second for each case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write timm's columns here")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    add_backend(parser, "vitkernels")
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    need("bench", "cli", "rich")
    for path, name, suffix in ((options.json, "--json", ".json"), (options.csv, "--csv", ".csv")):
        if path is not None:
            check_output_file(path, name, (suffix,))
    device = device_of(options.device)
    check_backend(options.backend)
    if device.type == "cpu" and "float16" in options.dtype and not options.forward:
        raise UsageError("--dtype float16 trains on a GPU only: add --forward")
    from ..output import console
    from ..progress import bar
    from . import report
    from .race import Race, plan_of

    with threads(options.threads):
        race = Race(plan_of(options, device))
        out = console()
        out.print(report.headline(race))
        results = []
        with bar(console(stderr=True), "bench", race.steps) as step:
            for case in race.cases():
                results.append(race.run(case, step))
    for result in results:
        out.print(report.table(result))
    out.print(report.footnote(race))
    if options.json is not None:
        report.write_json(options.json, race, results)
    if options.csv is not None:
        report.write_csv(options.csv, race, results)
    return 0 if all(result.equal for result in results) else 1
