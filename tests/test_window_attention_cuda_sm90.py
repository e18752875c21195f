"""window_attention's sm_90 kernels, forced: values, refusals, and what nvcc made of them. Planted
bugs: test_window_attention_cuda_sm90_faults.py."""

import math

import pytest
import torch
from compiled_code import counts, disassembler, sass
from native_build import NVCC, ROOT
from problems import DTYPE_IDS, check, check_repeats, output_gradients
from window_attention_problems import relative_position_index, window_problem

from vitkernels import _native, testing
from vitkernels.testing import available_for, grads_of, same_specials

FP32, BF16, FP16 = DTYPE_IDS
NAN, INF = math.nan, math.inf
PLANS = _native.build_facts()

needs_cuda = pytest.mark.skipif(
    "cuda" not in available_for("window_attention", D=32, N=49), reason="no CUDA kernels here"
)
needs_plans = pytest.mark.skipif(PLANS is None, reason="vitkernels._C is not built")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def sm90():
    with testing.cuda_path("sm90"):
        yield


def run(problem, backend="cuda"):
    """(outputs, gradients) with the incoming gradients of the problem."""
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = testing.as_tuple(problem.ours(backend)(*tensors))
    return grads_of(problem.ours(backend), tensors, output_gradients(problem, outputs))


# ---- Values

CASES = [  # window, shift, dtype, options
    (7, 0, BF16, {}),
    (7, 3, BF16, {"windows": (2, 3)}),
    (7, (0, 3), FP16, {"windows": (1, 2)}),
    (8, 0, FP16, {"windows": (2, 1), "heads": 3}),
    (8, 4, FP16, {"table_dtype": FP16}),
    (8, 4, BF16, {"cosine": True, "windows": (1, 2), "heads": 2}),
    (7, 0, BF16, {"cosine": True, "windows": (1, 2)}),
    (7, 3, FP16, {"cosine": "timm", "B": 1, "heads": 3, "scale_dtype": FP16}),
    (7, 3, BF16, {"windows": (1, 1), "heads": 1}),  # one window, which its shift wraps
    (8, 4, FP16, {"windows": (1, 3), "heads": 5}),
    ((2, 3), (1, 2), BF16, {"windows": (3, 2), "B": 3, "heads": 3}),
    ((4, 16), (0, 8), FP16, {"windows": (2, 1), "scale": -0.3}),
    ((5, 1), (2, 0), BF16, {"windows": (1, 3), "table_dtype": BF16}),
    (1, 0, FP16, {"windows": (3, 3)}),
    ((3, 4), (1, 1), BF16, {"cosine": True, "magnitude": 30.0, "B": 1}),
    # More windows than stages: phases wrap, at the seams and between them.
    (7, 3, BF16, {"windows": (4, 3), "B": 4, "heads": 1}),
    (4, 2, FP16, {"windows": (5, 3), "B": 5, "heads": 1, "cosine": True}),
]


def name(window, shift, options):
    return " ".join([f"window {window} shift {shift}", *(f"{k} {v}" for k, v in options.items())])


@needs_cuda
@pytest.mark.parametrize(("window", "shift", "dtype", "options"), CASES, ids=str)
def test_windows(window, shift, dtype, options):
    problem = window_problem(window, shift, dtype, D=32, **({"B": 2} | options))
    factor = 0.9 if window in (7, 8) else None  # scores and probabilities stay in fp32
    check(problem, "cuda", shape_class=name(window, shift, options), rmse_factor=factor)


@needs_cuda
@pytest.mark.parametrize(
    "layout", ["channels_first", "columns_first", "cropped", "rows_apart", "pixels_apart"]
)
def test_maps_that_lie_otherwise(layout):
    problem = window_problem(4, 2, BF16, D=32, windows=(2, 3))
    how = {"layout": layout, "grad_layout": "contiguous"}
    check(problem, "cuda", shape_class="window 4 shift 2", **how)


@needs_cuda
def test_the_gradient_of_a_sum():
    problem = window_problem(7, 3, BF16, D=32, windows=(1, 2))
    check(problem, "cuda", shape_class="window 7 shift 3", grad_layout="ones")


@needs_cuda
def test_repeats_are_bitwise_equal_and_unwanted_gradients_change_nothing():
    check_repeats(window_problem(7, 3, BF16, D=32, B=1, cosine=True, heads=2), "cuda")


