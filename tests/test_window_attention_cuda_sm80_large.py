"""window_attention's sm_80 kernels for windows of 65 to 256 tokens, forced: values, refusals,
special values, launch plans, and what nvcc made of them."""

import math

import pytest
import torch
from compiled_code import disassembler, sass
from native_build import NVCC, ROOT
from problems import DTYPE_IDS, check, check_repeats, output_gradients
from window_attention_problems import window_problem

from vitkernels import _native, testing
from vitkernels.testing import available_for, grads_of, same_specials

FP32, BF16, FP16 = DTYPE_IDS
PLANS = _native.build_facts()
NAN, INF = math.nan, math.inf

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_cuda = pytest.mark.skipif(
    "cuda" not in available_for("window_attention", D=32, N=49), reason="no CUDA kernels here"
)
needs_plans = pytest.mark.skipif(PLANS is None, reason="vitkernels._C is not built")


@pytest.fixture(autouse=True)
def sm80():
    with testing.cuda_path("sm80"):
        yield


CASES = [  # window, shift, dtype, options; the map's sizes differ, and most blocks have two windows
    (12, 0, BF16, {"windows": (1, 2)}),
    (12, 6, BF16, {"windows": (2, 3), "heads": 1}),
    (16, 0, FP16, {"windows": (1, 1)}),
    (16, 8, BF16, {"windows": (2, 3), "heads": 1}),
    (9, 4, FP16, {"windows": (2, 2), "table_dtype": FP16}),
    (14, 7, BF16, {"windows": (1, 2), "scale": -0.3}),
    ((8, 12), (4, 6), FP16, {"windows": (3, 1), "B": 2, "heads": 1}),
    (12, (3, 0), BF16, {"windows": (1, 1), "cosine": True, "heads": 2}),
    (16, 8, FP16, {"windows": (1, 2), "cosine": "timm", "heads": 1, "scale_dtype": FP16}),
    ((13, 11), (5, 0), BF16, {"windows": (2, 1), "cosine": True, "magnitude": 30.0, "heads": 1}),
    ((5, 13), (2, 6), BF16, {"windows": (2, 2), "heads": 3, "table_dtype": BF16}),
    ((1, 201), (0, 100), FP16, {"windows": (2, 1)}),
]


def name(window, shift, options):
    return " ".join([f"window {window} shift {shift}", *(f"{k} {v}" for k, v in options.items())])


@needs_cuda
@pytest.mark.parametrize(("window", "shift", "dtype", "options"), CASES, ids=str)
def test_windows(window, shift, dtype, options):
    problem = window_problem(window, shift, dtype, D=32, **({"B": 1} | options))
    factor = 0.9 if window in (12, 14, 16) else None  # scores and probabilities stay in fp32
    check(problem, "cuda", shape_class=name(window, shift, options), rmse_factor=factor)


@needs_cuda
@pytest.mark.parametrize(("window", "cosine"), [(12, False), (16, True)], ids=str)
def test_repeats_are_bitwise_equal_and_unwanted_gradients_change_nothing(window, cosine):
    problem = window_problem(
        window, window // 2, BF16, D=32, B=1, windows=(1, 2), heads=1, cosine=cosine
    )
    check_repeats(problem, "cuda")


@needs_cuda
@pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_nan_spreads_as_in_the_reference(part, cosine):
    """Through one window and one head; the mask keeps a NaN key, not a NaN value, from others."""
    problem = window_problem(9, 4, BF16, D=32, B=1, windows=(1, 2), heads=2, cosine=cosine)
    problem.inputs["qkv"][0, 2, 5, "qkv".index(part) * 64 + 3] = NAN
    assert_same_specials(problem, ("out", "dqkv", "dbias_table", "dlogit_scale"))


@needs_cuda
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_a_special_entry_of_the_table_reaches_its_pairs(value):
    problem = window_problem((8, 9), 0, FP16, D=32, B=1, windows=(1, 1), heads=2)
    problem.inputs["bias_table"][40, 1] = value
    assert_same_specials(problem, ("out",))


@needs_cuda
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=DTYPE_IDS.get)
def test_vectors_of_zeros_have_no_direction_and_no_gradient(dtype):
    """Of q, k and a whole token; an inverse length of 1e12 does not overflow."""
    problem = window_problem((8, 9), 0, dtype, D=32, B=1, windows=(1, 1), heads=1, cosine=True)
    qkv = problem.inputs["qkv"]
    qkv[0, 0, 0] = qkv[0, 3, 3, :32] = qkv[0, 7, 8, 32:64] = 0
    if dtype is BF16:  # eager fp16 loses the 1e-12 and gives NaN
        check(problem, "cuda", shape_class="vectors of zeros")
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = testing.as_tuple(problem.ours("cuda")(*tensors))
    grads = output_gradients(problem, outputs)
    _, (dqkv, *_) = grads_of(problem.ours("cuda"), tensors, grads)
    doubles = list(problem.double().inputs.values())
    _, (exact, *_) = grads_of(problem.truth(), doubles, grads)
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert (dqkv - exact).abs().max() <= 4 * unit
    for vector in (dqkv[0, 0, 0, :64], dqkv[0, 3, 3, :32], dqkv[0, 7, 8, 32:64]):
        assert (vector == 0).all()


