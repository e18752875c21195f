"""attention's sm_90 forward, forced: values, refusals, special values; plans; what nvcc made."""

import math

import attention_paths
import pytest
import torch
from attention_paths import forward, needs_kernels, needs_nvcc, qkv, raw
from attention_problems import attention_problem, packed_problem
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


def check_forward(problem, what, layout="contiguous"):
    tensors = list(problem.inputs.values())
    keys = tensors[-1 if problem.op == "attention_qkvpacked" else 1].shape[1]
    factor = 0.9 if keys >= 49 else None
    attention_paths.check_forward(problem, f"sm90 forward {what}", layout, factor)


LENGTHS = [1, 2, 16, 17, 49, 50, 64, 65, 144, 196, 197, 198, 201, 256, 257, 272]
WIDTHS = [8, 32, 48, 64, 72, 80, 88, 96, 104, 128]


@needs_kernels
@pytest.mark.parametrize("N", LENGTHS)
def test_lengths(N):
    check_forward(packed_problem(1, N, 1, 64, BF16), f"N {N}")
    check_forward(packed_problem(1, N, 1, 32, FP16), f"N {N} D 32")


@needs_kernels
@pytest.mark.parametrize("D", WIDTHS)
def test_head_dims(D):
    for N, dtype in [(50, FP16), (197, BF16), (257, FP16)]:
        check_forward(packed_problem(1, N, 1, D, dtype), f"N {N} D {D}")


CROSS = [(1, 197), (197, 1), (5, 64), (80, 17), (144, 272), (272, 49), (66, 201)]


@needs_kernels
@pytest.mark.parametrize(("Nq", "Nk"), CROSS)
def test_cross_attention(Nq, Nk):
    check_forward(attention_problem(1, Nq, 2, 64, BF16, Nk=Nk), f"Nq {Nq} Nk {Nk}")


@needs_kernels
def test_more_heads_than_blocks():
    """Stages of both rings are used again, by warpgroups with and without a tile of the head."""
    for B, N, H, D in [(3, 50, 7, 32), (4, 17, 5, 64), (2, 197, 4, 64), (5, 130, 1, 80)]:
        check_forward(packed_problem(B, N, H, D, BF16), f"B {B} N {N} H {H} D {D}")


SHAPES = [(2, 3, 65, 65), (1, 3, 65, 65), (2, 1, 65, 65), (1, 1, 1, 65), (2, 3, 65, 1)]


@needs_kernels
@pytest.mark.parametrize("bias", SHAPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPE_IDS, ids=DTYPE_IDS.get)
def test_bias_of_every_form(bias, bias_dtype):
    problem = packed_problem(2, 65, 3, 64, BF16, bias=bias, bias_dtype=bias_dtype)
    check_forward(problem, f"bias {bias} {DTYPE_IDS[bias_dtype]}")


@needs_kernels
@pytest.mark.parametrize(("N", "D"), [(49, 32), (144, 32), (197, 64), (197, 80), (257, 64)])
def test_bias_of_a_head_for_all_samples(N, D):
    for dtype in (BF16, FP32):  # what fits stays in shared memory, the rest is read where it is
        problem = packed_problem(3, N, 2, D, BF16, bias=(1, 2, N, N), bias_dtype=dtype)
        check_forward(problem, f"bias N {N} D {D} {DTYPE_IDS[dtype]}")


@needs_kernels
@pytest.mark.parametrize("layout", ["rows_sliced", "outer_transposed", "offset", "packed"])
def test_layouts(layout):
    check_forward(attention_problem(2, 66, 2, 64, BF16), "N 66", layout)


@needs_kernels
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-38, 2.0])
def test_scales(scale):
    check_forward(packed_problem(1, 49, 1, 32, FP16, scale=scale), f"scale {scale}")


@needs_kernels
def test_lse():
    for N in (5, 66, 197, 257):
        q, k, v = qkv(2, N, N, 2)
        bias = torch.randn(1, 2, N, N)
        for b in (None, bias):
            _, lse = raw(q, k, v, b)
            wide = [t.double() for t in (q, k, v)]
            truth = reference.attention(*wide, b, None, None, 0.125, 0.0)[1]
            assert (lse - truth).abs().max() < 4e-6 * truth.abs().max()


