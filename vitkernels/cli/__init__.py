"""The `vitkernels` command: info and demo. Bad usage is one line and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import _dispatch
from .._version import __version__


class UsageError(Exception):
    """One line that says what to do; exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = _parser().parse_args(argv)
        return options.run(options)
    except UsageError as error:
        print(f"vitkernels: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder taken away
        print(f"vitkernels: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nvitkernels: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vitkernels", description="Fused kernels for Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"vitkernels {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    info = commands.add_parser("info", help="what runs on this machine, and what would add more")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo", help="train, check and time a Vision Transformer on real images; under two minutes"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("vitkernels_demo"),
        metavar="FOLDER",
        help="report folder; an earlier report in it is replaced (default: %(default)s)",
    )
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument(
        "--backend",
        choices=("auto", *_dispatch.BACKEND_NAMES),
        default="auto",
        help="what `fused` runs on (default: auto)",
    )
    demo.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)"
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N")
    demo.add_argument(
        "--quick",
        action="store_true",
        help="a few seconds: every step shortened, no accuracy claim",
    )
    demo.set_defaults(run=_demo)
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def _info(options: argparse.Namespace) -> int:
    from .info import print_info

    print_info()
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import run

    return run(options)
