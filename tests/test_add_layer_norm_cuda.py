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
from problems import DTYPE_IDS, check, output_gradients, philox_keep_mask

from vitkernels import _native, testing
from vitkernels.testing import assert_bitwise_equal, available_for, grads_of

FP32, BF16, FP16 = DTYPE_IDS
CUDA = "cuda" in available_for("add_layer_norm")

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not CUDA, reason="the CUDA kernels can neither run nor be emulated here"),
]

# Branch, stream, y. Rows are many times what the emulator's two multiprocessors hold, and not a
# multiple of it: every team has several rows, and some have one less.
TYPES = {
    "fp32": (FP32, FP32, FP32),
    "bf16": (BF16, BF16, BF16),
    "bf16 on fp32": (BF16, FP32, BF16),
    "bf16 on fp32 to fp32": (BF16, FP32, FP32),  # post-norm under autocast
    "fp16": (FP16, FP16, FP16),
    "fp16 on fp32": (FP16, FP32, FP16),
    "fp16 on fp32 to fp32": (FP16, FP32, FP32),
}
# C, rows: 16 lanes, a warp with 1 to 4 chunks, the last of them not whole, and a block with 1 or 2.
WIDTHS = {96: 419, 248: 211, 392: 157, 720: 131, 1000: 107, 1280: 53, 2104: 29}
SOME = [
    pytest.param(C, types, id=f"{C}-{types}")
    for C, types in itertools.product(WIDTHS, TYPES)
    if types in ("bf16", "bf16 on fp32") or C in (248, 720)
]


def many_rows(C, types, *, shape=None, **options):
    branch, stream, y = TYPES[types]
    dtypes = {"residual_dtype": stream, "out_dtype": y}
    return layer_norm_problem(shape or (WIDTHS[C], 1, C), branch, **dtypes, **options)


@pytest.mark.parametrize(("C", "types"), SOME)
def test_many_rows_of_a_team(C, types):
    gamma = TYPES[types][0] == TYPES[types][2]  # post-norm has no LayerScale
    if hasattr(_native.build_facts(), "add_layer_norm_plan"):
        sizes = [dtype.itemsize for dtype in TYPES[types]]
        for pass_ in ("forward", "backward_gamma" if gamma else "backward"):
            plan = _native.build_facts().add_layer_norm_plan(
                WIDTHS[C], C, True, True, 2, pass_, 90, *sizes
            )
            per_block = 1 if plan["block_per_row"] else plan["threads"] // plan["lanes"]
            assert plan["slots"] >= 2 and WIDTHS[C] > plan["slots"] * plan["blocks"] * per_block
    check(many_rows(C, types, gamma=gamma), "cuda", shape_class=f"C{C} {types}, many rows")


