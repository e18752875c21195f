"""Where and with what a record was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import _native
from .._version import __version__

HARDWARE, EMULATION = "hardware", "emulation"
UNKNOWN = "unknown"


def kind_of(device: torch.device) -> str:
    """Only what ran on the GPU itself is a hardware record."""
    return HARDWARE if device.type == "cuda" else EMULATION


def facts(device: torch.device) -> dict[str, Any]:
    """GPU, compute capability, driver, CUDA, torch, Triton, commit and date."""
    found: dict[str, Any] = {
        "vitkernels": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "missing": {name: _native.missing[name] for name in ("cuda", "triton")},
    }
    if device.type != "cuda":
        found |= {"gpu": None, "compute_capability": None, "driver": None}
        found["cpu"] = "the kernels ran in the emulator and in Triton's interpreter"
        return found
    of_gpu = torch.cuda.get_device_properties(device)
    found |= {
        "gpu": of_gpu.name,
        "compute_capability": f"sm_{of_gpu.major}{of_gpu.minor}",
        "driver": driver(),
        "gpu_memory": of_gpu.total_memory,
        "multiprocessors": of_gpu.multi_processor_count,
    }
    return found


def commit() -> str:
    """The checkout's commit, with "+changes" where files differ from it; VITKERNELS_COMMIT names
    it for a tree that was copied without its history."""
    named = os.environ.get("VITKERNELS_COMMIT")
    if named:
        return named
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return UNKNOWN
    head = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if head is None:
        return UNKNOWN
    tracked = ("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    changed = _output("git", "-C", str(root), *tracked)
    return head + ("+changes" if changed else "")


def driver() -> str:
    """The NVIDIA driver's version."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = _output(*query)
    if found:
        return found.splitlines()[0]
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return UNKNOWN
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else UNKNOWN


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
