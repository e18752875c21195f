"""patch_merge_layer_norm in CUDA C++: its launch plan, its SASS, layouts, and planted bugs."""

import re

import pytest
import torch
from compiled_code import disassembler, sass
from emulated_mutant import CAN_BUILD, OBJECTS, run_mutant
from native_build import NVCC
from patch_merge_problems import patch_merge_problem
from problems import DTYPE_IDS, check

from vitkernels import _native
from vitkernels.testing import assert_bitwise_equal, available_for, grads_of

FP32, BF16, FP16 = DTYPE_IDS
OBJECT = OBJECTS / "patch_merge_patch_merge_cuda.cu.cuda.o"
needs_kernels = pytest.mark.skipif(
    "cuda" not in available_for("patch_merge_layer_norm"), reason="neither a GPU nor the emulator"
)
needs_plans = pytest.mark.skipif(
    not hasattr(_native.build_facts(), "patch_merge_plan"),
    reason="vitkernels._C is not built (it needs Python.h and pybind11)",
)
# Lanes of 3 and 4 chunks at their edges, a block's 1 and 2, its walk with and without 16 bytes.
EDGES = (1, 7, 8, 16, 24, 40, 96, 104, 128, 200, 256, 264, 512, 520, 1024, 1032, 1037)
# x, weight, bias, and the autocast dtype: an instance each, two dtypes within one, and the walk.
WIDTHS = {
    "bf16": (BF16, BF16, BF16, None),
    "fp16 with fp32 parameters": (FP16, FP32, FP32, None),
    "fp32": (FP32, FP32, FP32, None),
    "fp32 to bf16": (FP32, FP32, FP32, BF16),
    "fp32 to fp16": (FP32, FP32, FP16, FP16),
    "bf16 to fp16": (BF16, FP32, FP32, FP16),
}


@pytest.mark.parametrize("channels", EDGES)
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=DTYPE_IDS.get)
@needs_kernels
def test_each_instance_at_its_edges(channels, dtype):
    problem = patch_merge_problem((2, 3, 5, channels), dtype)
    check(problem, "cuda", shape_class=f"3x5 C{channels}")


@pytest.mark.parametrize("channels", (24, 264))
@pytest.mark.parametrize("name", WIDTHS)
@needs_kernels
def test_each_pair_of_widths(name, channels):
    dtype, weight, bias, autocast = WIDTHS[name]
    dtypes = {"weight_dtype": weight, "bias_dtype": bias, "autocast": autocast}
    problem = patch_merge_problem((2, 4, 3, channels), dtype, **dtypes)
    check(problem, "cuda", shape_class=f"C{channels} {name}")


@needs_kernels
def test_output_wider_than_the_input():
    """No model asks for it: the raw operators walk."""
    x, weight = torch.randn(2, 4, 5, 24).to(BF16), torch.randn(96)
    ops, dy = torch.ops.vitkernels, torch.randn(2, 2, 3, 96)
    found = []
    for backend in ("cuda", "reference"):
        forward = getattr(ops.patch_merge_layer_norm_fwd, backend)
        backward = getattr(ops.patch_merge_layer_norm_bwd, backend)
        y, mean, rstd = forward(x, weight, None, 1e-5, FP32)
        grads = backward(dy, x, mean, rstd, weight, None, [True, True, False])
        found.append((y, mean, rstd, *grads))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", (96, 384))
@needs_kernels
def test_more_rows_than_the_grid_has_teams(channels):
    """The persistent backward, and sums over its blocks: the emulator has 2 multiprocessors."""
    problem = patch_merge_problem((3, 23, 25, channels), BF16)
    check(problem, "cuda", shape_class=f"3x23x25 C{channels}")


@pytest.mark.parametrize("channels", (6, 96, 384, 1032))
@needs_kernels
def test_the_same_bits_again(channels):
    problem = patch_merge_problem((2, 9, 10, channels), BF16)
    tensors = list(problem.inputs.values())
    first = sum(grads_of(problem.ours("cuda"), tensors), ())
    for _ in range(3):
        assert_bitwise_equal(sum(grads_of(problem.ours("cuda"), tensors), ()), first)


