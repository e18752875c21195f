"""What `vitkernels tune` runs in its worker, and how its record becomes the user's."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from .. import _dispatch
from .clock import Limits
from .contest import run_contest
from .outcome import Outcome
from .record import write_whole
from .shapes import contest_named

BATCH = 4  # enough to compare values, in the memory of any GPU; times are of whole batches
SECONDS = {"cuda": 0.2, "cpu": 0.0}  # of timing for each contest


@functools.cache
def _limits(device: str) -> Limits:
    return Limits.measured(torch.device(device), 0.1 if device == "cuda" else 0.01)


def run(name: str, device: str) -> Outcome:
    """Both kernels beside the stock composition that `auto` would take; no further peers."""
    on = torch.device(device)
    seconds = SECONDS[device]
    return run_contest(
        contest_named(name), on, _limits(device), seconds=seconds, paths=False, check_batch=BATCH
    )


def keep(found: dict[str, Any]) -> Path:
    """Put the records of this GPU's compute capability into the user's file, all or nothing."""
    path = _dispatch.user_records()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        records = json.loads(path.read_text())
        _dispatch.merged([records])
    except FileNotFoundError:
        records = {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        warnings.warn(f"vitkernels: {path} was unreadable and is replaced: {error}", stacklevel=2)
        records = {}
    write_whole(path, json.dumps(records | found, indent=1) + "\n")
    return path
