"""attention's sm_90 forward of many tokens, forced: values, refusals, special values; plans; what
nvcc made."""

import math

import attention_paths
import pytest
import torch
from attention_paths import check_raw, forward, needs_kernels, needs_nvcc, qkv, raw
from attention_problems import attention_problem
from compiled_code import counts, sass
from native_build import ROOT
from problems import DTYPE_IDS

from vitkernels import _native, testing
from vitkernels.ops.attention import reference
from vitkernels.testing import assert_bitwise_equal

FP32, BF16, FP16 = DTYPE_IDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def sm90():
    with testing.cuda_path("sm90"):
        yield


def check_forward(problem, what, layout="contiguous", factor=0.9):
    attention_paths.check_forward(problem, f"sm90 long forward {what}", layout, factor)


# Edges of 64 and 128 queries, of 152 and 176 keys and their multiples.
SIZES = [(273, 273), (1, 304), (64, 305), (65, 352), (128, 353), (129, 456), (300, 1), (290, 152)]
SIZES += [(280, 153), (5, 528), (577, 577)]


@needs_kernels
@pytest.mark.parametrize(("Nq", "Nk"), SIZES)
def test_lengths(Nq, Nk):
    dtype = FP16 if Nq % 2 == 0 else BF16
    check_forward(attention_problem(1, Nq, 1, 64, dtype, Nk=Nk), f"Nq {Nq} Nk {Nk}")


@needs_kernels
@pytest.mark.parametrize("D", [8, 32, 48, 72, 80, 88, 96, 104, 128])
def test_head_dims(D):
    for dtype, Nk in ((BF16, 305), (FP16, 460)):
        check_forward(attention_problem(1, 66, 1, D, dtype, Nk=Nk), f"Nk {Nk} D {D}")


@needs_kernels
def test_more_items_than_blocks():
    """Rings go round, over heads; the second warpgroup has rows in two items of three."""
    for B, Nq, H, D, Nk in [(2, 300, 2, 64, 310), (3, 70, 2, 80, 290)]:
        problem = attention_problem(B, Nq, H, D, BF16, Nk=Nk)
        check_forward(problem, f"B {B} Nq {Nq} H {H} D {D}")


@needs_kernels
@pytest.mark.parametrize("layout", ["rows_sliced", "outer_transposed", "offset", "packed"])
def test_layouts(layout):
    check_forward(attention_problem(2, 275, 2, 64, BF16, Nk=66), "Nq 275 Nk 66", layout)


SHAPES = [(2, 2, 66, 300), (1, 2, 66, 300), (2, 1, 66, 300), (1, 1, 1, 300), (2, 2, 66, 1)]


@needs_kernels
@pytest.mark.parametrize("bias", SHAPES, ids=str)
def test_bias_of_every_form(bias):
    for bias_dtype, D in ((FP32, 64), (BF16, 128)):
        problem = attention_problem(2, 66, 2, D, BF16, Nk=300, bias=bias, bias_dtype=bias_dtype)
        check_forward(problem, f"bias {bias} {DTYPE_IDS[bias_dtype]} D {D}")


MASKS = [
    {"key_padding_mask": (2, 300)},
    {"bool_bias": (1, 2, 66, 300)},
    {"dropout_p": 0.2},
    {"bias": (1, 2, 66, 300), "key_padding_mask": (2, 300), "dropout_p": 0.2},
]


@needs_kernels
@pytest.mark.parametrize("options", MASKS, ids=lambda o: " ".join(o))
def test_masks_and_dropout(options):
    check_forward(attention_problem(2, 66, 2, 80, FP16, Nk=300, **options), " ".join(options))


@needs_kernels
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-38, 2.0])
def test_lse_and_scales(scale):
    tensors = qkv(2, 66, 310, 2)
    for bias in (None, torch.randn(1, 2, 66, 310)):
        check_raw(tensors, bias, scale=scale)


@needs_kernels
def test_masked_rows_are_zero():
    q, k, v = qkv(1, 66, 310, 2)
    bias = torch.zeros(1, 2, 66, 310)
    bias[0, 1, 3], bias[0, 0, 65], bias[0, 0, 7, :309] = -math.inf, -math.inf, -math.inf
    for b in (bias, bias == 0):
        out, lse = raw(q, k, v, b)
        assert (out[0, 3, 1] == 0).all() and (out[0, 65, 0] == 0).all()
        assert lse[0, 1, 3] == lse[0, 0, 65] == -math.inf
        assert torch.equal(out[0, 7, 0], v[0, 309, 0])
    hidden = torch.ones(1, 310, dtype=torch.bool)
    hidden[0, 200] = False  # a key of the second tile: the first has none
    out, _ = raw(q, k, v, None, hidden)
    assert torch.equal(out, v[:, 200:201].expand_as(out))


@needs_kernels
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values_spread_as_in_the_reference(value, where):
    tensors = dict(zip("qkv", qkv(1, 300, 310), strict=True))
    tensors[where][0, -1, 0, 5] = value
    tensors[where][0, 2, 0, 63] = value
    out, lse = raw(*tensors.values())
    truth, exact = reference.attention(*tensors.values(), None, None, None, 0.125, 0.0)
    assert not testing.same_specials(out, truth.to(BF16)), testing.same_specials(out, truth)
    assert torch.equal(lse.isfinite(), exact.isfinite())


@needs_kernels
def test_large_logits():
    problem = attention_problem(1, 66, 1, 64, BF16, Nk=310, magnitude=1000.0)
    check_forward(problem, "logits of 1e4", factor=None)  # rows are one-hot: v itself


