"""The sm_90 kernels of window_attention with something necessary taken away, emulated: each is
caught, by the emulator or by the numbers."""

from __future__ import annotations

import pytest
from emulated_mutant import CAN_BUILD, check_verdict, run_mutant

SHARED, FORWARD, BACKWARD = (
    f"window_attention_{name}" for name in ("sm90.cuh", "sm90.cu", "sm90_backward.cu")
)

pytestmark = pytest.mark.skipif(
    not CAN_BUILD,
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


@pytest.mark.parametrize(
    "fault", [f if f in ORDINARY else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS]
)
def test_a_planted_fault_is_caught(fault, tmp_path):
    *change, cosine = FAULTS[fault]
    done = run_mutant("window_attention", change, CHECK, tmp_path, str(cosine))
    check_verdict(done, not fault.startswith("none"))
