"""distillation_loss in CUDA C++: what depends on its launch plan, its SASS, and planted bugs."""

import re

import pytest
import torch
from compiled_code import disassembler, sass
from distillation_problems import distillation_problem
from emulated_mutant import CAN_BUILD, OBJECTS, run_mutant
from native_build import NVCC
from problems import DTYPE_IDS, check

from vitkernels import _native
from vitkernels.testing import assert_bitwise_equal, available_for, grads_of

FP32, BF16, FP16 = DTYPE_IDS
OBJECT = OBJECTS / "distillation_loss_distillation_loss_cuda.cu.cuda.o"
needs_kernels = pytest.mark.skipif(
    "cuda" not in available_for("distillation_loss"), reason="neither a GPU nor the emulator"
)
needs_plans = pytest.mark.skipif(
    not hasattr(_native.build_facts(), "distillation_loss_plan"),
    reason="vitkernels._C is not built (it needs Python.h and pybind11)",
)
KINDS = {
    "soft": {"temperature": 3.0},
    "hard": {"kind": "hard", "label_smoothing": 0.1},
    "mixup": {"soft_targets": FP32, "label_smoothing": 0.1},
}
# A warp's 1, 2 and 4 chunks, a block's 1 and 2, its walk; each at its edges, where a row that
# begins behind a line needs one chunk more.
EDGES = (249, 250, 256, 257, 505, 512, 513, 1017, 1018, 1024, 1025, 4089, 4096, 4097, 8185, 8200)


@pytest.mark.parametrize("classes", EDGES)
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=DTYPE_IDS.get)
@needs_kernels
def test_each_instance_at_its_edges(classes, dtype):
    for name, options in KINDS.items():
        problem = distillation_problem((5, classes), dtype, **options)
        problem.by_power_of_two = True
        check(problem, "cuda", shape_class=f"K{classes} {name}", grad_layout="ones")


@pytest.mark.parametrize("classes", (40, 1001, 9001))
@pytest.mark.parametrize("offset", (1, 3))
@needs_kernels
def test_rows_that_begin_anywhere(classes, offset):
    """Views with another row stride, and behind a line: no 16-byte accesses, the same numbers."""
    problem = distillation_problem((4, classes), BF16, temperature=2.0)
    expected = grads_of(problem.ours("cuda"), list(problem.inputs.values()))

    def moved(t):
        wide = torch.full((len(t), classes + offset + 7), torch.nan, dtype=t.dtype)
        view = wide[:, offset : offset + classes]
        return view.copy_(t)

    for which in ("logits", "distill_logits", "teacher_logits"):
        inputs = {n: moved(t) if n == which else t for n, t in problem.inputs.items()}
        other = distillation_problem((4, classes), BF16, temperature=2.0)
        if which == "teacher_logits":
            other.options[which] = moved(other.options[which])
        got = grads_of(other.ours("cuda"), list(inputs.values()))
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("offset", (0, 1, 8))
@needs_kernels
def test_raw_backward_of_a_view(offset):
    """A dense gradient that begins behind a line."""
    whole = torch.randn(6 * 50 + offset)
    kept = whole[offset:].view(6, 50)
    (got, nothing) = torch.ops.vitkernels.distillation_loss_bwd.cuda(
        torch.tensor(0.3), kept, None, False, [True, False]
    )
    assert nothing is None and torch.equal(got, kept * torch.tensor(0.3))


@pytest.mark.parametrize("classes", (10, 1000, 1001, 5000, 21841))
@needs_kernels
def test_the_same_bits_again(classes):
    for options in KINDS.values():
        problem = distillation_problem((7, classes), BF16, **options)
        tensors = list(problem.inputs.values())
        (loss,), grads = grads_of(problem.ours("cuda"), tensors)
        (again,), other = grads_of(problem.ours("cuda"), tensors)
        assert_bitwise_equal((again, *other), (loss, *grads))


@needs_kernels
def test_a_large_batch_in_one_sum():
    """More rows than total_kernel has threads."""
    problem = distillation_problem((2100, 3))
    check(problem, "cuda", shape_class="B2100", grad_layout="contiguous")


# ---- Plans


def plan(rows, K, aligned=True, one_type=True):
    return _native.build_facts().distillation_loss_plan(rows, K, aligned, one_type)