# ---- Special values


def assert_same_specials(problem, names):
    ours, expected = sum(run(problem), ()), sum(run(problem, "reference"), ())
    for what, mine, theirs in zip(names, ours, expected, strict=False):
        difference = same_specials(mine, theirs, what)
        assert not difference, difference


@needs_cuda
@pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
@pytest.mark.parametrize("place", [(0, 0, 0), (-1, -1, -1), (0, 2, 4)], ids=["first", "last", "in"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_nan_spreads_as_in_the_reference(part, place, cosine):
    """Nor does it stay in shared memory: the last windows are the first ones' stages."""
    problem = window_problem((2, 3), 1, BF16, D=32, heads=2, windows=(5, 3), cosine=cosine)
    C = problem.inputs["qkv"].shape[-1] // 3
    problem.inputs["qkv"][(*place, "qkv".index(part) * C + 3)] = NAN
    names = ("out", "dqkv", "dbias_table", "dlogit_scale")[: 4 if cosine else 3]
    assert_same_specials(problem, names)


@needs_cuda
@pytest.mark.parametrize("value", [INF, -INF], ids=str)
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_infinity_spreads_as_in_the_reference(part, value):
    problem = window_problem((2, 3), 1, FP16, D=32, heads=2)
    C = problem.inputs["qkv"].shape[-1] // 3
    problem.inputs["qkv"][0, 1, 1, "qkv".index(part) * C + 3] = value
    assert_same_specials(problem, ("out",))


@needs_cuda
def test_minus_infinity_in_the_table_masks():
    problem = window_problem((2, 3), 0, BF16, D=32)
    index = relative_position_index((2, 3))
    problem.inputs["bias_table"][index[4, 2]] = -INF
    outputs, grads = run(problem)
    assert all(torch.isfinite(t).all() for t in (*outputs, *grads))
    assert not grads[1][index[4, 2]].any()
    check(problem, "cuda", shape_class="window (2, 3) table -inf")


# ---- Refusals


@needs_cuda
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": FP32}, "bf16 and fp16"),
        ({"D": 64}, "head dim 32"),
        ({"window": 9}, "64 tokens"),
        ({"window": (4, 16), "shift": (0, 5)}, "padded to 8 tokens"),
        ({"dropout_p": 0.5}, "dropout"),
    ],
    ids=str,
)
def test_refusals(options, why):
    options = {"window": 2, "shift": 0, "dtype": BF16, "D": 32} | options
    window, shift, dtype = (options.pop(key) for key in ("window", "shift", "dtype"))
    problem = window_problem(window, shift, dtype, B=1, **options)
    with pytest.raises(RuntimeError, match=f"path sm90 cannot serve this call: .*{why}"):
        problem.ours("cuda")(*problem.inputs.values())


@needs_cuda
def test_maps_that_tma_cannot_read_are_refused():
    problem = window_problem(2, 1, BF16, D=32)
    qkv, table = problem.inputs.values()
    shifted = torch.cat([qkv.flatten()[:1], qkv.flatten()])[1:].view(qkv.shape)
    wide = torch.cat([qkv, qkv[..., :1]], -1)[..., : qkv.shape[-1]]
    for refused, why in [
        (shifted, "qkv must begin on 16-byte lines"),
        (wide, "qkv must begin on 16-byte lines"),
        (qkv[:, :1].expand(qkv.shape), "no qkv that is expanded"),
    ]:
        with pytest.raises(RuntimeError, match=why):
            problem.ours("cuda")(refused, table)
    leaf = qkv.requires_grad_()
    out = problem.ours("cuda")(leaf, table)
    odd = torch.randn(*out.shape[:3], out.shape[3] + 1).to(BF16)[..., 1:]
    with pytest.raises(RuntimeError, match="dout must begin on 16-byte lines"):
        out.backward(odd)


# ---- Plans


