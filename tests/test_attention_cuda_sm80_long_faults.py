"""attention's long sm_80 kernels with something necessary taken away, emulated: each is caught, by
the emulator or by the numbers.

The kernels' own sources are compiled once, with a switch at each place below.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from emulated_mutant import CAN_BUILD, OBJECTS, package_with
from native_build import CSRC, CXX, ROOT

FORWARD, BACKWARD, DBIAS = SOURCES = [
    f"attention_sm80_long{suffix}.cu" for suffix in ("", "_backward", "_dbias")
]
SHARED = "attention_sm80_long.cuh"

pytestmark = pytest.mark.skipif(
    not CAN_BUILD,
    reason="no C++ compiler or no build of the emulator",
)

# Whose numbers show it, the file, the text there, which must be there once, and what replaces it,
# with `planted` for the switch.
FAULTS = {
    "the wait for the copies": (
        "values",
        FORWARD,
        "wait_copies<0>();",
        "if (!planted) wait_copies<0>(); else wait_copies<1>();",
    ),
    "the barrier before v": (
        "values",
        FORWARD,
        "__syncthreads();  // the tile of v is there; nobody reads k",
        "if (!planted) __syncthreads();",
    ),
    "a tile too early": ("values", FORWARD, "begin(t + 2)", "begin(t + (planted ? 3 : 2))"),
    "the shrinking of what is summed": (
        "values",
        FORWARD,
        "row.sum[half] * shrink",
        "row.sum[half] * (planted ? 1.0f : shrink)",
    ),
    "the mask of keys beyond the last": (
        "values",
        SHARED,
        "i % 2 >= a.Nk) s[n]",
        "i % 2 >= a.Nk + planted) s[n]",
    ),
    "the barrier of a stage": (
        "values",
        BACKWARD,
        "__syncthreads();  // the stage is there; nobody reads the other one",
        "if (!planted) __syncthreads();",
    ),
    "delta": (
        "values",
        SHARED,
        "p * (d - stats[BY_KEY ? 2 * n + i % 2 : i / 2].y)",
        "p * (d - (planted ? 0.0f : stats[BY_KEY ? 2 * n + i % 2 : i / 2].y))",
    ),
    "the other half's statistics": (
        "values",
        BACKWARD,
        "m * kTile + half * 8",
        "m * kTile + (planted ? 0 : half * 8)",
    ),
    "the barrier before the next member": (
        "dbias",
        DBIAS,
        "__syncthreads();  // nobody reads the tiles of the member before",
        "if (!planted) __syncthreads();",
    ),
    "a member of a share": (
        "dbias",
        DBIAS,
        "begin + plan.share : plan",
        "begin + plan.share - planted : plan",
    ),
    "which row dropout is of": (
        "dropout",
        SHARED,
        "(head_row + (BY_KEY ? c : r))",
        "(head_row + (BY_KEY && !planted ? c : r))",
    ),
}

CHECK = """
import ctypes, json, sys
import torch
from attention_problems import attention_problem, packed_problem
from problems import check
from vitkernels.testing import cuda_path

torch.use_deterministic_algorithms(True)  # unwritten outputs are NaN
kernels, faults = ctypes.CDLL(sys.argv[1]), json.loads(sys.argv[2])
many = {"Nk": 66, "bias": (1, 1, 3, 66)}  # members of a share: 260 batch items, 256 blocks a tile
problems = {
    "values": packed_problem(1, 273, 1, 64, torch.bfloat16),
    "dbias": attention_problem(260, 3, 1, 8, torch.bfloat16, **many),
    "dropout": attention_problem(1, 20, 1, 64, torch.bfloat16, Nk=50, dropout_p=0.3),
}
caught = {}
for number, (name, which) in enumerate([("none of them", w) for w in problems] + faults):
    kernels.vk_plant(number - len(problems))
    problem = problems[which]
    wanted = ("bias",) if which == "dbias" else None
    try:
        with cuda_path("sm80"):
            check(problem, "cuda", shape_class="planted faults", wanted=wanted)
        caught.setdefault(name, "")
    except (AssertionError, RuntimeError) as error:
        caught[name] = type(error).__name__ + ": " + str(error)
print(json.dumps(caught))
"""


def build(folder):
    """A library of all emulated kernels, those of SOURCES with their switches."""
    copy = folder / "csrc/attention"
    copy.mkdir(parents=True)
    for path in (*(CSRC / "attention").glob("*.*h"), *(CSRC / "attention" / s for s in SOURCES)):
        text = path.read_text()
        for number, (name, (_, file, old, new)) in enumerate(FAULTS.items()):
            if file == path.name:
                assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
                text = text.replace(old, new.replace("planted", f"(vk_planted == {number})"))
        (copy / path.name).write_text("extern int vk_planted;\n" + text)
    switch = 'int vk_planted = -1;\nextern "C" void vk_plant(int which) { vk_planted = which; }\n'
    (copy / "switch.cpp").write_text(switch)
    replaced = {f"attention_{source}.emu.o" for source in SOURCES}
    objects = [o for o in sorted(OBJECTS.glob("*.emu.o")) if o.name not in replaced]
    torch_folder = torch.__path__[0]
    command = [CXX, "-std=c++17", "-O0", "-fPIC", "-w", "-Wno-psabi", "-shared"]
    command += ["-I", str(copy.parent), "-I", str(CSRC / "emulator"), "-I", str(CSRC)]
    command += ["-isystem", f"{torch_folder}/include", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-x", "c++", *(str(copy / s) for s in (*SOURCES, "switch.cpp")), "-x", "none"]
    command += [*map(str, objects), str(OBJECTS / "common_cuda_path.cpp.o")]
    command += ["-L", f"{torch_folder}/lib", "-Wl,--no-as-needed", "-ltorch_cpu", "-lpthread"]
    library = folder / "mutants.so"
    subprocess.run([*command, "-o", str(library)], check=True)
    package_with(library, folder)
    return library


@pytest.fixture(scope="module")
def caught(tmp_path_factory):
    """{fault: what was said}, "" where nothing was."""
    folder = tmp_path_factory.mktemp("mutants")
    library = build(folder)
    paths = os.pathsep.join([str(folder), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "VITKERNELS_EMULATE": "1"}
    faults = json.dumps([(name, which) for name, (which, *_) in FAULTS.items()])
    command = [sys.executable, "-c", CHECK, str(library), faults]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernels_pass(caught):
    assert caught["none of them"] == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(caught, fault):
    assert caught[fault]
