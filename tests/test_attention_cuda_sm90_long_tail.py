"""Query rows past whole tiles in attention's sm_90 forward of many tokens: what three warps compute
by mma.sync, beside the warpgroups, is the same; plans."""

import math

import pytest
import torch
from attention_paths import check_forward, check_raw, needs_kernels, qkv, raw
from attention_problems import attention_problem
from problems import DTYPE_IDS

from vitkernels import _native, testing
from vitkernels.ops.attention import reference
from vitkernels.testing import assert_bitwise_equal, assert_close_to_truth

FP32, BF16, FP16 = DTYPE_IDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def sm90():
    with testing.cuda_path("sm90"):
        yield


def check(problem, what):
    """All rows within the error model, and the last ones, past whole tiles, on their own."""
    all_rows = check_forward(problem, f"sm90 long tail {what}", "contiguous", None)
    first = all_rows[0].shape[1] // 64 * 64
    last = [t[:, first:].contiguous() for t in all_rows]
    assert_close_to_truth(*last, what=f"last rows, {what}")


# Rows past tiles of 64: none, tails of one or two rows, of 8, two tails, too many.
@needs_kernels
@pytest.mark.parametrize("past", [0, 1, 2, 8, 9, 15, 16, 17])
def test_queries(past):
    for dtype, Nk in ((BF16, 153), (FP16, 40)):
        check(attention_problem(1, 320 + past, 1, 64, dtype, Nk=Nk), f"Nq 320 + {past} Nk {Nk}")
    check_raw(qkv(1, 320 + past, 70))


# Edges of the 32 keys that a warp takes at a time, of 96 and of the tiles of 152 and 176.
@needs_kernels
@pytest.mark.parametrize("Nk", [1, 16, 17, 33, 96, 97, 129, 152, 176, 304, 305, 353])
def test_keys(Nk):
    dtype, Nq = FP16 if Nk % 2 == 0 else BF16, 129 if Nk > 272 else 321
    check(attention_problem(1, Nq, 1, 64, dtype, Nk=Nk), f"Nq {Nq} Nk {Nk}")
    check_raw(qkv(1, Nq + 2, Nk))


@needs_kernels
@pytest.mark.parametrize("D", [8, 40, 48, 64, 72, 80, 96, 128])
def test_head_dims(D):
    dtype, Nk = (BF16, 305) if D % 16 == 0 else (FP16, 282)
    check(attention_problem(1, 131, 1, D, dtype, Nk=Nk), f"Nk {Nk} D {D}")


@needs_kernels
def test_heads_take_turns():
    """Tails beside the first and the second item of a head, more items than blocks."""
    for B, H, Nq, D in ((1, 3, 336, 64), (1, 3, 321, 80)):
        check(attention_problem(B, Nq, H, D, BF16, Nk=170), f"B {B} H {H} Nq {Nq} D {D}")


OPTIONS = [
    {"bias": (2, 2, 130, 290)},
    {"bias": (1, 2, 130, 1), "bias_dtype": FP32},
    {"bias": (1, 1, 1, 290)},
    {"key_padding_mask": (2, 290)},
    {"bool_bias": (1, 2, 130, 290)},
    {"dropout_p": 0.2},
    {"bias": (1, 2, 130, 290), "key_padding_mask": (2, 290), "dropout_p": 0.2},
]


@needs_kernels
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o))
def test_options(options):
    dtype, D = (FP16, 48) if len(options) > 2 else (BF16, 64)
    check(attention_problem(2, 130, 2, D, dtype, Nk=290, **options), f"D {D} {options}")


@needs_kernels
def test_dropout_of_a_row_of_ones():
    """Which keys a row keeps shows in the sums alone: v is a unit vector each, q is 0."""
    q, k = torch.zeros(1, 321, 1, 64, dtype=BF16), torch.zeros(1, 64, 1, 64, dtype=BF16)
    v = torch.eye(64, dtype=BF16)[None, :, None]
    seed = torch.tensor([77])
    out, _ = torch.ops.vitkernels.attention_fwd.cuda(q, k, v, None, None, seed, 0.125, 0.5)
    truth, _ = reference.attention(q, k, v, None, None, seed, 0.125, 0.5)
    assert torch.equal(out, truth)


@needs_kernels
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-38, 2.0])
def test_scales(scale):
    tensors = qkv(1, 129, 290, 2)
    for bias in (None, torch.randn(1, 2, 129, 290)):
        check_raw(tensors, bias, scale=scale)


