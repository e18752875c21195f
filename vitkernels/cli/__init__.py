"""The `vitkernels` command. Bad usage is one line and exit status 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from .._version import __version__
from . import attention_map, bench, check, demo, info, predict, train, tune
from .usage import UsageError, one_line

__all__ = ["UsageError", "main"]

# In the order of --help. Each module has configure(commands) and imports what is heavy in its run.
COMMANDS = (info, demo, check, train, predict, attention_map, bench, tune)


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
    except BrokenPipeError:  # `vitkernels ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:  # a full disk, a folder taken away
        print(f"vitkernels: {error}", file=sys.stderr)
        return 1
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"vitkernels: out of memory, lower --batch: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nvitkernels: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vitkernels", description="Fused kernels for Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"vitkernels {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for command in COMMANDS:
        command.configure(commands)
    return parser
