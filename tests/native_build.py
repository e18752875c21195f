"""Compiles C++ and CUDA sources for tests, once per content of the sources and command."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "tests"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
NVCC = os.environ.get("NVCC") or shutil.which("nvcc")


def files_under(*folders: Path) -> list[Path]:
    """Every source file under the folders, sorted."""
    suffixes = {".h", ".cuh", ".cu", ".cpp"}
    return sorted(f for d in folders for f in d.rglob("*") if f.suffix in suffixes)


def cached_build(target: str, command: list[str], inputs: Iterable[Path]) -> tuple[Path, str]:
    """Run `command + ["-o", path]` unless that was done before; return the path and what was said.

    The path is unique to the command, the compiler's version and the contents of `inputs`. Workers
    of pytest-xdist wait for each other.
    """
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + "\0".join(command).encode())
    for path in inputs:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    stem, suffix = os.path.splitext(target)
    out = CACHE / f"{stem}-{digest.hexdigest()[:16]}{suffix}"
    log = out.with_suffix(".log")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out.exists() and log.exists()):
            fresh = out.with_name(f"fresh-{out.name}")
            done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
            said = done.stdout + done.stderr
            assert done.returncode == 0, f"{' '.join(command)}\n{said}"
            for stale in CACHE.glob(f"{stem}-*"):
                stale.unlink()
            log.write_text(said)
            fresh.rename(out)
    return out, log.read_text()
