"""Finds and loads the compiled libraries, and remembers why one is missing.

Nothing here raises: a missing compiler, library or GPU leaves the other backends working, and
`vitkernels info` prints what this module learned.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from pathlib import Path

import torch

LIB_DIR = Path(__file__).parent / "lib"

# Read once, at import: dispatch must not look at the environment while a graph is being traced.
EMULATE = os.environ.get("VITKERNELS_EMULATE", "0") == "1"
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

CPU_ISA_LEVELS = ("portable", "avx2", "avx512", "avx512bf16")


# A CUDA library built elsewhere, for a machine that has a GPU and no nvcc; with
# VITKERNELS_EMULATE=1 another build of the emulator, such as one for a sanitizer.
_cuda_library = os.environ.get("VITKERNELS_CUDA_LIBRARY")


def library_path(name: str) -> Path:
    if name == ("vitkernels_emu" if EMULATE else "vitkernels_cuda") and _cuda_library:
        return Path(_cuda_library)
    return LIB_DIR / f"lib{name}.so"


def _load(name: str, how_to_build: str) -> str | None:
    """Load one library; None when it is loaded, otherwise the reason why not."""
    path = library_path(name)
    if not path.exists():
        if path.parent != LIB_DIR:
            return f"VITKERNELS_CUDA_LIBRARY: {path} does not exist"
        return f"{path.name} is not built ({how_to_build})"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error.__cause__ or error}"
    return None


def _load_cuda() -> str | None:
    if EMULATE:
        return _load("vitkernels_emu", "VITKERNELS_EMULATE=1 needs it: make build")
    if torch.version.cuda is None:
        return "this torch is built for CPUs only (install a CUDA build of torch)"
    reason = _load(
        "vitkernels_cuda", "needs nvcc at build time: install the CUDA toolkit, then make build"
    )
    if reason is None and not torch.cuda.is_available():
        return "no NVIDIA GPU is visible to torch"
    return reason


def _find_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    if INTERPRET or torch.cuda.is_available():
        return None
    return (
        "no NVIDIA GPU is visible to torch (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    )


_wanted_isa = os.environ.get("VITKERNELS_CPU_ISA")
if _wanted_isa is not None and _wanted_isa not in CPU_ISA_LEVELS:
    warnings.warn(
        f"vitkernels: VITKERNELS_CPU_ISA must be one of {CPU_ISA_LEVELS}, "
        f"got {_wanted_isa!r}: ignored",
        stacklevel=2,
    )


def _multiplies_in_matrix_unit() -> bool:
    """Whether stock PyTorch has AMX here. A level asked for by name is what runs instead."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if _wanted_isa is not None or capabilities is None:
        return False
    return bool(capabilities().get("amx_bf16", False))


cpu_multiplies_in_matrix_unit = _multiplies_in_matrix_unit()

# backend -> None when it can run here, else the reason. "torch" and "reference" always can.
missing: dict[str, str | None] = {
    "cpu": _load(
        "vitkernels_cpu", "needs g++ at build time: install g++ and make, then make build"
    ),
    "cuda": _load_cuda(),
    "triton": _find_triton(),
    "torch": None,
    "reference": None,
}

# Device types whose tensors each backend takes, on this machine and in this process.
devices: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu",),
    "cuda": ("cpu",) if EMULATE else ("cuda",),
    "triton": ("cpu", "cuda") if INTERPRET else ("cuda",),
    "torch": ("cpu", "cuda", "meta"),
    "reference": ("cpu", "cuda", "meta"),
}


CUDA_PATHS = ("auto", "simt", "sm80", "sm90")


def force_cuda_path(path: str) -> str:
    """Have the CUDA kernels take one path (`CUDA_PATHS`) for every operator that has it; returns
    the one before. For tests and benchmarks: a path that cannot serve a call is an error."""
    library = "vitkernels_emu" if EMULATE else "vitkernels_cuda"
    force = ctypes.CDLL(str(library_path(library))).vitkernels_force_cuda_path
    return CUDA_PATHS[force(CUDA_PATHS.index(path))]


def build_facts():
    """`vitkernels._C` (build facts, CPU features, launch plans), or None where it is not built."""
    try:
        from vitkernels import _C
    except ImportError:
        return None
    return _C
