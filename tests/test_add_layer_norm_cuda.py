"""add_layer_norm in CUDA C++: rows read by a ring at every depth, what a dropped branch is not read
for, and each necessary part taken away."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch
from emulated_mutant import CAN_BUILD, check_verdict, run_mutant
from layer_norm_problems import layer_norm_add_problem, layer_norm_problem
from native_build import ROOT
from problems import DTYPE_IDS, check, output_gradients

from vitkernels import _native, testing
from vitkernels.testing import assert_bitwise_equal, available_for, grads_of

FP32, BF16, FP16 = DTYPE_IDS
CUDA = "cuda" in available_for("add_layer_norm")

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not CUDA, reason="the CUDA kernels can neither run nor be emulated here"),
]

# Branch, stream. Rows are many times what the emulator's two multiprocessors hold, and not a
# multiple of it: every team has several rows, and some have one less.
TYPES = {
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "bf16 on fp32": (BF16, FP32),
    "fp16": (FP16, FP16),
    "fp16 on fp32": (FP16, FP32),
}
# C, rows: 16 lanes, a warp with 1 to 4 chunks, the last of them not whole, and a block with 1 or 2.
WIDTHS = {96: 419, 248: 211, 392: 157, 720: 131, 1000: 107, 1280: 53, 2104: 29}
SOME = [
    pytest.param(C, types, id=f"{C}-{types}")
    for C, types in itertools.product(WIDTHS, TYPES)
    if types in ("bf16", "bf16 on fp32") or C in (248, 720)
]


@pytest.mark.parametrize(("C", "types"), SOME)
def test_many_rows_of_a_team(C, types):
    branch, stream = TYPES[types]
    if hasattr(_native.build_facts(), "add_layer_norm_plan"):
        for pass_ in ("forward", "backward_gamma"):
            plan = _native.build_facts().add_layer_norm_plan(
                WIDTHS[C], C, True, True, 2, pass_, 90, branch.itemsize, stream.itemsize
            )
            per_block = 1 if plan["block_per_row"] else plan["threads"] // plan["lanes"]
            assert plan["slots"] >= 2 and WIDTHS[C] > plan["slots"] * plan["blocks"] * per_block
    problem = layer_norm_problem((WIDTHS[C], 1, C), branch, residual_dtype=stream)
    check(problem, "cuda", shape_class=f"C{C} {types}, many rows")


@pytest.mark.parametrize("C", [96, 720, 1280])
def test_many_rows_of_a_team_without_options(C):
    """No gamma: the backward of two sums; samples of several rows, which a team's steps go over."""
    for shape in ((WIDTHS[C] // 5, 5, C), (1, WIDTHS[C], C)):
        problem = layer_norm_problem(shape, BF16, gamma=False, row_scale=shape[0] > 1)
        check(problem, "cuda", shape_class=f"C{C} bare, many rows")


@pytest.mark.parametrize("stream", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("C", [96, 720, 1280])
def test_many_rows_of_layer_norm_add(C, stream):
    problem = layer_norm_add_problem((WIDTHS[C] // 5, 5, C), BF16, residual_dtype=stream)
    check(problem, "cuda", shape_class=f"C{C} many rows, stream in {DTYPE_IDS[stream]}")


@pytest.mark.parametrize("C", [8200, 9001])
def test_rows_longer_than_a_block_holds(C):
    """Beyond 8192 (4096 where accesses are of one element) the block walks the row."""
    check(layer_norm_problem((2, 3, C), BF16), "cuda", shape_class=f"C{C} three rows")
    check(layer_norm_add_problem((2, 2, C), FP32), "cuda", shape_class=f"C{C} two rows")


@pytest.mark.parametrize("C", [96, 720])
def test_the_same_bits_every_time(C):
    problem = layer_norm_problem((WIDTHS[C], 1, C), BF16, residual_dtype=FP32)
    tensors = list(problem.inputs.values())

    def run():
        with torch.no_grad():
            outputs = testing.as_tuple(problem.ours("cuda")(*tensors))
        return sum(grads_of(problem.ours("cuda"), tensors, output_gradients(problem, outputs)), ())

    first = run()
    for _ in range(3):
        for mine, before in zip(run(), first, strict=True):
            assert_bitwise_equal(mine, before)


# ---- What is not read: dropped rows lie on pages that nobody may read, so a read ends the process

UNREADABLE = """
import ctypes, mmap, os
import torch
import vitkernels.ops

torch.set_num_threads(1)  # nothing that a fork would lose
libc = ctypes.CDLL(None, use_errno=True)
ops = torch.ops.vitkernels
B, N = 9, 16
forbidden = [1, 4, 8]


def rows_on_pages(C):
    tensor = torch.frombuffer(mmap.mmap(-1, B * N * C * 2), dtype=torch.bfloat16).view(B, N, C)
    tensor.copy_(torch.randn(B, N, C))
    size = N * C * 2
    for sample in forbidden:
        start = tensor.data_ptr() + sample * size
        assert size % mmap.PAGESIZE == 0 and start % mmap.PAGESIZE == 0
        assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), 0) == 0
    return tensor


def call(op, C, dropped):
    x, other, scale = rows_on_pages(C), torch.randn(B, N, C).bfloat16(), torch.full((B,), 1.25)
    if dropped:
        scale[forbidden] = 0.0
    weight, bias, gamma = torch.ones(C), torch.zeros(C), torch.ones(C)
    mean, rstd = torch.zeros(B, N), torch.ones(B, N)
    if op == "forward":
        _, z, *_ = ops.add_layer_norm_fwd.cuda(
            x, other, weight, bias, gamma, scale, None, 0.0, 1e-6, torch.bfloat16)
        assert torch.equal(z[forbidden], other[forbidden])
        return
    if op == "backward":
        dx, *rest = ops.add_layer_norm_bwd.cuda(
            other, other, other, mean, rstd, x, weight, bias, gamma, scale, None, 0.0,
            torch.bfloat16, [True] * 5)
    else:
        dx, *rest = ops.layer_norm_add_bwd.cuda(
            x, other, mean, rstd, weight, bias, scale, [True] * 3)
    assert not dx[forbidden].any() and all(t.isfinite().all() for t in rest)


for op in ("forward", "backward", "layer_norm_add backward"):
    for C in (128, 256, 1152):  # teams in a warp, warps, blocks
        for dropped in (True, False):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    call(op, C, dropped)
                    status = 0
                finally:
                    os._exit(status)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(op, C, "dropped" if dropped else "kept", ended, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect by its Linux name")
@pytest.mark.skipif(not _native.EMULATE, reason="pages of this process, which a GPU cannot see")
def test_a_dropped_sample_is_not_even_read():
    """x of a dropped sample in add_layer_norm; the gradient of its output in layer_norm_add."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "VITKERNELS_EMULATE": "1"}
    command = [sys.executable, "-c", UNREADABLE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    ended = [line.rsplit(maxsplit=2)[1:] for line in done.stdout.splitlines()]
    assert len(ended) == 18, done.stderr[-2000:]
    assert {status for row, status in ended if row == "dropped"} == {"0"}, done.stderr[-2000:]
    trapped = {status for row, status in ended if row == "kept"}
    assert trapped <= {str(-signal.SIGSEGV), str(-signal.SIGBUS)}  # the pages do forbid


# ---- Something necessary taken away: caught by the emulator or by the numbers

LAUNCHER = "add_layer_norm_cuda.cu"
ROWS, FORWARD, BACKWARD = (f"add_layer_norm_{part}.cuh" for part in ("rows", "forward", "backward"))
COMMON = "common/layer_norm_rows.cuh"
FAULTS = {
    "none": (LAUNCHER, "", ""),
    "the wait for a row": (ROWS, "    ring_.wait();\n", ""),
    "the wait for the grid before": (COMMON, "  wait_for_grid_before();\n", ""),
    "the barrier after the parameters": (
        FORWARD,
        "    if constexpr (FORM == Form::kAddNorm) shared.fill(2, a.gamma, a.C, 1.0f);\n"
        "    __syncthreads();\n",
        "    if constexpr (FORM == Form::kAddNorm) shared.fill(2, a.gamma, a.C, 1.0f);\n",
    ),
    "the barrier before the sums take the rows' place": (
        BACKWARD,
        "  if constexpr (RING && !BLOCK) __syncthreads();  // where rows were",
        "  // where rows were",
    ),
    "the barrier between the warps' sums": (
        COMMON,
        "         ...);\n      }\n      __syncthreads();\n    }\n",
        "         ...);\n      }\n    }\n    __syncthreads();\n",
    ),
    "the next row of a slot": (ROWS, "VK_DEVICE void close() { ring_.ended(); }",
                               "VK_DEVICE void close() {}"),
    "a sample that ends within a step": (ROWS, "if (rest_ >= a_.rows_per_sample)",
                                         "if (rest_ > a_.rows_per_sample)"),
    "rows past the last": (ROWS, "length(row < a.rows ? a.C : 0)", "length(a.C)"),
}  # fmt: skip
FEW = ("none", "the wait for a row")

CHECK = """
import torch
from layer_norm_problems import layer_norm_problem
from problems import check

torch.use_deterministic_algorithms(True)  # unwritten outputs are NaN
for shape in ((31, 3, 96), (11, 13, 392)):
    check(layer_norm_problem(shape, torch.bfloat16), "cuda", shape_class="planted faults")
"""


@pytest.mark.skipif(not CAN_BUILD, reason="no C++ compiler or no build of the emulator")
@pytest.mark.parametrize(
    "fault", [f if f in FEW else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS]
)
def test_a_planted_fault_is_caught(fault, tmp_path):
    done = run_mutant("add_layer_norm", (*FAULTS[fault], LAUNCHER), CHECK, tmp_path)
    check_verdict(done, fault != "none")
