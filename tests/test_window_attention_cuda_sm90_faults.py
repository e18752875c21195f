"""The sm_90 kernels of window_attention with something necessary taken away, emulated: each is
caught, by the emulator or by the numbers."""

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
    f"window_attention_{name}" for name in ("sm90.cuh", "sm90.cu", "sm90_backward.cu")
)

pytestmark = pytest.mark.skipif(
    CXX is None or not (OBJECTS / "emulator_emulator.cpp.emu.o").exists(),
    reason="no C++ compiler or no build of the emulator",
)

# What is changed: (file, the text there, which must be there once, what replaces it, the source
# that is compiled, cosine).
FAULTS = {
    "none, forward": (FORWARD, "", "", FORWARD, True),
    "none, backward": (BACKWARD, "", "", BACKWARD, True),
    "a wait for the load": (
        FORWARD,
        "    mbarrier_wait(&full[ring.stage], ring.parity);\n",
        "",
        FORWARD,
        False,
    ),
    "the wait for the results": (
        SHARED,
        "      mbarrier_wait(&done[ring.stage], ring.parity ^ 1);\n",
        "",
        FORWARD,
        False,
    ),
    "the wait for the store": (SHARED, "        wait_stores_read<0>();\n", "", FORWARD, False),
    "the fence after the results": (SHARED, "  fence_proxy_async();\n", "", FORWARD, False),
    "the fence after the padding": (
        FORWARD,
        "  fence_proxy_async();\n  __syncthreads();\n",
        "  __syncthreads();\n",
        FORWARD,
        False,
    ),
    "zeros in the padding": (
        SHARED,
        "make_uint4(0, 0, 0, 0)",
        "make_uint4(0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0)",
        FORWARD,
        False,
    ),
    "the fence of the products": (FORWARD, "    wgmma_fence(floats(s));\n", "", FORWARD, False),
    "the wait for the products": (FORWARD, "    wgmma_wait<0>(floats(s));\n", "", FORWARD, False),
    "the swizzle": (
        SHARED,
        "  constexpr auto kSwizzle = static_cast<Swizzle>(2 * D);\n",
        "  constexpr auto kSwizzle = Swizzle::k32;\n",
        FORWARD,
        False,
    ),
    "the mask": (FORWARD, "    mask_seams(s, a, order, place, row);\n", "", FORWARD, False),
    "a seam": (SHARED, "a.H / a.Wh ? order.below", "a.H / a.Wh ? order.right", FORWARD, False),
    "the barrier of the lengths": (
        FORWARD,
        "      barrier_sync(1 + mine, kWarpgroup);\n",
        "",
        FORWARD,
        True,
    ),
    "the barrier before the unit vectors": (
        BACKWARD,
        "      barrier_sync(1 + mine, kWarpgroup);        // every warp has its S\n",
        "",
        BACKWARD,
        True,
    ),
    "the fence after P and dS": (BACKWARD, "    fence_proxy_async();\n", "", BACKWARD, False),
    "the barrier after P and dS": (
        BACKWARD,
        "    barrier_sync(1 + mine, kWarpgroup);  // P, dS and the unit vectors are there\n",
        "",
        BACKWARD,
        False,
    ),
    "the barrier before the results": (
        BACKWARD,
        "    barrier_sync(1 + mine, kWarpgroup);  // nobody reads the operands any more\n",
        "",
        BACKWARD,
        False,
    ),
    "the wait for dP": (BACKWARD, "    wgmma_wait<0>(floats(dp));\n", "", BACKWARD, False),
    "the wait for the gradients": (
        BACKWARD,
        "    wgmma_wait<0>(floats(dq));\n",
        "",
        BACKWARD,
        False,
    ),
    "the rows of tokens": (
        BACKWARD,
        "sums[rows[y * a.Ww + x]",
        "sums[(y * a.Ww + x)",
        BACKWARD,
        False,
    ),
}

# Ordinary tests; the rest are marked slow: a fault takes a compilation and a process.
ORDINARY = {
    "none, backward",
    "a wait for the load",
    "the wait for the results",
    "the fence after the results",
    "the swizzle",
    "the barrier after P and dS",
}

CHECK = """
import sys
import torch
from problems import check
from vitkernels.testing import cuda_path
from window_attention_problems import window_problem

torch.use_deterministic_algorithms(True)  # unwritten outputs are NaN
problem = window_problem((3, 5), (1, 2), torch.bfloat16, D=32, windows=(4, 4), heads=2,
                         cosine=sys.argv[1] == "True")
with cuda_path("sm90"):
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


@pytest.mark.parametrize(
    "fault", [f if f in ORDINARY else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS]
)
def test_a_planted_fault_is_caught(fault, tmp_path):
    changed, old, new, source, cosine = FAULTS[fault]
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
    command = [CXX, "-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-w", "-Wno-psabi"]
    command += ["-shared", "-I", str(copy.parent), "-I", str(CSRC / "emulator"), "-I", str(CSRC)]
    command += ["-isystem", f"{torch_folder}/include", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-x", "c++", str(copy / source), "-x", "none", *map(str, objects)]
    command += ["-L", f"{torch_folder}/lib", "-Wl,--no-as-needed", "-ltorch_cpu", "-lpthread"]
    subprocess.run([*command, "-o", str(mutant)], check=True)

    package_with(mutant, tmp_path)
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "VITKERNELS_EMULATE": "1"}
    command = [sys.executable, "-c", CHECK, str(cosine)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    if fault.startswith("none"):
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert done.returncode == 1, "not caught" if done.returncode == 0 else done.stderr[-2000:]
        last = done.stderr.strip().splitlines()[-1]
        assert "Error" in done.stderr, last
