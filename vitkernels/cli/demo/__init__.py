"""`vitkernels demo`: train, check and time a Vision Transformer on real images; write a report."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..arguments import add_backend, add_device
from ..usage import check_backend, device_of, need, threads

NEEDS = ("sklearn", "matplotlib", "PIL", "rich", "numpy")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much work; `--quick` is for trying it out and for tests."""

    epochs: int = 48
    peak_lr: float = 3e-3
    agreement_steps: int = 50
    models: tuple[str, ...] = (
        "vit_small_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "swin_tiny_patch4_window7_224",
    )
    batch: int = 8
    rounds: int = 20
    budget_s: float = 4.0  # for each model and dtype


FULL = Plan()
QUICK = Plan(
    epochs=3,
    agreement_steps=10,
    models=(
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "swin_tiny_patch4_window7_224",
    ),
    batch=2,
    rounds=2,
)


def configure(commands) -> None:
    parser = commands.add_parser(
        "demo", help="train, check and time a Vision Transformer on real images; under two minutes"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("vitkernels_demo"),
        metavar="FOLDER",
        help="report folder; an earlier report in it is replaced (default: %(default)s)",
    )
    add_device(parser)
    add_backend(parser, "`fused`")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few seconds: every step shortened, no accuracy claim",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    need("demo", "demo", *NEEDS)
    from .report import check_folder

    device = device_of(options.device)
    check_backend(options.backend)
    out = options.out.resolve()
    check_folder(out)
    from .stages import Demo

    with threads(None):  # Demo sets them for each stage
        return 0 if Demo(options, QUICK if options.quick else FULL, device).run(out) else 1