@needs_kernels
def test_masked_rows_are_zero():
    q, k, v = qkv(1, 197, 197, 2)
    bias = torch.zeros(1, 2, 197, 197)
    bias[0, 1, 3], bias[0, 0, 195], bias[0, 0, 7, :196] = -math.inf, -math.inf, -math.inf
    for b in (bias, bias.to(BF16)):
        out, lse = raw(q, k, v, b)
        truth, exact = reference.attention(q, k, v, b, None, None, 0.125, 0.0)
        assert (out[0, 3, 1] == 0).all() and (out[0, 195, 0] == 0).all()
        assert lse[0, 1, 3] == lse[0, 0, 195] == -math.inf
        assert torch.equal(out[0, 7, 0], v[0, 196, 0])
        assert torch.equal(lse.isinf(), exact.isinf())
        assert (out - truth).abs().max() < 0.02


@needs_kernels
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("N", [66, 201])
def test_special_values_spread_as_in_the_reference(N, value, where):
    tensors = dict(zip("qkv", qkv(1, N, N), strict=True))
    tensors[where][0, N - 1, 0, 5] = value
    tensors[where][0, 2, 0, 63] = value
    out, lse = raw(*tensors.values())
    truth, exact = reference.attention(*tensors.values(), None, None, None, 0.125, 0.0)
    assert not testing.same_specials(out, truth.to(BF16)), testing.same_specials(out, truth)
    assert torch.equal(lse.isfinite(), exact.isfinite())


@needs_kernels
def test_large_logits():
    check_forward(attention_problem(1, 197, 1, 64, BF16, magnitude=1000.0), "logits of 1e4")


@needs_kernels
def test_repeats_and_batches_are_bitwise_equal():
    q, k, v = qkv(3, 70, 70, 2)
    bias = torch.randn(1, 2, 70, 70).to(BF16)
    for b in (None, bias):
        first = raw(q, k, v, b)
        assert_bitwise_equal(raw(q, k, v, b), first)
        for i in range(3):  # whatever block and stage a head has
            alone = raw(q[i : i + 1], k[i : i + 1], v[i : i + 1], b)
            assert_bitwise_equal(alone, [t[i : i + 1] for t in first])


REFUSALS = [
    ({"dtype": FP32}, "bf16 and fp16"),
    ({"D": 36}, "multiples of 8"),
    ({"D": 136}, "multiples of 8"),
    ({"D": 88, "bias": (1, 1, 8, 8)}, "bias with head dims to 80"),
    ({"dropout_p": 0.5}, "dropout"),
    ({"key_padding_mask": (1, 8)}, "padding"),
    ({"bool_bias": (1, 1, 8, 8)}, "bool"),
    ({"layout": "misaligned_4"}, "16-byte lines"),
    ({"layout": "expanded", "B": 2}, "16-byte lines"),
    ({"bias": (1, 1, 8, 8), "bias_layout": "transposed"}, "neighbours"),
]


@needs_kernels
@pytest.mark.parametrize(("options", "why"), REFUSALS, ids=str)
def test_refusals(options, why):
    options = {"B": 1, "N": 8, "D": 64, "dtype": BF16} | options
    layout = options.pop("layout", "contiguous")
    bias_layout = options.pop("bias_layout", None)
    shape = [options.pop("B"), options.pop("N"), 1, options.pop("D"), options.pop("dtype")]
    problem = attention_problem(*shape, **options)
    for name in "qkv":
        problem.inputs[name] = testing.in_layout(problem.inputs[name], layout)
    if bias_layout is not None:
        problem.inputs["bias"] = testing.in_layout(problem.inputs["bias"], bias_layout)
    with pytest.raises(RuntimeError, match=f"sm90 cannot serve this call: .*{why}"):
        forward(problem)


# ---- Plans


needs_plans = pytest.mark.skipif(
    not hasattr(_native.build_facts(), "attention_sm90_plan"),
    reason="vitkernels._C is not built (it needs Python.h and pybind11)",
)


def plan(Nq, Nk, D, B=256, H=12, bias_size=0, bias_of_batch=False, multiprocessors=132):
    facts = _native.build_facts()
    return facts.attention_sm90_plan(B, H, Nq, Nk, D, bias_size, bias_of_batch, multiprocessors)