def assert_same_specials(problem, names):
    def run(backend):
        tensors = list(problem.inputs.values())
        with torch.no_grad():
            outputs = testing.as_tuple(problem.ours(backend)(*tensors))
        return sum(grads_of(problem.ours(backend), tensors, output_gradients(problem, outputs)), ())

    for what, mine, theirs in zip(names, run("cuda"), run("reference"), strict=False):
        difference = same_specials(mine, theirs, what)
        assert not difference, difference


@needs_cuda
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": FP32}, "bf16 and fp16"),
        ({"D": 64}, "head dim 32"),
        ({"window": (1, 257)}, "256 tokens"),
        ({"dropout_p": 0.5}, "dropout"),
    ],
    ids=str,
)
def test_refusals(options, why):
    options = {"window": (8, 9), "dtype": BF16, "D": 32} | options
    problem = window_problem(
        options.pop("window"), 0, options.pop("dtype"), B=1, windows=(1, 1), heads=1, **options
    )
    with pytest.raises(RuntimeError, match=why):
        problem.ours("cuda")(*problem.inputs.values())


# ---- Launch plans

SHARED = {80: 164 << 10, 90: 228 << 10}  # of a multiprocessor


@needs_plans
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_plans_of_every_window(backward, architecture):
    """A block fits the device, and as many as the grid counts on; its warps have all rows."""
    for Wh in range(1, 257):
        for Ww in range(1, 256 // Wh + 1):
            N, rows = Wh * Ww, (2 * Wh - 1) * (2 * Ww - 1)
            if N <= 64:
                continue
            for windows, heads, cosine in ((1, 3, True), (64, 4, False), (8192, 48, True)):
                p = PLANS.window_attention_sm80_large_plan(
                    windows, N, rows, heads, 32, 132, architecture, cosine, backward
                )
                tiles, room = -(-N // 16), registers(backward, p["fragments"])[0]
                assert p["shared_bytes"] <= min(SHARED[architecture] - 1024, 163 << 10)
                assert p["warps"] in ({tiles} if backward else {tiles, -(-tiles // 2)})
                assert p["warps"] <= room
                assert 1 <= p["groups"] <= windows and p["blocks"] == p["groups"] * heads
                each = -(-windows // p["groups"])
                assert (p["groups"] - 1) * each < windows, "a group without a window"
                resident = -(-p["blocks"] // 132)
                if p["groups"] > 1:
                    assert resident * (p["shared_bytes"] + 1024) <= SHARED[architecture]
                    assert resident * p["warps"] <= room


def registers(backward, fragments):
    """(warps of a multiprocessor, most registers of a thread): its quarters have 16384 each."""
    warps = {False: {6: 20, 8: 16}, True: {6: 12, 4: 16}}[backward][fragments]
    return warps, 16384 // (warps // 4 * 32) // 8 * 8


@needs_plans
def test_plans_of_the_shapes_that_count():
    """(warps, fragments, blocks, KB) on 132 multiprocessors: Swin-B-384, SwinV2-B at 256 pixels."""

    def brief(windows, side, heads, architecture, cosine, backward):
        p = PLANS.window_attention_sm80_large_plan(
            windows, side**2, (2 * side - 1) ** 2, heads, 32, 132, architecture, cosine, backward
        )
        return p["warps"], p["fragments"], p["blocks"], p["shared_bytes"] >> 10

    assert brief(4096, 12, 4, 90, False, False) == (5, 6, 392, 57)
    assert brief(4096, 12, 4, 90, False, True) == (9, 6, 132, 94)
    assert brief(1024, 16, 4, 90, True, False) == (8, 8, 256, 104)
    assert brief(1024, 16, 4, 90, True, True) == (16, 4, 128, 162)
    assert brief(1024, 16, 4, 80, True, False) == (16, 8, 128, 104)


# ---- What nvcc made of them


def products(kernel, fragments):
    """mma of a warp with D = 32, in the code for plain chunks and again in the careful one.

    Forward: 2 of S and 2 of O for 8 keys. Backward: 4 of each of S, dP, dV and dK for 16 queries;
    4 of dQ for 16 keys, in a loop that is unrolled twice, and its rest.
    """
    return 2 * 4 * fragments if kernel == "forward" else 2 * 16 + 3 * 4


@pytest.mark.skipif(NVCC is None or disassembler() is None, reason="no nvcc or cuobjdump here")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("kernel", "suffix", "fragments", "copies"),
    [("forward", "", (6, 8), 6), ("backward", "_backward", (6, 4), 12)],
    ids=["forward", "backward"],
)
def test_instructions_are_those_of_the_plan(kernel, suffix, fragments, copies, arch):
    object_name = f"window_attention_window_attention_sm80_large{suffix}.cu.cuda.o"
    code = sass(ROOT / "build/native/inplace/obj" / object_name, arch)
    assert len(code) == 8
    for dtype in (1, 2):
        for count in fragments:
            for cosine in (0, 1):
                lines = code[f"{kernel}_kernel<{dtype},32,{count},{cosine}>"]
                words = ("HMMA", "LDGSTS", "LDL", "STL", "ATOM", "RED")
                counts = {w: sum(w in line.split(".")[0] for line in lines) for w in words}
                expected = products(kernel, count)
                assert counts == dict.fromkeys(words, 0) | {"HMMA": expected, "LDGSTS": copies}
