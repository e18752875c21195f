"""patch_embed's tensor-core kernels with something necessary taken away, emulated: each is caught,
by the emulator or by the numbers."""

from __future__ import annotations

import pytest
from emulated_mutant import CAN_BUILD, check_verdict, run_mutant

SM80, BACKWARD, SM90, BACKWARD90 = (
    f"patch_embed_{name}.cu" for name in ("sm80", "sm80_backward", "sm90", "sm90_backward")
)
GATHER = "patch_embed_gather.cuh"

pytestmark = pytest.mark.skipif(
    not CAN_BUILD,
    reason="no C++ compiler or no build of the emulator",
)

# What is changed: (file, the text there, which must be there once, what replaces it, the source
# that is compiled).
FAULTS = {
    "none": (SM90, "", "", SM90),
    "the fence before wgmma reads pixels": (SM90, "      fence_proxy_async();\n", "", SM90),
    "the rescaling between channels": (SM90, "sums[i] *= by;", "sums[i] *= 1.0f;", SM90),
    "the sign of the centre": (GATHER, "(8388608.0f + centre)", "(8388608.0f - centre)", SM80),
    "the rows' order in a group": (
        BACKWARD90,
        "first.patch + line - image * groups.patches",
        "first.patch + line % groups.patches + 0 * image + line / 32",
        BACKWARD90,
    ),
    "the fence before wgmma reads the backward's pixels": (
        BACKWARD90,
        "    fence_proxy_async();\n",
        "",
        BACKWARD90,
    ),
    "the barrier before the way out": (
        SM80,
        "  __syncthreads();  // the stages become the way out\n",
        "",
        SM80,
    ),
}
SLOW = {
    "a stage that the other block still reads": (
        "common/pair.cuh",
        "mbarrier_arrive_at(empty, lane)",
        "mbarrier_arrive_at(empty, rank)",
        SM90,
    ),
    "the wait for an empty stage": (
        SM90,
        "      ring.wait_empty();\n",
        "",
        SM90,
    ),
    "the place of the second unit": (SM90, "places + 16 * j", "places", SM90),
    "the wait for the copies": (SM80, "    wait_copies<0>();\n", "", SM80),
    "none of the backward": (BACKWARD, "", "", BACKWARD),
    "none of the sm_90 backward": (BACKWARD90, "", "", BACKWARD90),
    "the release of a stage": (
        BACKWARD90,
        "    wgmma_wait<1>();\n    if (i > 0) ring.pair.release(ring.empty + last);\n",
        "    if (i > 0) ring.pair.release(ring.empty + last);\n",
        BACKWARD90,
    ),
    "the place of a group": (
        BACKWARD90,
        "(group - image * groups.across) * groups.patches",
        "(group - image * groups.across)",
        BACKWARD90,
    ),
    "units four apart": (
        BACKWARD,
        "const int chunk = 2 * (first_unit + 4 * j);",
        "const int chunk = 2 * (first_unit + 2 * j);",
        BACKWARD,
    ),
    "the barrier of dweight's stages": (
        BACKWARD,
        "    __syncthreads();  // this stage is there, and nobody reads the other\n"
        "    if (i + 1 < steps) begin(i + 1);\n"
        "    multiply<TYPE, Major::kMN, Major::kMN>",
        "    if (i + 1 < steps) begin(i + 1);\n    multiply<TYPE, Major::kMN, Major::kMN>",
        BACKWARD,
    ),
}

CHECK = """
import sys
import torch
from patch_embed_problems import UINT8, patch_embed_problem
from problems import check
from vitkernels.testing import cuda_path

torch.use_deterministic_algorithms(True)  # unwritten outputs are NaN
problem = patch_embed_problem((9, 15), 8, 40, UINT8, torch.bfloat16, B=5, Cin=7,
                              std=(0.1, 0.4, 0.2))
with cuda_path(sys.argv[1]):
    check(problem, "cuda", shape_class="planted faults")
"""


def run(fault, folder):
    path = "auto" if fault[3] in (SM90, BACKWARD90) else "sm80"
    return run_mutant("patch_embed", fault, CHECK, folder, path)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, tmp_path):
    check_verdict(run(FAULTS[name], tmp_path), name != "none")


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_another_planted_fault_is_caught(name, tmp_path):
    check_verdict(run(SLOW[name], tmp_path), not name.startswith("none"))