@needs_plans
@pytest.mark.parametrize("D", range(16, 129, 4))
def test_plans_of_every_length(D):
    for N in range(1, 1601):
        for bias_size in (0, 2, 4):
            p = plan(N, N, D, bias_size=bias_size)
            if N > 272 or D % 8 != 0 or (D > 80 and bias_size):
                assert not p
                continue
            assert D <= p["width"] <= max(32, 2 * D) and N <= p["columns"] <= p["key_rows"]
            assert p["key_rows"] % 16 == 0
            assert p["query_rows"] == p["tiles"] * 64 + p["tail"] * 16 >= N
            assert p["query_rows"] - (16 if p["tail"] else 48) < N
            assert 1 <= p["value_stages"] <= p["pair_stages"] <= p["value_stages"] + 1 <= 9
            bytes_of_rows = 2 * p["width"]
            loads = p["pair_stages"] * (p["query_rows"] + p["key_rows"])
            loads = (loads + p["value_stages"] * p["key_rows"]) * bytes_of_rows
            bias = p["bias_shared"] * bias_size * p["query_rows"] * p["columns"]
            assert loads + bias < p["shared_bytes"] <= 232_448
            assert p["threads"] == 128 * (p["groups"] + 1)


@needs_plans
def test_plans_of_the_shapes_that_count():
    base = plan(197, 197, 64)
    assert (base["columns"], base["tiles"], base["tail"], base["groups"]) == (200, 3, 1, 3)
    assert (base["pair_stages"], base["value_stages"], base["blocks"]) == (3, 2, 132)
    for D in range(16, 129, 8):
        assert plan(197, 197, D)["useful"] > 0.93
    assert plan(257, 257, 80, B=128, H=16)["useful"] > 0.89
    assert plan(257, 257, 80)["pair_stages"] == 2, "the next head loads while this one computes"
    bias = plan(197, 197, 64, bias_size=2)
    assert bias["bias_shared"] and bias["pair_stages"] == 2
    assert not plan(197, 197, 64, bias_size=4)["bias_shared"], "does not fit"
    assert not plan(197, 197, 64, bias_size=2, bias_of_batch=True)["bias_shared"]


@needs_plans
def test_blocks_with_a_shared_bias_keep_their_head():
    for H in (1, 3, 12, 16, 132, 133, 400):
        for B in (1, 2, 9, 256):
            p = plan(49, 49, 32, B=B, H=H, bias_size=2)
            assert p["blocks"] % H == 0 and p["blocks"] <= min(B * H, max(132, H))


# ---- What nvcc made of it


def products(width, columns, bias):
    """wgmma of one tile: S in pieces of columns, each WIDTH / 16 steps; P V in steps of 16 keys."""
    if columns < 200:
        pieces = [columns]
    elif columns == 200:
        pieces = [112, 88] if width <= 80 else [80, 64, 56]
    elif width <= 64 or (width == 80 and not bias):
        pieces = [144, 128]
    else:
        pieces = [96, 96, 80] if width <= 96 else [64, 16]  # of which the first is a loop
    parts = 2 if width in (80, 96) else 1  # of the result's columns
    return len(pieces) * width // 16 + parts * sum(-(-n // 16) for n in pieces)


@needs_nvcc
def test_instructions_are_those_of_the_plan():
    """Loads: a part of Q, K and V each. mma: both halves of a tail, 32 keys at a time."""
    name = "attention_attention_sm90.cu.cuda.o"
    code = sass(ROOT / "build/native/inplace/obj" / name, "sm_90a")
    seen = set()
    for kernel, lines in code.items():
        dtype, width, columns, bias = map(int, kernel.partition("<")[2].rstrip(">").split(","))
        seen.add((dtype, width, columns, bias))
        words = ("HGMMA", "UTMALDG", "HMMA", "LDL", "STL", "ATOM", "RED.")
        steps = width // 16
        assert counts(lines, words) == {
            "HGMMA": products(width, columns, bias),
            "UTMALDG": 3 * (2 if width > 64 else 1),
            "HMMA": 2 * 4 * steps + 4 * steps,
            "LDL": 0,
            "STL": 0,
            "ATOM": 0,
            "RED.": 0,
        }, kernel
    sizes = [(32, 64), (32, 144), (64, 64)] + [(w, c) for w in (32, 64, 80) for c in (200, 272)]
    plain = [(w, c) for w in (96, 128) for c in (200, 272)]
    expected = {(t, *s, b) for t in (1, 2) for s in sizes for b in (0, 1, 2)}
    assert seen == expected | {(t, *s, 0) for t in (1, 2) for s in plain}
