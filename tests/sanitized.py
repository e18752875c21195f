"""Runs emulated kernels in a process with a sanitizer's library: `python tests/sanitized.py KIND`.

    planted KIND LIBRARY FUNCTION ARGUMENT   one kernel of tests/emulator/planted.cpp
    cases KIND TEXT                          the small cases of gpu_cases.py with TEXT in their name

The process starts itself again with the library preloaded. Exit status 66 (ThreadSanitizer) or 99
(AddressSanitizer): something was reported, on standard error.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNTIMES = {"tsan": "libtsan.so", "asan": "libasan.so"}
REPORTED = {"tsan": 66, "asan": 99}


def preloaded(kind: str) -> dict[str, str]:
    """The environment of a process that can load code built for this sanitizer."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "g++"

    def path_of(name: str) -> str:
        command = [compiler, f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    library = ROOT / "vitkernels" / "lib" / f"libvitkernels_emu_{kind}.so"
    return os.environ | {
        # libstdc++ too: AddressSanitizer looks for its __cxa_throw before torch brings it.
        "LD_PRELOAD": f"{path_of(RUNTIMES[kind])}:{path_of('libstdc++.so')}",
        "TSAN_OPTIONS": "exitcode=66",
        # Python itself leaks by design; what a launch reads outside its tensors ends it.
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99",
        "VITKERNELS_EMULATE": "1",
        "VITKERNELS_CUDA_LIBRARY": str(library),
        "VITKERNELS_SANITIZED": kind,
        "OMP_NUM_THREADS": "1",
    }


def command(*arguments: str) -> list[str]:
    """ThreadSanitizer's shadow needs addresses where they always were: no randomisation."""
    steady = ["setarch", "-R"] if shutil.which("setarch") else []
    return [*steady, sys.executable, str(Path(__file__)), *arguments]


def main() -> int:
    mode, kind, *rest = sys.argv[1:]
    if os.environ.get("VITKERNELS_SANITIZED") != kind:
        return subprocess.run(command(*sys.argv[1:]), env=preloaded(kind)).returncode
    return {"planted": planted, "cases": cases}[mode](*rest)


def planted(library: str, function: str, argument: str) -> int:
    call = getattr(ctypes.CDLL(library), function)
    call.restype = ctypes.c_char_p
    error = call(int(argument))
    print("launched" if error is None else error.decode())
    return 0 if error is None else 1


def cases(text: str) -> int:
    sys.path.insert(0, str(ROOT))
    from gpu_cases import SMALL

    from vitkernels.evidence.outcome import FAILED, NOT_RUN

    wrong = 0
    for name, case in SMALL.items():
        if case.backend != "cuda" or text not in name:
            continue
        outcome = case.outcome("cpu", values=False)
        print(f"{outcome.status:8} {name} {outcome.why}", flush=True)
        wrong += outcome.status in (FAILED, NOT_RUN)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