@needs_kernels
def test_repeats_and_batches_are_bitwise_equal():
    q, k, v = qkv(3, 140, 310, 2)
    for b in (None, torch.randn(1, 2, 140, 310).to(BF16)):
        first = raw(q, k, v, b)
        assert_bitwise_equal(raw(q, k, v, b), first)
        for i in range(3):  # whatever block and stage a head has
            alone = raw(q[i : i + 1], k[i : i + 1], v[i : i + 1], b)
            assert_bitwise_equal(alone, [t[i : i + 1] for t in first])


REFUSALS = [
    ({"dtype": FP32}, "bf16 and fp16"),
    ({"D": 36}, "multiples of 8"),
    ({"D": 136}, "multiples of 8"),
    ({"layout": "misaligned_4"}, "16-byte lines"),
    ({"layout": "expanded", "B": 2}, "16-byte lines"),
    ({"bias": (1, 1, 8, 273), "bias_layout": "transposed"}, "neighbours"),
]


@needs_kernels
@pytest.mark.parametrize(("options", "why"), REFUSALS, ids=str)
def test_refusals(options, why):
    options = {"B": 1, "D": 64, "dtype": BF16} | options
    layout = options.pop("layout", "contiguous")
    bias_layout = options.pop("bias_layout", None)
    shape = [options.pop("B"), 8, 1, options.pop("D"), options.pop("dtype")]
    problem = attention_problem(*shape, Nk=273, **options)
    for name in "qkv":
        problem.inputs[name] = testing.in_layout(problem.inputs[name], layout)
    if bias_layout is not None:
        problem.inputs["bias"] = testing.in_layout(problem.inputs["bias"], bias_layout)
    with pytest.raises(RuntimeError, match=f"sm90 cannot serve this call: .*{why}"):
        forward(problem)


# ---- Plans

needs_plans = pytest.mark.skipif(
    not hasattr(_native.build_facts(), "attention_sm90_long_plan"),
    reason="vitkernels._C is not built (it needs Python.h and pybind11)",
)


def plan(Nq, Nk, D, B=64, H=12, general=False, multiprocessors=132):
    return _native.build_facts().attention_sm90_long_plan(B, H, Nq, Nk, D, general, multiprocessors)


@needs_plans
@pytest.mark.parametrize("D", range(8, 129, 8))
def test_plans(D):
    for N in range(1, 1601):
        for general in (False, True):
            p = plan(N, N, D, general=general)
            assert max(D, 64) <= p["width"] <= max(64, D + 24) and p["width"] % 16 == 0
            assert p["keys"] in ((152, 176) if p["width"] == 64 and not general else (152,))
            assert (p["tiles"] - 1) * p["keys"] < N <= p["tiles"] * p["keys"]
            rows = N // 64 * 64 if p["tails"] else N  # _long_tail.py looks at the others
            assert (p["items"] - 1) * 128 < p["rows"] == rows <= p["items"] * 128
            assert 2 <= p["stages"] <= 4, "the next tile loads while this one is multiplied"
            rows = 128 + 2 * p["stages"] * -(-p["keys"] // 16) * 16
            assert rows * 2 * p["width"] < p["shared_bytes"] <= 232_448
            assert p["blocks"] == 132


@needs_plans
def test_plans_of_the_shapes_that_count():
    for N, D, keys, useful in [(577, 64, 152, 0.94), (1370, 64, 176, 0.97), (1025, 64, 176, 0.97),
                               (577, 80, 152, 0.94), (1370, 96, 152, 0.90)]:  # fmt: skip
        p = plan(N, N, D)
        assert p["keys"] == keys and N / (p["tiles"] * keys) > useful
    assert plan(577, 577, 64)["stages"] == 4 and plan(1370, 1370, 128)["stages"] == 2
    assert plan(300, 300, 64, B=1, H=3)["blocks"] == 9


# ---- What nvcc made of it


def products(width, keys):
    """S of a tile's steps of 16 columns, P V of steps of 16 keys: S of the first tile, both of any
    other, P V of the last."""
    parts = 2 if width in (80, 96) else 1  # of the result's columns
    return 2 * width // 16 + 2 * parts * -(-keys // 16)


@needs_nvcc
def test_instructions_are_those_of_the_plan():
    name = "attention_attention_sm90_long.cu.cuda.o"
    code = sass(ROOT / "build/native/inplace/obj" / name, "sm_90a")
    seen = set()
    for kernel, lines in code.items():
        dtype, width, keys, general = map(int, kernel.partition("<")[2].rstrip(">").split(","))
        seen.add((dtype, width, keys, general))
        # Of 16 keys that a tail has at a time.
        steps = 0 if width > (64 if general else 80) else 1 if general else 2
        words = ("HGMMA", "UTMALDG", "HMMA", "LDSM", "MOVM", "LDL", "STL", "ATOM", "RED.")
        assert counts(lines, words) == {
            "HGMMA": products(width, keys),
            "UTMALDG": 4 * (2 if width > 64 else 1),  # Q of two groups, K, V
            "HMMA": steps * 2 * width // 16,  # a tail's S^T and O^T, each with its LDSM
            "LDSM": steps * 2 * width // 16,
            "MOVM": steps * 2,
            "LDL": 0,
            "STL": 0,
            "ATOM": 0,
            "RED.": 0,
        }, kernel
        wide = sum(f"HGMMA.64x{keys}x16" in line for line in lines)
        assert wide == 2 * width // 16, kernel
    widths = (64, 80, 96, 128)
    expected = {(t, w, 152, general) for t in (1, 2) for w in widths for general in (0, 1)}
    assert seen == expected | {(t, 64, 176, 0) for t in (1, 2)}
