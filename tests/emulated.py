"""Compiles kernels of tests/emulator/ against the emulator and calls them from Python."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from native_build import CSRC, CXX, ROOT, cached_build, files_under

CXX_FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Werror"]
SEEDS = range(1, 9)


class Kernels:
    """A library's C functions, taking tensors and numbers and raising the error they return."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))

    def __getattr__(self, name):
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p

        def call(*arguments):
            error = function(*(_c_value(a) for a in arguments))
            if error is not None:
                raise RuntimeError(error.decode())

        return call

    def set_seed(self, seed):
        self._library.vitkernels_emulator_set_seed(ctypes.c_uint64(seed))

    def seed(self):
        self._library.vitkernels_emulator_seed.restype = ctypes.c_uint64
        return self._library.vitkernels_emulator_seed()


def _c_value(argument):
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    return argument


def compile_kernels(source: Path, name: str, *flags: str) -> Kernels:
    """The file of tests/emulator/ and the emulator as one library."""
    sources = [source, *sorted((CSRC / "emulator").glob("*.cpp"))]
    command = [CXX, *CXX_FLAGS, *flags, "-I", str(CSRC / "emulator"), "-I", str(CSRC)]
    inputs = files_under(CSRC / "emulator", CSRC / "common", ROOT / "tests" / "emulator")
    return Kernels(
        cached_build(f"{name}.so", [*command, *map(str, sources), "-lpthread"], inputs)[0]
    )


def nan(*shape):
    return torch.full(shape, torch.nan)
