"""attention's sm_80 kernels for up to 272 tokens, forced: values, refusals, plans, and what nvcc
made of them. The path's others: test_attention_cuda_sm80_long.py."""

import math

import pytest
import torch
from attention_paths import check_heads_alone, check_specials, needs_kernels, needs_nvcc
from attention_problems import attention_problem, packed_problem
from compiled_code import counts, sass
from native_build import CSRC, ROOT
from problems import DTYPE_IDS, check, check_repeats, output_gradients
from test_cuda_build import compiled

from vitkernels import _native, testing
from vitkernels.testing import assert_bitwise_equal, grads_of

FP32, BF16, FP16 = DTYPE_IDS
NAN, INF = math.nan, math.inf
LENGTHS = (1, 2, 49, 50, 64, 65, 144, 196, 197, 198, 256, 257, 272)
HEAD_DIMS = (8, 16, 32, 40, 48, 64, 72, 80, 88, 96, 112, 128)

needs_plans = pytest.mark.skipif(
    not hasattr(_native.build_facts(), "attention_sm80_plan"),
    reason="vitkernels._C is not built (it needs Python.h and pybind11)",
)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def sm80():
    with testing.cuda_path("sm80"):
        yield


def run(make, shape, dtype, options, **how):
    factor = 0.9 if shape[1] >= 49 else None  # scores and probabilities stay in fp32
    label = " ".join([str(shape), *(f"{k} {v}" for k, v in options.items())])
    problem = make(*shape, dtype, **options)
    check(problem, "cuda", shape_class=f"sm80 {label}", rmse_factor=factor, **how)


# ---- Values


@needs_kernels
@pytest.mark.parametrize("N", LENGTHS)
def test_lengths(N):
    """Each with its own head dim and dtype, so that all of those come up too."""
    at = LENGTHS.index(N)
    D = HEAD_DIMS[at % len(HEAD_DIMS)]
    run(packed_problem, (1, N, 1, D), (BF16, FP16)[at % 2], {})


@needs_kernels
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=DTYPE_IDS.get)
def test_head_dims(D, dtype):
    run(packed_problem, (1, 50 if dtype == BF16 else 65, 2, D), dtype, {})


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((1, 197, 2, 64), BF16, {}),
        ((2, 17, 3, 64), FP16, {"Nk": 70}),
        ((1, 130, 1, 32), BF16, {"Nk": 1}),
        ((1, 1, 2, 40), FP16, {"Nk": 145}),
        ((1, 272, 1, 128), BF16, {"Nk": 18}),
        ((1, 20, 1, 128), FP16, {"Nk": 257}),
        ((1, 49, 2, 32), BF16, {"scale": -0.7}),
        ((1, 49, 1, 64), FP16, {"magnitude": 30.0}),
    ],
    ids=str,
)
def test_cross_attention_and_scales(shape, dtype, options):
    run(attention_problem, shape, dtype, options)


MASKS = [
    {"bool_bias": (1, 1, 66, 50)},
    {"bool_bias": (2, 1, 1, 50), "key_padding_mask": (2, 50)},
    {"bool_bias": (1, 2, 66, 1)},
    {"key_padding_mask": (2, 50)},
]


@needs_kernels
@pytest.mark.parametrize("options", MASKS, ids=str)
def test_masks(options):
    run(attention_problem, (2, 66, 2, 72), BF16, {"Nk": 50, **options})


@needs_kernels
@pytest.mark.parametrize("bias", [(2, 2, 66, 50), (1, 2, 66, 50), (1, 1, 66, 1), (2, 1, 1, 50)])
@pytest.mark.parametrize("bias_dtype", [FP32, BF16, FP16], ids=DTYPE_IDS.get)
def test_float_bias_without_its_gradient(bias, bias_dtype):
    dtype = FP16 if bias_dtype == FP16 else BF16
    options = {"Nk": 50, "bias": bias, "bias_dtype": bias_dtype}
    run(attention_problem, (2, 66, 2, 40), dtype, options, wanted=("q", "k", "v"))


@needs_kernels
@pytest.mark.parametrize("layout", ["outer_transposed", "rows_sliced", "expanded", "offset"])
def test_layouts(layout):
    run(attention_problem, (2, 18, 2, 24), BF16, {"Nk": 34}, layout=layout)


@needs_kernels
def test_gradients_that_nobody_wants_change_nothing_and_repeats_are_equal():
    check_repeats(attention_problem(1, 66, 2, 64, BF16, Nk=50), "cuda")