@needs_plans
@pytest.mark.parametrize("K", [*range(1, 60), *EDGES, 1000, 2048, 21841, 65536, 2**30])
def test_every_class_has_one_thread(K):
    for aligned in (True, False):
        for one_type in (True, False):
            p = plan(1000, K, aligned, one_type)
            assert p["vectorized"] == aligned and p["fixed_types"] == (aligned and one_type)
            team = p["threads"] if p["block_per_row"] else 32
            assert team % 32 == 0 and team <= 512
            assert p["blocks"] == (1000 if p["block_per_row"] else 250)
            known = {1, 2, 0} if p["block_per_row"] else {1, 2, 4}
            if not p["fixed_types"]:
                known = {2, 0} if p["block_per_row"] else {4}
            assert p["chunks"] in known
            furthest = 7 if aligned and K % 8 else 0
            if p["chunks"]:
                assert team * 8 * p["chunks"] >= K + furthest
            if K <= 9001 and p["chunks"]:
                for phase in {0, furthest}:
                    held = [
                        c for chunk in range(p["chunks"]) for rank in range(team) for j in range(8)
                        if 0 <= (c := (chunk * team + rank) * 8 + j - phase) < K
                    ]  # fmt: skip
                    assert sorted(held) == list(range(K))


@needs_plans
def test_plans_of_the_shapes_that_count():
    def brief(rows, K):
        p = plan(rows, K)
        return p["block_per_row"], p["chunks"], p["threads"], p["blocks"]

    assert brief(1024, 1000) == (False, 4, 128, 256)
    assert brief(1024, 10) == (False, 1, 128, 256)
    assert brief(512, 21841) == (True, 0, 512, 512)
    assert brief(256, 65536) == (True, 0, 512, 256)


# ---- What nvcc made of it


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.skipif(disassembler() is None, reason="cuobjdump and nvdisasm are not here")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_sass(arch):
    """Template arguments: Types, VEC, BLOCK, CHUNKS."""
    kernels = {k: v for k, v in sass(OBJECT, arch).items() if k.startswith("forward_kernel")}
    assert len(kernels) == 18
    for name, code in kernels.items():
        types, vectorized, block, chunks = (int(n) for n in re.findall(r"\d+", name))
        loads = [i for i in code if re.search(r"\bLDG\S*\.128", i)]
        stores = [i for i in code if re.search(r"\bSTG\S*\.128", i)]
        if vectorized:  # three heads and soft targets; in 16 bits a chunk is one access
            accesses = 1 if types == 2 else 2
            assert len(loads) >= 4 * accesses * max(chunks, 1), name
            assert len(stores) >= 2 * accesses * max(chunks, 1), name
        else:
            assert not loads and not stores, name
        assert bool([i for i in code if "BAR.SYNC" in i]) == bool(block), name
        assert not [i for i in code if re.search(r"\b(ATOM|ATOMG|RED|LDL|STL)\b", i)], name


# ---- Planted bugs

CHECK = """
import sys
import torch
from distillation_problems import distillation_problem
from problems import check
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for classes in (41, 1500, 9001):
        for kind in ("soft", "hard"):
            problem = distillation_problem((3, classes), dtype, kind=kind, temperature=2.0)
            if kind == "hard":
                teacher = problem.options["teacher_logits"]
                teacher[:, [5, 30]] = 50.0
            problem.by_power_of_two = True
            check(problem, "cuda", shape_class="mutant", grad_layout="ones")
"""
KERNELS = "distillation_loss_kernels.cuh"
LOOP = "#pragma unroll\n      for (int n = 0; n < N; ++n) {\n        v[n] = words"
MUTANTS = {
    "none": ("", ""),
    "no barrier": ("      __syncthreads();\n" + LOOP, LOOP),
    "phase of another row": ("row % per_line * (K", "(row + 1) % per_line * (K"),
    "sums not raised": ("    x_sum *= exponential", "    x_sum *= 1.0f + 0.0f * exponential"),
    "the last of equals": ("return a < b ? a : b; }", "return a > b ? a : b; }"),
    "no temperature": ("return kl / (scale * scale);", "return kl / scale;"),
}


@pytest.mark.skipif(not CAN_BUILD, reason="the emulator is not built")
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(name, tmp_path):
    change = (KERNELS, *MUTANTS[name], "distillation_loss_cuda.cu")
    done = run_mutant("distillation_loss", change, CHECK, tmp_path)
    assert (done.returncode == 0) == (name == "none"), done.stdout[-2000:] + done.stderr[-2000:]