def windows_and_shifts():
    for Wh in range(1, 65):
        for Ww in range(1, 64 // Wh + 1):
            for shift in {(0, 0), (Wh // 2, Ww // 2), (Wh // 2, 0), (0, Ww // 2), (Wh - 1, 1 % Ww)}:
                yield Wh, Ww, *shift


@needs_plans
def test_each_token_of_every_window_has_one_row():
    refused = set()
    for Wh, Ww, shift_h, shift_w in windows_and_shifts():
        order = PLANS.window_attention_sm90_order(Wh, Ww, shift_h, shift_w)
        if order["rows"] > 64:
            refused.add((Wh, Ww, shift_h, shift_w))
            continue
        row_of = {}
        for first, y, x, height, width in order["parts"]:
            assert first % 8 == 0 and 1 <= width <= 256 and 1 <= height <= 256
            for i in range(height):
                for j in range(width):
                    assert (y + i, x + j) not in row_of
                    row_of[y + i, x + j] = row = first + i * width + j
                    assert (order["below"] >> row // 8 & 1) == (y + i >= Wh - shift_h)
                    assert (order["right"] >> row // 8 & 1) == (x + j >= Ww - shift_w)
        assert set(row_of) == {(y, x) for y in range(Wh) for x in range(Ww)}
        assert len(set(row_of.values())) == Wh * Ww and max(row_of.values()) < order["keys"] <= 64
    assert not [w for w in refused if w[2:] == (0, 0)]
    halves = {(w, w, w // 2, w // 2) for w in range(1, 9)}  # as models shift
    assert not refused & halves


@needs_plans
@pytest.mark.parametrize("backward", [False, True])
def test_plans(backward):
    """Each group of windows has some, each warpgroup one head; shared memory fits an H100."""
    for heads in (1, 2, 3, 4, 6, 12, 24, 32, 500):
        for windows in (1, 2, 7, 128, 2048, 8192, 10**9):
            p = PLANS.window_attention_sm90_plan(windows, heads, 32, 132, backward)
            assert 1 <= p["groups"] <= windows
            assert 1 <= p["busy"] <= (2 if backward else 3)
            assert (p["blocks"] - 1) * p["busy"] < p["groups"] * heads <= p["blocks"] * p["busy"]
            assert p["blocks"] <= max(132, -(-heads // p["busy"]))
            assert p["shared_bytes"] <= 232448


@needs_plans
def test_plans_of_the_shapes_that_count():
    """Swin-T's stages at batch 128 on an H100: (groups, blocks, busy)."""

    def brief(windows, heads, backward):
        p = PLANS.window_attention_sm90_plan(windows, heads, 32, 132, backward)
        return p["groups"], p["blocks"], p["busy"]

    assert brief(8192, 3, False) == (131, 131, 3)
    assert brief(2048, 6, False) == (64, 128, 3)
    assert brief(512, 12, False) == (32, 128, 3)
    assert brief(128, 24, False) == (16, 128, 3)
    assert brief(8192, 3, True) == (88, 132, 2)
    assert brief(64, 3, False) == (
        64,
        96,
        2,
    )  # one image: all multiprocessors before all warpgroups


# ---- Compiled code

# Products of a warpgroup: m64nNk16 twice for each of S (and dP) and four times for 64 k of each of
# O (dQ, dK, dV); a load and a store for each tile of a part; an exponential for each score.
PLANNED = {
    "": ("forward", {"HGMMA": 2 + 4, "UTMALDG": 3, "UTMASTG": 1}),
    "_backward": ("backward", {"HGMMA": 2 * 2 + 3 * 4, "UTMALDG": 4, "UTMASTG": 3}),
}


@pytest.mark.skipif(NVCC is None or disassembler() is None, reason="no nvcc or cuobjdump here")
@pytest.mark.parametrize("part", PLANNED)
def test_instructions_are_those_of_the_plan(part):
    kernel, planned = PLANNED[part]
    path = f"window_attention_window_attention_sm90{part}.cu.cuda.o"
    code = sass(ROOT / "build/native/inplace/obj" / path, "sm_90a")
    assert len(code) == 8
    for dtype in (1, 2):
        for keys in (56, 64):
            for cosine in (0, 1):
                lines = code[f"{kernel}_kernel<{dtype},32,{keys},{cosine}>"]
                assert counts(lines, planned) == planned
                scores = [line for line in lines if f"HGMMA.64x{keys}x16" in line]
                assert len(scores) == (2 if kernel == "forward" else 4)
                assert sum("MUFU.EX2" in line for line in lines) == keys // 2 + 1  # and the factor
                assert sum("USETMAXREG" in line for line in lines) == 2
                assert not [line for line in lines if "LDL" in line or "STL" in line]
