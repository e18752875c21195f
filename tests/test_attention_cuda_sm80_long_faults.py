"""attention's long sm_80 kernels with something necessary taken away, emulated: each is caught, by
the emulator or by the numbers."""

from __future__ import annotations

import pytest
from emulated_mutant import CAN_BUILD, run_mutant

FORWARD, BACKWARD, DBIAS = (
    f"attention_sm80_long{suffix}.cu" for suffix in ("", "_backward", "_dbias")
)
SHARED = "attention_sm80_long.cuh"

pytestmark = pytest.mark.skipif(
    not CAN_BUILD,
    reason="no C++ compiler or no build of the emulator",
)

# What is changed: (file, the text there, which must be there once, what replaces it, the source
# that is compiled).
FAULTS = {
    "none": (FORWARD, "", "", FORWARD),
    "the barrier before v": (
        FORWARD,
        "__syncthreads();  // the tile of v is there; nobody reads k",
        "",
        FORWARD,
    ),
    "a tile too early": (FORWARD, "begin(t + 2)", "begin(t + 3)", FORWARD),
    "the shrinking of what is summed": (
        FORWARD,
        "row.sum[half] * shrink",
        "row.sum[half]",
        FORWARD,
    ),
    "the mask of keys beyond the last": (
        SHARED,
        "i % 2 >= a.Nk) s[n]",
        "i % 2 > a.Nk) s[n]",
        FORWARD,
    ),
    "the barrier of a stage": (
        BACKWARD,
        "__syncthreads();  // the stage is there; nobody reads the other one",
        "",
        BACKWARD,
    ),
    "delta": (SHARED, "p * (d - stats[BY_KEY ? 2 * n + i % 2 : i / 2].y)", "p * d", BACKWARD),
    "the other half's statistics": (BACKWARD, "m * kTile + half * 8", "m * kTile", BACKWARD),
    "the barrier before the next member": (
        DBIAS,
        "__syncthreads();  // nobody reads the tiles of the member before",
        "",
        DBIAS,
    ),
    "a member of a share": (DBIAS, "begin + plan.share : plan", "begin + 1 : plan", DBIAS),
}

CHECK = """
import sys
import torch
from attention_problems import attention_problem, packed_problem
from problems import check
from vitkernels.testing import cuda_path

torch.use_deterministic_algorithms(True)  # unwritten outputs are NaN
with cuda_path("sm80"):
    if sys.argv[1] == "dbias":
        problem = attention_problem(260, 3, 1, 8, torch.bfloat16, Nk=66, bias=(1, 1, 3, 66))
    else:
        problem = packed_problem(1, 273, 1, 64, torch.bfloat16)
    check(problem, "cuda", shape_class="planted faults")
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, tmp_path):
    change = FAULTS[fault]
    done = run_mutant("attention", change, CHECK, tmp_path, "dbias" if change[3] == DBIAS else "")
    if fault == "none":
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert done.returncode == 1, "not caught" if done.returncode == 0 else done.stderr[-2000:]
        assert "Error" in done.stderr, done.stderr[-2000:]