@pytest.mark.parametrize(
    ("C", "types"),
    [*((C, "bf16") for C in WIDTHS), *((248, types) for types in TYPES if types != "bf16")],
)
def test_rows_with_dropout(C, types):
    """As nn.EncoderBlock trains: no LayerScale. DropPath too, at some widths."""
    shape, row_scale = (WIDTHS[C] // 9, 3, C), C in (96, 248, 1280)
    problem = many_rows(C, types, shape=shape, gamma=False, row_scale=row_scale, dropout_p=0.1)
    check(problem, "cuda", shape_class=f"C{C} {types} dropout, {shape[0]} x 3 rows")


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("p", [0.3, 1e-12, 1 - 1e-12])
def test_the_mask_bit_for_bit(C, p):
    """The last two keep every element and none."""
    ones, seed = torch.ones(7, 1, C, dtype=BF16), torch.tensor([2**61 + 5])
    ops, zeros = torch.ops.vitkernels, torch.zeros(7, 1, C)
    _, z, mean, rstd = ops.add_layer_norm_fwd.cuda(
        ones, zeros, None, None, None, None, seed, p, 1e-6, BF16
    )
    dx, *_ = ops.add_layer_norm_bwd.cuda(
        None, zeros + 1, z, mean, rstd, None, None, None, None, None, seed, p, BF16,
        [True] + [False] * 4,
    )  # fmt: skip
    expected = philox_keep_mask(seed.item(), (7, 1, C), p)
    assert torch.equal(z != 0, expected) and torch.equal(dx != 0, expected)
    assert expected.all() or not expected.any() or p == 0.3


@pytest.mark.parametrize("C", [96, 720, 1280])
def test_rows_with_every_option(C):
    problem = many_rows(C, "fp16 on fp32", shape=(23, 1, C), param_dtype=FP32, dropout_p=0.3)
    check(problem, "cuda", shape_class=f"C{C} fp16 dropout gamma, 23 rows")


@pytest.mark.parametrize("C", [96, 720, 1280])
def test_many_rows_of_a_team_without_options(C):
    """No gamma: the backward of two sums; samples of several rows, which a team's steps go over."""
    for shape in ((WIDTHS[C] // 5, 5, C), (1, WIDTHS[C], C)):
        problem = layer_norm_problem(shape, BF16, gamma=False, row_scale=shape[0] > 1)
        check(problem, "cuda", shape_class=f"C{C} bare, many rows")


@pytest.mark.parametrize("types", [t for t in TYPES if "to" not in t and t != "fp32"])
@pytest.mark.parametrize("C", [96, 720, 1280])
def test_many_rows_of_layer_norm_add(C, types):
    branch, stream, _ = TYPES[types]
    problem = layer_norm_add_problem((WIDTHS[C] // 5, 5, C), branch, residual_dtype=stream)
    check(problem, "cuda", shape_class=f"C{C} {types} many rows")


@pytest.mark.parametrize("C", [8200, 9001])
def test_rows_longer_than_a_block_holds(C):
    """Beyond 8192 (4096 where accesses are of one element) the block walks the row."""
    check(layer_norm_problem((2, 3, C), BF16), "cuda", shape_class=f"C{C} three rows")
    check(layer_norm_add_problem((2, 2, C), FP32), "cuda", shape_class=f"C{C} two rows")


@pytest.mark.parametrize("C", [96, 720])
def test_the_same_bits_every_time(C):
    problem = layer_norm_problem((WIDTHS[C], 1, C), BF16, residual_dtype=FP32, dropout_p=0.1)
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
    "a sample that ends within a step": (ROWS, "if (rest_ >= rows_per_sample)",
                                         "if (rest_ > rows_per_sample)"),
    "rows past the last": (ROWS, "length(row < static_cast<Index>(a.rows) ? a.C : 0)",
                           "length(a.C)"),
    "a chunk's own mask": (FORWARD, "drop(a.dropout, kept >> (8 * i), z[i]);",
                           "drop(a.dropout, kept, z[i]);"),
}  # fmt: skip
CHECK = """
import itertools
import torch
from layer_norm_problems import layer_norm_problem
from problems import check

torch.use_deterministic_algorithms(True)  # unwritten outputs are NaN
for shape, p in itertools.product(((31, 3, 96), (11, 13, 392)), (0.0, 0.2)):
    check(layer_norm_problem(shape, torch.bfloat16, dropout_p=p), "cuda", shape_class="faults")
"""


@pytest.mark.skipif(not CAN_BUILD, reason="no C++ compiler or no build of the emulator")
@pytest.mark.parametrize(
    "fault", [f if f == "none" else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS]
)
def test_a_planted_fault_is_caught(fault, tmp_path):
    done = run_mutant("add_layer_norm", (*FAULTS[fault], LAUNCHER), CHECK, tmp_path)
    check_verdict(done, fault != "none")


# ---- Which calls read rows by the ring: without its wait they see memory that nobody wrote, NaN

SEES = """
import sys, torch
import vitkernels.ops
ops, C, p = torch.ops.vitkernels, 96, torch.ones(96)

def nan(outputs):
    return any(t is not None and t.isnan().any().item() for t in outputs)

def rows(*types):
    return [torch.randn(200, 1, C).to(getattr(torch, t)) for t in types]

for call in sys.argv[1:]:
    branch, stream, y, gamma, dropout = call.split()
    x, residual, dz, z, dy = rows(branch, stream, stream, stream, y)
    gamma, seed = p if gamma == "gamma" else None, torch.tensor([3]) if dropout == "0.1" else None
    mean, rstd = torch.zeros(200, 1), torch.ones(200, 1)
    forward = ops.add_layer_norm_fwd.cuda(
        x, residual, p, p, gamma, None, seed, float(dropout), 1e-6, dy.dtype)
    backward = ops.add_layer_norm_bwd.cuda(
        dy, dz, z, mean, rstd, x, p, p, gamma, None, seed, float(dropout), x.dtype,
        [True] * 4 + [gamma is not None])
    added = ops.layer_norm_add_fwd.cuda(x, residual, p, p, None, 1e-6)
    added_back = ops.layer_norm_add_bwd.cuda(residual, x, mean, rstd, p, p, None, [True] * 3)
    print(call, *(int(nan(outputs)) for outputs in (forward, backward, added, added_back)))
"""
F32, B16, F16 = "float32", "bfloat16", "float16"
ALIKE = [(t, t, t) for t in (F32, B16, F16)]
AUTOCAST = [(t, F32, t) for t in (B16, F16)]
POST_NORM = [(t, F32, F32) for t in (B16, F16)]


@pytest.mark.skipif(not CAN_BUILD, reason="no C++ compiler or no build of the emulator")
def test_what_people_train_and_serve_goes_through_the_ring(tmp_path):
    """Forward and backward of add_layer_norm and of layer_norm_add; without the ring's wait."""
    calls = [(*types, gamma) for types in ALIKE + AUTOCAST for gamma in ("gamma", "plain")]
    calls += [(*types, "plain") for types in POST_NORM]
    expected = {" ".join((*call, p)): "1 1 1 1" for call in calls for p in ("0.0", "0.1")}
    for types in POST_NORM:  # LayerScale's gradient: pre-norm only
        expected[" ".join((*types, "gamma", "0.0"))] = "1 0 1 1"
    expected[f"{F32} {F32} {B16} plain 0.0"] = "0 0 1 1"  # a y of its own
    change = (ROWS, "    ring_.wait();\n", "", LAUNCHER)
    done = run_mutant("add_layer_norm", change, SEES, tmp_path, *expected)
    seen = {line[:-8]: line[-7:] for line in done.stdout.splitlines()}
    assert seen == expected, done.stderr[-2000:]
