"""linear_gelu in CUDA C++: each path at its tiles' edges, plans, SASS, planted bugs."""

import itertools
import re

import pytest
import torch
from compiled_code import disassembler, sass
from emulated_mutant import CAN_BUILD, OBJECTS, run_mutant
from linear_gelu_problems import linear_gelu_problem, linear_problem
from native_build import NVCC
from problems import DTYPE_IDS, check

from vitkernels import _native, ops
from vitkernels.testing import assert_bitwise_equal, available_for, cuda_path, grads_of

FP32, BF16, FP16 = DTYPE_IDS
PATHS = ("simt", "sm80", "sm90")
needs_kernels = pytest.mark.skipif(
    "cuda" not in available_for("linear_gelu"), reason="neither a GPU nor the emulator"
)
needs_plans = pytest.mark.skipif(
    not hasattr(_native.build_facts(), "linear_gelu_plan"),
    reason="vitkernels._C is not built (it needs Python.h and pybind11)",
)
# (M, K, N): one tile and its edges; several tiles of each; more steps than stages.
SHAPES = {
    "one": (5, 24, 40),
    "edges": (128, 64, 128),
    "past the edges": (130, 72, 136),
    "many": (300, 328, 264),
    "a row": (1, 8, 8),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
@needs_kernels
def test_each_path_at_its_edges(path, shape):
    M, K, N = SHAPES[shape]
    for dtype in (FP32, BF16) if path == "simt" else (BF16, FP16):
        with cuda_path(path):
            problem = linear_gelu_problem((M, K), N, dtype)
            check(problem, "cuda", shape_class=f"{path} {shape}")


@pytest.mark.parametrize("activation", ("tanh", "quick"))
@pytest.mark.parametrize("path", PATHS)
@needs_kernels
def test_activations(path, activation):
    with cuda_path(path):
        problem = linear_gelu_problem((2, 9, 40), 72, BF16, approximate=activation)
        check(problem, "cuda", shape_class=f"{path} {activation}")


@pytest.mark.parametrize("path", PATHS)
@needs_kernels
def test_linear_and_recomputed_preactivations(path):
    with cuda_path(path):
        check(linear_problem((2, 9, 40), 72, BF16), "cuda", shape_class=f"{path} linear")
        problem = linear_gelu_problem((2, 9, 40), 72, BF16, save_preactivation=False)
        check(problem, "cuda", shape_class=f"{path} recomputed")


@pytest.mark.parametrize("path", PATHS)
@needs_kernels
def test_split_sums_and_the_same_bits(path):
    """dweight over many rows is summed in pieces."""
    problem = linear_gelu_problem((700, 40), 48, BF16)
    tensors = list(problem.inputs.values())
    with cuda_path(path):
        check(problem, "cuda", shape_class=f"{path} split")
        (first, *more), (again, *other) = (
            (*out, *grads) for out, grads in (grads_of(problem.ours("cuda"), tensors) for _ in "ab")
        )
    assert_bitwise_equal((again, *other), (first, *more))


@pytest.mark.parametrize("path", ("sm80", "sm90"))
@needs_kernels
def test_refusals(path):
    def call(dtype, K, N=16, offset=0):
        x = torch.randn(4, K + offset, dtype=dtype)[:, offset:]
        with cuda_path(path):
            ops.linear_gelu(x, torch.randn(N, K, dtype=dtype), backend="cuda")

    with pytest.raises(RuntimeError, match=f"path {path} cannot serve .* would round fp32"):
        call(FP32, 16)
    with pytest.raises(RuntimeError, match="multiple of 8 elements on 16-byte lines"):
        call(BF16, 20)
    with pytest.raises(RuntimeError, match="multiple of 8 elements on 16-byte lines"):
        call(BF16, 16, offset=1)
    if path == "sm90":
        with pytest.raises(RuntimeError, match="it writes fp32, or the products' dtype"):
            call(BF16, 16, N=12)
    else:
        call(BF16, 16, N=13)


@needs_kernels
def test_any_columns_on_sm80():
    with cuda_path("sm80"):
        x, weight, bias = (torch.randn(s).bfloat16() for s in ((70, 16), (75, 16), (75,)))
        got = ops.linear_gelu(x, weight, bias, backend="cuda")
        expected = ops.linear_gelu(x, weight, bias, backend="reference")
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


# ---- Plans


def plan(path, M, N, K, multiprocessors=132):
    return _native.build_facts().linear_gelu_plan(path, M, N, K, multiprocessors)


@needs_plans
@pytest.mark.parametrize("path", PATHS)
def test_pieces_cover_k_once(path):
    for M, N in ((40, 48), (3072, 768), (768, 768), (384, 96), (4096, 1024)):
        for K in (1, 7, 64, 65, 1000, 50432, 401408):
            p = plan(path, M, N, K)
            assert 1 <= p["splits"] <= 8 and p["k_per_split"] % p["tile"][2] == 0
            assert (p["splits"] - 1) * p["k_per_split"] < K <= p["splits"] * p["k_per_split"]


@needs_plans
def test_programs_cover_rows_once():
    for rows in (1, 5, 197, 50432, 401408):
        for N in (8, 384, 3072, 100000):
            p = plan("simt", rows, N, 8)
            assert p["rows_per_program"] % 8 == 0
            assert (p["programs"] - 1) * p["rows_per_program"] < rows
            assert rows <= p["programs"] * p["rows_per_program"] and p["programs"] < 65536


@needs_plans
def test_plans_of_the_shapes_that_count():
    """dweight of ViT-B's fc1 (3072, 768) over 50,432 rows: 144 tiles are 1.1 waves, split ones fill
    the machine; the small tile serves a batch of one only."""
    p = plan("sm90", 3072, 768, 50432)
    assert p["splits"] > 1
    waves = 144 * p["splits"] / 132
    assert waves / -(-waves // 1) > 0.9
    assert plan("sm80", 197, 1536, 384)["small"] and not plan("sm80", 50432, 3072, 768)["small"]
    assert p["shared_bytes"] <= 232448 and 2 * plan("sm80", 1, 1, 1)["shared_bytes"] <= 166912


@needs_plans
def test_pairs_of_blocks():
    """Every tile once, few of them empty; ViT-B's fc1 by 66 pairs."""
    for M, N, multiprocessors in itertools.product(
        (1, 129, 300, 1576, 3152, 50432), (8, 768, 3072), (1, 2, 7, 132)
    ):
        p = plan("sm90", M, N, 768, multiprocessors)
        down, across = -(-M // 128), -(-N // 128)
        assert p["cluster"] in (1, 2) and p["blocks"] % p["cluster"] == 0
        assert p["cluster"] <= p["blocks"] <= max(multiprocessors, p["cluster"])
        tiles = p["items"] * p["cluster"] / p["splits"]
        assert down * across <= tiles <= down * across * 17 / 16
    assert (p["cluster"], p["blocks"]) == (2, 132)


# ---- What nvcc made of it


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.skipif(disassembler() is None, reason="cuobjdump and nvdisasm are not here")
@pytest.mark.parametrize("path, arch", [("sm80", "sm_80"), ("sm90", "sm_90a")])
def test_sass(path, arch):
    kernels = sass(OBJECTS / f"linear_gelu_linear_gelu_{path}.cu.cuda.o", arch)
    assert len(kernels) == (12 if path == "sm80" else 6)

    def count(code, name):
        return sum(bool(re.search(rf"\b{name}\b", i)) for i in code)

    for name, code in kernels.items():
        assert not [i for i in code if re.search(r"(^|\s)(ATOM|ATOMG|RED|LDL|STL)\b", i)], name
        if path == "sm90":  # 64 k by 16, of two halves; a box of A, or two, and two of B
            _, a_major, b_major = (int(n) for n in re.findall(r"\d+", name))
            assert count(code, "HGMMA") == 8, name
            assert count(code, "UTMALDG") == 3 + a_major, name
            assert sum("MULTICAST" in i for i in code) == 2, name
            assert count(code, "UTMASTG") == 4, name
            continue
        # 32 k by 16: of a warp 4 x 4 fragments (2 x 4), A by 4 (2) loads and B by 2
        *_, small = (int(n) for n in re.findall(r"\d+", name))
        assert count(code, "HMMA") == (16 if small else 32), name
        assert count(code, "LDSM") == (8 if small else 12), name
        assert count(code, "LDGSTS") >= 4, name


# ---- Planted bugs

CHECK = """
import sys
import torch
from linear_gelu_problems import linear_gelu_problem
from problems import check
from vitkernels.testing import cuda_path
with cuda_path(sys.argv[1]):
    check(linear_gelu_problem((300, 328), 136, torch.bfloat16), "cuda", shape_class="mutant")
"""
MUTANTS = {
    "no order of the warpgroups": (
        "sm90",
        "    if (item != first_item) barrier_sync(3",
        "    if (item < 0) barrier_sync(3",
    ),
    "results sent too early": (
        "sm90",
        "      fence_proxy_async();\n      barrier_sync",
        "      barrier_sync",
    ),
    "a stage that the other block still reads": (
        "sm90",
        "mbarrier_arrive_at(empty, lane)",
        "mbarrier_arrive_at(empty, rank)",
        "common/pair.cuh",
    ),
    "no meeting of the cluster at the end": (
        "sm90",
        "  cluster_sync();  // the other block may still release stages here\n",
        "",
    ),
    "one group fewer": ("sm80", "wait_copies<kSm80Stages - 2>()", "wait_copies<kSm80Stages - 1>()"),
    "no order of k": ("sm80", "k + lane / 8 % 2 * 8));\n  else", "k));\n  else"),
    "no barrier of the tile": ("simt", "    __syncthreads();\n    if (from", "    if (from"),
}  # fmt: skip


@pytest.mark.skipif(not CAN_BUILD, reason="the emulator is not built")
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(name, tmp_path):
    path, old, new, *changed = MUTANTS[name]
    source = f"linear_gelu_{path}.cu"
    change = (*(changed or [source]), old, new, source)
    done = run_mutant("linear_gelu", change, CHECK, tmp_path, path)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "emulated kernel" in said or "within the error model" in said, said[-2000:]