@needs_kernels
def test_a_head_does_not_depend_on_its_neighbours():
    check_heads_alone(attention_problem(2, 65, 2, 72, BF16))


# ---- Special values


@needs_kernels
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_special_values_are_where_the_truth_has_them(name, value):
    problem = attention_problem(1, 20, 2, 16, BF16, Nk=35)
    problem.inputs[name][0, 17, 1, 3] = value
    check_specials(problem)


@needs_kernels
def test_a_nan_stays_in_its_head_forward_and_backward():
    problem = attention_problem(1, 20, 2, 16, FP16, Nk=35)
    clean = list(problem.inputs.values())
    with torch.no_grad():
        grads = output_gradients(problem, testing.as_tuple(problem.ours("cuda")(*clean)))
    expected = sum(grads_of(problem.ours("cuda"), clean, grads), ())
    dirty = [t.clone() for t in clean]
    dirty[1][0, 4, 1, 2] = NAN
    for mine, clean_one in zip(
        sum(grads_of(problem.ours("cuda"), dirty, grads), ()), expected, strict=True
    ):
        assert_bitwise_equal(mine[:, :, 0].contiguous(), clean_one[:, :, 0].contiguous())
        assert mine[:, :, 1].isnan().any()


@needs_kernels
def test_a_fully_masked_row_is_zero_and_has_no_gradient():
    keep = torch.ones(1, 1, 20, 35, dtype=torch.bool)
    keep[..., 3, :] = False
    problem = attention_problem(1, 20, 2, 16, BF16, Nk=35, bool_bias=keep)
    out, grads = grads_of(problem.ours("cuda"), list(problem.inputs.values()))
    assert (out[0][:, 3] == 0).all() and (grads[0][:, 3] == 0).all()
    assert all(g.isfinite().all() for g in grads)
    check(problem, "cuda", shape_class="sm80, a fully masked row")


@needs_kernels
def test_a_planted_fault_is_caught():
    """Two values of 65 exchanged, which differ only in what two keys weigh."""
    problem = attention_problem(1, 65, 1, 64, BF16)
    q, k, v = problem.inputs.values()
    swapped = v.clone()
    swapped[:, [63, 64]] = v[:, [64, 63]]
    with torch.no_grad():
        ours = problem.ours("cuda")(q, k, swapped)
        base = problem.base()(q, k, v)
        exact = problem.truth()(*(t.double() for t in (q, k, v)))
        testing.assert_close_to_truth(problem.ours("cuda")(q, k, v), base, exact)
        with pytest.raises(AssertionError, match="error model"):
            testing.assert_close_to_truth(ours, base, exact)


# ---- Refusals


@needs_kernels
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": FP32}, "bf16 and fp16"),
        ({"D": 36}, "multiples of 8"),
        ({"D": 136}, "head dims to 128"),
    ],
    ids=str,
)
def test_refusals(options, why):
    options = {"dtype": BF16, "D": 16} | options
    problem = attention_problem(1, 4, 1, options["D"], options["dtype"])
    with pytest.raises(RuntimeError, match=f"path sm80 cannot serve this call: .*{why}"):
        problem.ours("cuda")(*problem.inputs.values())


@needs_kernels
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rows_off_16_byte_lines_are_refused(name):
    problem = attention_problem(1, 4, 1, 16, BF16)
    tensors = [
        testing.in_layout(t, "misaligned_1") if n == name else t for n, t in problem.inputs.items()
    ]
    with pytest.raises(RuntimeError, match="16-byte lines"):
        problem.ours("cuda")(*tensors)


@needs_kernels
def test_the_backward_refuses_dout_off_16_byte_lines():
    problem = attention_problem(1, 4, 1, 16, BF16)
    leaves = [t.requires_grad_() for t in problem.inputs.values()]
    out = problem.ours("cuda")(*leaves)
    with pytest.raises(RuntimeError, match="dout and out must begin on 16-byte lines"):
        out.backward(testing.in_layout(torch.ones_like(out), "misaligned_3"))


# ---- Plans


def plan(Nq, Nk, D, backward, architecture=80):
    return _native.build_facts().attention_sm80_plan(Nq, Nk, D, architecture, backward)


def register_warps(head_dim, backward):
    """Warps of a multiprocessor's 4 x 16384 registers; what nvcc took is held to it below."""
    return (
        8 if head_dim > (64 if backward else 96) else 16 if head_dim <= 64 - 64 * backward else 12
    )