@needs_kernels
def test_masked_rows_are_zero():
    q, k, v = qkv(1, 130, 310, 2)
    bias = torch.zeros(1, 2, 130, 310)
    bias[0, 1, 128], bias[0, 0, 129, :309] = -math.inf, -math.inf
    for b in (bias, bias == 0):
        out, lse = raw(q, k, v, b)
        assert (out[0, 128, 1] == 0).all() and lse[0, 1, 128] == -math.inf
        assert torch.equal(out[0, 129, 0], v[0, 309, 0])
        check_raw((q, k, v), b)
    for key in (0, 40, 200):  # two of the warps have no key
        hidden = torch.ones(1, 310, dtype=torch.bool)
        hidden[0, key] = False
        out, _ = raw(q, k, v, None, hidden)
        assert torch.equal(out, v[:, key : key + 1].expand_as(out))


@needs_kernels
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values_spread_as_in_the_reference(value, where):
    tensors = dict(zip("qkv", qkv(1, 130, 310), strict=True))
    tensors[where][0, -1, 0, 5] = value
    out, lse = raw(*tensors.values())
    truth, exact = reference.attention(*tensors.values(), None, None, None, 0.125, 0.0)
    assert not testing.same_specials(out, truth.to(BF16)), testing.same_specials(out, truth)
    assert torch.equal(lse.isfinite(), exact.isfinite())


@needs_kernels
def test_large_logits():
    problem = attention_problem(1, 130, 1, 64, BF16, Nk=310, magnitude=1000.0)
    check(problem, "logits of 1e4")


@needs_kernels
def test_a_head_has_the_same_bits_in_any_batch():
    q, k, v = qkv(3, 330, 160, 2)
    first = raw(q, k, v)
    assert_bitwise_equal(raw(q, k, v), first)
    for i in range(3):  # beside whichever item its tails are
        alone = raw(q[i : i + 1], k[i : i + 1], v[i : i + 1])
        assert_bitwise_equal(alone, [t[i : i + 1] for t in first])


# ---- Plans

needs_plans = pytest.mark.skipif(
    not hasattr(_native.build_facts(), "attention_sm90_long_tail"),
    reason="vitkernels._C is not built (it needs Python.h and pybind11)",
)


def plan(N, D=64, general=False):
    return _native.build_facts().attention_sm90_long_plan(64, 12, N, N, D, general, 132)


@needs_plans
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("general", [False, True], ids=["plain", "general"])
def test_every_row_is_in_one_place(D, general):
    for N in range(1, 1700):
        p = plan(N, D, general)
        past, pairs = N % 64, N // 128
        tails = -(-past // 8) if past <= 16 and -(-past // 8) <= pairs else 0
        assert p["tails"] == (tails if (64 if general else 80) >= D else 0)
        assert p["rows"] == (N - past if p["tails"] else N)
        assert p["rows"] + 8 * (p["tails"] - 1) < N <= p["rows"] + 8 * p["tails"] or not p["tails"]
        assert p["stages"] == {32: 4, 64: 4, 80: 4, 96: 3, 128: 2}[D], "tails take none away"


@needs_plans
def test_items_of_the_shapes_that_count():
    """ViT at 384 and 512 pixels, with registers, with a distillation token, without a class token;
    tails beside two tiles of 64 cost no item."""
    expected = {577: (1, 5), 581: (1, 5), 578: (1, 5), 1025: (1, 8), 1029: (1, 8), 4097: (1, 32),
                784: (2, 6), 785: (0, 7), 1024: (0, 8), 1370: (0, 11)}  # fmt: skip
    assert {N: (plan(N)["tails"], plan(N)["items"]) for N in expected} == expected


@needs_plans
@pytest.mark.parametrize("N", [400, 577, 581, 784, 1025, 2049])
def test_tails_are_spread_over_items_and_blocks(N):
    p, tail_of = plan(N), _native.build_facts().attention_sm90_long_tail
    pairs, heads, blocks = p["rows"] // 128, 1024, 132
    of_block = [0] * blocks
    for head in range(heads):
        tails = [tail_of(p["tails"], pairs, head, item) for item in range(p["items"])]
        assert sorted(t for t in tails if t is not None) == list(range(p["tails"]))
        for item, tail in enumerate(tails):
            of_block[(head * p["items"] + item) % blocks] += tail is not None
    assert max(of_block) <= 1.2 * sum(of_block) / blocks
