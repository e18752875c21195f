"""What the commands refuse, each in one line: missing packages, devices, files."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import _native

PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}  # module: package, where they differ


class UsageError(Exception):
    """One line that says what to do; exit status 2."""


def one_line(error: BaseException) -> str:
    """The message of an exception of somebody else, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


# --- what is here ---------------------------------------------------------------------------------


def need(command: str, extra: str, *modules: str) -> None:
    """Refuse in one line where a module is not installed."""
    missing = [PACKAGES.get(m, m) for m in modules if not installed(m)]
    if missing:
        raise UsageError(
            f"{command} needs {', '.join(missing)}: pip install 'vitkernels[{extra}]' or pip "
            f"install {' '.join(missing)}"
        )


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no NVIDIA GPU is visible to torch: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_backend(name: str) -> None:
    if name != "auto" and _native.missing[name] is not None:
        raise UsageError(f"--backend {name}: {_native.missing[name]}")


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """torch on so many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- files ----------------------------------------------------------------------------------------


def check_input_file(path: Path, name: str) -> Path:
    """Refuse a path that is no readable file; `name` is the argument, such as "--weights"."""
    if path.is_dir():
        raise UsageError(f"{name}: {path} is a folder: name a file")
    if not path.exists():
        raise UsageError(f"{name}: {path} does not exist{_near_file(path)}")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{name}: {path} may not be read: change its permissions")
    return path


def _near_file(path: Path) -> str:
    import difflib

    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f": its folder {path.parent} does not exist either" if path.parent.name else ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f": did you mean {path.parent / near[0]}?" if near else ": check the path"


def check_output_file(path: Path, name: str, suffixes: tuple[str, ...] = ()) -> Path:
    """Refuse before any work what could not be written at the end."""
    if path.is_dir():
        raise UsageError(f"{name}: {path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"{name}: {path} is not a regular file: name another")
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{name}: {path} must end in {' or '.join(suffixes)}")
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"{name}: the folder {folder} does not exist: mkdir -p {folder}")
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"{name}: {path} may not be overwritten: name another file")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{name}: cannot write in {folder}: {error.strerror}") from error
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` at the end; on an error nothing of it is left."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    building = Path(name)
    try:
        yield building
        building.chmod(0o644)
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)