@needs_plans
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("D", range(8, 129, 8))
def test_plans_of_every_length(D, backward):
    most_warps = 8 if not backward or D > 64 else 6  # the launch bounds
    for N in range(1, 273):
        for Nq, Nk in ((N, N), (N, 272), (272, N), (N, 1)):
            for architecture in (80, 90):
                p = plan(Nq, Nk, D, backward, architecture)
                rows = max(Nq, Nk) if backward else Nq
                tiles, row = -(-rows // 16), 2 * p["head_dim"]
                assert p["head_dim"] == -(-D // 16) * 16
                assert 1 <= p["warps"] <= min(most_warps, tiles)
                assert p["slots"] in (tiles, p["warps"])
                padded_q, padded_k = -(-Nq // 16) * 16, -(-Nk // 16) * 16
                if not backward:
                    needed = (2 * padded_k + 16 * p["slots"]) * row
                elif p["slots"] == tiles:
                    needed = 2 * (padded_q + padded_k) * row + 8 * padded_q
                else:
                    needed = 2 * 16 * (tiles + p["slots"]) * row + 8 * padded_q
                assert p["shared_bytes"] == needed <= 166_912
                limit = (164 if architecture == 80 else 228) * 1024
                by_registers = register_warps(p["head_dim"], backward) // p["warps"]
                assert p["blocks_resident"] == min(limit // (needed + 1024), by_registers) >= 1


@needs_plans
def test_gpus_with_100_kb_get_plans_that_fit_or_none():
    for D in (64, 128):
        for N in range(1, 273):
            for backward in (False, True):
                p = plan(N, N, D, backward, architecture=86)
                assert p["shared_bytes"] <= 99 * 1024
                assert (p["warps"] == 0) == (p["shared_bytes"] == 0)
    assert plan(197, 197, 64, True, 86)["warps"] > 0
    assert plan(272, 272, 128, True, 86)["warps"] == 0  # the launcher takes the long kernels


@needs_plans
def test_plans_of_the_shapes_that_count():
    """(warps, slots, blocks on a multiprocessor of sm_80) of 197 tokens."""

    def brief(D, backward):
        p = plan(197, 197, D, backward)
        return p["warps"], p["slots"], p["blocks_resident"]

    assert brief(64, False) == (7, 13, 2)
    assert brief(64, True) == (5, 5, 2)
    assert brief(80, False) == (5, 5, 2)
    assert brief(128, False) == (7, 13, 1)
    assert brief(80, True) == (7, 13, 1)
    assert brief(128, True) == (7, 7, 1)
    for N in (196, 197, 198):  # scores computed, of which this part counts
        assert N * N / (-(-N // 16) * 16) ** 2 > 0.88


# ---- The compiled code. A product is an mma of a warp; a copy 16 bytes of a thread.


def products(head_dim, masks, backward):
    step = head_dim // 8  # a product of 16 x 16 scores, or with them
    if backward:  # S and dP twice, dq, dk, dv
        return 7 * step
    return 2 * step if masks else 2 * step + 3 * 2 * step  # the last 16 columns; 48 at once


@needs_nvcc
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_registers_are_there_for_as_many_warps_as_the_plan_has(backward):
    part, kernel = ("_backward", "backward") if backward else ("", "forward")
    source = CSRC / f"attention/attention_sm80{part}.cu"
    for (name, arch), used in compiled(source).items():
        head_dim = int(name.split(",")[1])
        warps = register_warps(head_dim, backward)
        assert name.startswith(kernel) and warps * used["registers"] * 32 <= 65536, (name, arch)


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_instructions_are_those_of_the_plan(backward, arch):
    part, kernel = ("_backward", "backward") if backward else ("", "forward")
    name = f"attention_attention_sm80{part}.cu.cuda.o"
    code = sass(ROOT / "build/native/inplace/obj" / name, arch)
    assert len(code) == 32
    for dtype in (1, 2):
        for head_dim in range(16, 129, 16):
            for masks in (0, 1):
                lines = code[f"{kernel}_kernel<{dtype},{head_dim},{masks}>"]
                words = ("HMMA", "LDGSTS", "LDL", "STL", "ATOM", "RED.")
                assert counts(lines, words) == {
                    "HMMA": products(head_dim, masks, backward),
                    "LDGSTS": 12 if backward else 4,  # both of a pair; at first, then tile by tile
                    **dict.fromkeys(("LDL", "STL", "ATOM", "RED."), 0),
                }, (dtype, head_dim, masks)
