"""The sm_80 kernels of window_attention for large windows with something necessary taken away,
emulated: each is caught, by the emulator or by the numbers."""

from __future__ import annotations

import pytest
from emulated_mutant import CAN_BUILD, check_verdict, run_mutant

SHARED, FORWARD, BACKWARD = (
    f"window_attention_sm80_large{suffix}" for suffix in (".cuh", ".cu", "_backward.cu")
)

pytestmark = pytest.mark.skipif(
    not CAN_BUILD,
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


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, tmp_path):
    done = run_mutant("window_attention", FAULTS[fault], CHECK, tmp_path)
    check_verdict(done, fault != "none")