@needs_kernels
def test_pixels_off_their_lines_change_no_bit():
    """Copied first, whichever operand it is; a map whose pixels lie on lines is read there."""
    problem = patch_merge_problem((2, 5, 6, 24), BF16)
    dy = torch.randn(2, 3, 3, 96).to(BF16)
    names = [*problem.inputs, "dy"]
    tensors = dict(zip(names, [*problem.inputs.values(), dy], strict=True))

    def run(**moved):
        given = {**tensors, **moved}
        inputs = [given[name] for name in problem.inputs]
        return sum(grads_of(problem.ours("cuda"), inputs, [given["dy"]]), ())

    def off(t, skip):
        flat = torch.full((t.numel() + skip,), torch.nan, dtype=t.dtype)
        return flat[skip:].view(t.shape).copy_(t)

    expected = run()
    for name, skip in ((name, skip) for name in names for skip in (1, 4, 8)):
        assert_bitwise_equal(run(**{name: off(tensors[name], skip)}), expected, f"{name} {skip}")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x": torch.ones(2, 4, 8)}, "x must be (B, H, W, C)"),
        ({"x": torch.ones(2, 4, 4, 8, dtype=torch.float64)}, "x must be float32, bfloat16"),
        ({"weight": torch.ones(8)}, "weight must have shape (4 * C,) = (32,)"),
        ({"bias": torch.ones(32, dtype=torch.int32)}, "bias must be float32, bfloat16"),
        ({"dy": torch.ones(2, 2, 2, 31)}, "dy must have the shape of y"),
        ({"mean": torch.ones(7)}, "mean must be float32 with 8 elements"),
        ({"rstd": torch.ones(2, 2, 2).double()}, "rstd must be float32 with 8 elements"),
        ({"weight": None}, "gradient of a parameter that is None"),
        ({"output_mask": [True]}, "output_mask must have 3 entries"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
@needs_kernels
def test_refusals_of_the_raw_operators(changed, said):
    ops = torch.ops.vitkernels
    x, ones = torch.ones(2, 4, 4, 8), torch.ones(2, 2, 2)
    given = {"dy": torch.ones(2, 2, 2, 32), "x": x, "mean": ones, "rstd": ones}
    given |= {"weight": torch.ones(32), "bias": torch.ones(32), "output_mask": [True] * 3}
    given |= changed
    with pytest.raises(RuntimeError, match=re.escape(said)):
        ops.patch_merge_layer_norm_bwd.cuda(**given)
    if changed.keys() <= {"x", "weight", "bias"} and None not in changed.values():
        forward = {name: given[name] for name in ("x", "weight", "bias")}
        with pytest.raises(RuntimeError, match=re.escape(said)):
            ops.patch_merge_layer_norm_fwd.cuda(**forward, eps=1e-5, out_dtype=FP32)


# ---- Plans


def plan(rows, C, fixed_widths=True, backward=False, multiprocessors=132):
    facts = _native.build_facts()
    return facts.patch_merge_plan(rows, C, fixed_widths, multiprocessors, backward)


@needs_plans
@pytest.mark.parametrize("C", [*range(1, 70), *EDGES, 192, 768, 2048, 2**28])
def test_every_element_of_a_row_has_one_place(C):
    for fixed in (True, False):
        for backward in (True, False):
            p = plan(1000, C, fixed, backward)
            assert p["vectorized"] == (C % 8 == 0)
            assert p["threads"] % 32 == 0 and 32 <= p["threads"] <= 256
            size = p["threads"] if p["block_per_row"] else p["lanes"]
            held = fixed and C % 8 == 0 and C <= 1024
            assert (p["chunks"] > 0) == held
            if held:
                assert size * 8 * p["chunks"] >= 4 * C
                assert p["chunks"] in ((1, 2) if p["block_per_row"] else (3, 4))
            if not p["block_per_row"]:
                assert p["lanes"] in (1, 2, 4, 8, 16, 32) and C <= 256
            floats = 2 if not backward else 1 if p["block_per_row"] else 3
            assert p["shared_bytes"] == (floats * 4 * C * 4 if held else 0) <= 48 * 1024


@needs_plans
def test_grids():
    for backward in (False, True):
        assert plan(0, 96, backward=backward)["blocks"] == 0
        assert plan(1, 96, backward=backward)["blocks"] == 1
        assert plan(2**40, 96, backward=backward)["blocks"] <= 132 * 3
    # Swin-T at 224: C = 96 has no idle lane.
    p = plan(128 * 28 * 28, 96, backward=True)
    assert (p["lanes"], p["chunks"], p["threads"], p["blocks"]) == (16, 3, 256, 132)
    p = plan(128 * 7 * 7, 384)
    assert (p["block_per_row"], p["chunks"], p["threads"], p["blocks"]) == (True, 1, 192, 528)


# ---- What nvcc made of it


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.skipif(disassembler() is None, reason="cuobjdump and nvdisasm are not here")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_sass(arch):
    """Template arguments: Widths (any, 16, 32, 16 of 32), VEC, BLOCK, CHUNKS."""
    kernels = {k: v for k, v in sass(OBJECT, arch).items() if "finish" not in k}
    assert len(kernels) == 28
    for name, code in kernels.items():
        widths, vectorized, _, chunks = (int(n) for n in re.findall(r"\d+", name))
        loads = [i for i in code if re.search(r"\bLDG\S*\.128", i)]
        stores = [i for i in code if re.search(r"\bSTG\S*\.128", i)]
        backward = name.startswith("backward")
        if vectorized:  # 8 elements are one access in 16 bits and two in fp32
            x, y = 1 + (widths in (2, 3)), 1 + (widths == 2)
            least = max(chunks, 1) * (x + y if backward else x)
            assert len(loads) >= least, name
            assert len(stores) >= max(chunks, 1) * (x if backward else y), name
        else:
            assert not loads and not stores, name
        assert [i for i in code if "BAR.SYNC" in i], name
        assert not [i for i in code if re.search(r"\b(ATOM|ATOMG|RED|LDL|STL)\b", i)], name


# ---- Planted bugs

CHECK = """
import torch
from patch_merge_problems import patch_merge_problem
from problems import check
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((1, 25, 26, 40), (1, 3, 5, 264), (1, 3, 3, 7)):
        check(patch_merge_problem(shape, dtype), "cuda", shape_class="mutant")
"""
KERNELS, COMMON = "patch_merge_kernels.cuh", "common/layer_norm_rows.cuh"
FILLED = "    shared.fill(1, a.bias, length, 0.0f);\n"
ADDED = "         ...);\n      }\n"
MUTANTS = {
    "none": (KERNELS, "", ""),
    "pixels in reading order": (
        KERNELS,
        "(pixel % 2 ? map.stride_h : 0) + (pixel >= 2 ? map.stride_w : 0)",
        "(pixel >= 2 ? map.stride_h : 0) + (pixel % 2 ? map.stride_w : 0)",
    ),
    "no lower edge": (KERNELS, "(2 * h + 1 < size.H ? 1 : 0)", "1"),
    "a row too far at the carry": (KERNELS, "w -= rows_w, ++h;", "w -= rows_w, h += 2;"),
    "no barrier before the parameters": (KERNELS, FILLED + "    __syncthreads();\n", FILLED),
    "padding outside the statistics": (
        KERNELS,
        "statistics<VEC>(team, z, divisor,",
        "statistics<VEC>(team, z, Divisor(patch.has == 7 ? length : length / 2),",
    ),
    "columns past the last in the variance": (
        COMMON,
        "    if (VEC && !columns.holds(0)) return;\n",
        "",
    ),
    "no barrier after a warp's sums": (COMMON, ADDED + "      __syncthreads();\n", ADDED),
    "teams left out": (COMMON, "if constexpr (!WARP) (sums.add", "if (length < 0) (sums.add"),
    "a block's sums left out": (COMMON, "i < kFinishRows; ++i", "i < 1; ++i"),
}


@pytest.mark.skipif(not CAN_BUILD, reason="the emulator is not built")
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(name, tmp_path):
    change = (*MUTANTS[name], "patch_merge_cuda.cu")
    done = run_mutant("patch_merge", change, CHECK, tmp_path)
    assert (done.returncode == 0) == (name == "none"), done.stdout[-2000:] + done.stderr[-2000:]
