"""The sm_80 kernels of window_attention for large windows with something necessary taken away,
emulated: each is caught, by the emulator or by the numbers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from native_build import CSRC, CXX, ROOT

OBJECTS = ROOT / "build/native/inplace/obj"
FOLDER = "window_attention"
SHARED, FORWARD, BACKWARD = (
    f"window_attention_sm80_large{suffix}" for suffix in (".cuh", ".cu", "_backward.cu")
)

pytestmark = pytest.mark.skipif(
    CXX is None or not (OBJECTS / "emulator_emulator.cpp.emu.o").exists(),
    reason="no C++ compiler or no build of the emulator",
)

# What is changed: (file, the text there, which must be there once, what replaces it, the source
# that is compiled).
FAULTS = {
    "none": (BACKWARD, "", "", BACKWARD),
    "the wait for the copies": (FORWARD, "    wait_copies<0>();\n", "", FORWARD),
    "a seam": (SHARED, "place.x + 1 == a.W / a.Ww ? kRight", "place.x == 0 ? kRight", FORWARD),
    "the mask of padded keys": (SHARED, "(seams | kPadding)", "seams", FORWARD),
    "the barrier after dS": (
        BACKWARD,
        "      __syncthreads();  // dS is there; nobody needs",
        "      __syncwarp();  // dS is there; nobody needs",
        BACKWARD,
    ),
    "the barrier before the next dS": (
        BACKWARD,
        "      __syncthreads();  // dS has been read\n",
        "",
        BACKWARD,
    ),
    "the barrier before v and out are copied again": (
        BACKWARD,
        "    __syncthreads();  // v, out and lse have been read\n",
        "    __syncwarp();\n",
        BACKWARD,
    ),
    "pairs that wrap": (BACKWARD, "(packed >> 16) < below", "(packed >> 16) <= below", BACKWARD),
    "delta": (BACKWARD, "x * (dx - (i % 2 == 0 ? terms.y : terms.w))", "x * dx", BACKWARD),
}

CHECK = """
import torch
from problems import check
from vitkernels.testing import cuda_path
from window_attention_problems import window_problem

torch.use_deterministic_algorithms(True)  # unwritten outputs are NaN
problem = window_problem((6, 11), (2, 5), torch.bfloat16, D=32, B=1, windows=(2, 3), heads=1,
                         cosine=True)
with cuda_path("sm80"):
    check(problem, "cuda", shape_class="planted faults")
"""


def package_with(library, folder):
    """A copy of the package, all links, whose emulated kernels are that library's."""
    package = folder / "vitkernels"
    package.mkdir()
    for path in (ROOT / "vitkernels").iterdir():
        if path.name not in ("lib", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "lib").mkdir()
    for path in (ROOT / "vitkernels/lib").iterdir():
        if path.name != "libvitkernels_emu.so":
            (package / "lib" / path.name).symlink_to(path)
    (package / "lib/libvitkernels_emu.so").symlink_to(library)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, tmp_path):
    changed, old, new, source = FAULTS[fault]
    copy = tmp_path / "csrc" / FOLDER
    copy.mkdir(parents=True)
    for path in (CSRC / FOLDER).glob("*.*h"):
        (copy / path.name).write_text(path.read_text())
    (copy / source).write_text((CSRC / FOLDER / source).read_text())
    text = (copy / changed).read_text()
    assert not old or text.count(old) == 1, f"{old!r} is in {changed} {text.count(old)} times"
    (copy / changed).write_text(text.replace(old, new) if old else text)

    mutant = tmp_path / "mutant.so"
    torch_folder = torch.__path__[0]
    replaced = f"{FOLDER}_{source}.emu.o"
    objects = [o for o in sorted(OBJECTS.glob("*.emu.o")) if o.name != replaced]
    objects.append(OBJECTS / "common_cuda_path.cpp.o")
    command = [CXX, "-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-w", "-shared"]
    command += ["-I", str(copy.parent), "-I", str(CSRC / "emulator"), "-I", str(CSRC)]
    command += ["-isystem", f"{torch_folder}/include", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-x", "c++", str(copy / source), "-x", "none", *map(str, objects)]
    command += ["-L", f"{torch_folder}/lib", "-Wl,--no-as-needed", "-ltorch_cpu", "-lpthread"]
    subprocess.run([*command, "-o", str(mutant)], check=True)

    package_with(mutant, tmp_path)
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "VITKERNELS_EMULATE": "1"}
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    if fault == "none":
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert done.returncode == 1, "not caught" if done.returncode == 0 else done.stderr[-2000:]
        assert "Error" in done.stderr, done.stderr[-2000:]
