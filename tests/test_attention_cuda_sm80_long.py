"""attention's sm_80 kernels for any number of queries and keys, forced: values, dropout, gradients
of every form of bias, plans, and what nvcc made of them."""

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
from vitkernels.ops._random import keep_mask
from vitkernels.testing import assert_bitwise_equal, grads_of

FP32, BF16, FP16 = DTYPE_IDS
NAN, INF = math.nan, math.inf
INSTANCES = (64, 80, 96, 128)  # head dims

needs_plans = pytest.mark.skipif(
    not hasattr(_native.build_facts(), "attention_sm80_long_plan"),
    reason="vitkernels._C is not built (it needs Python.h and pybind11)",
)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def sm80():
    with testing.cuda_path("sm80"):
        yield


def run(make, shape, dtype, options, **how):
    factor = 0.9 if shape[1] >= 49 and options.get("Nk", 49) >= 49 else None
    label = " ".join([str(shape), *(f"{k} {v}" for k, v in options.items())])
    problem = make(*shape, dtype, **options)
    check(problem, "cuda", shape_class=f"sm80 long {label}", rmse_factor=factor, **how)


# ---- Values: forward and every gradient


@needs_kernels
@pytest.mark.parametrize(
    ("N", "D", "dtype"),
    [
        (273, 64, BF16),
        (289, 72, FP16),
        (304, 80, BF16),
        (320, 96, FP16),  # whole tiles of 64 keys
        (273, 128, BF16),
        (288, 128, FP16),  # whole tiles of 48
        (577, 64, BF16),
    ],
)
def test_lengths_and_head_dims(N, D, dtype):
    run(packed_problem, (1, N, 1, D), dtype, {})


@needs_kernels
@pytest.mark.parametrize("D", [8, 40, 56, 88, 104, 120])
def test_head_dims_between_the_instances(D):
    run(attention_problem, (1, 49, 1, D), BF16, {"Nk": 273})


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((1, 2, 2, 64), BF16, {"Nk": 300}),
        ((1, 129, 1, 80), FP16, {"Nk": 273}),
        ((2, 300, 1, 64), BF16, {"Nk": 1}),
        ((1, 300, 2, 32), FP16, {"Nk": 17}),
        ((1, 290, 1, 128), BF16, {"Nk": 65}),
        ((1, 50, 1, 64), BF16, {"Nk": 290, "scale": -0.7}),
        ((1, 50, 1, 64), FP16, {"Nk": 290, "magnitude": 30.0}),
    ],
    ids=str,
)
def test_cross_attention_and_scales(shape, dtype, options):
    run(attention_problem, shape, dtype, options)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("N", "D"), [(577, 80), (729, 72), (1025, 64), (1029, 128), (1370, 64), (4097, 64)]
)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=DTYPE_IDS.get)
def test_lengths_of_models(N, D, dtype):
    run(packed_problem, (1, N, 1, D), dtype, {})


# ---- Bias, masks, dropout


BIASES = [  # shape, whether blocks of a tile leave partial sums
    ((2, 2, 66, 70), False),
    ((1, 2, 66, 70), True),
    ((2, 1, 66, 70), True),
    ((1, 1, 66, 70), True),
    ((2, 2, 1, 70), True),
    ((1, 1, 1, 70), True),
    ((2, 2, 66, 1), False),
    ((1, 1, 1, 1), False),
]


@needs_kernels
@pytest.mark.parametrize("bias", [b for b, _ in BIASES], ids=str)
def test_gradients_of_every_form_of_bias(bias):
    at = [b for b, _ in BIASES].index(bias)
    options = {"Nk": 70, "bias": bias, "bias_dtype": (FP32, BF16, FP16)[at % 3]}
    dtype = FP16 if at % 3 == 2 else BF16
    run(attention_problem, (2, 66, 2, (64, 72, 96, 128)[at % 4]), dtype, options)


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 300, 1, 64), {"bias": (1, 1, 300, 300)}),
        ((1, 66, 1, 128), {"Nk": 300, "bool_bias": (1, 1, 66, 300)}),
        ((2, 50, 1, 80), {"Nk": 290, "key_padding_mask": (2, 290), "bias": (1, 1, 1, 290)}),
        ((1, 290, 1, 64), {"Nk": 2, "bias": (1, 1, 290, 2)}),
        ((2, 3, 2, 24), {"Nk": 5, "bias": (1, 2, 3, 5), "dropout_p": 0.2}),
        ((1, 66, 1, 96), {"Nk": 290, "dropout_p": 0.3}),
        ((1, 197, 1, 64), {"dropout_p": 0.1}),
        ((1, 50, 2, 72), {"bias": (1, 2, 50, 50), "dropout_p": 0.2}),
    ],
    ids=str,
)
def test_masks_and_dropout(shape, options):
    run(attention_problem, shape, BF16, options)


@needs_kernels
def test_dropout_keeps_what_the_reference_keeps():
    """Equal scores, and v the identity: the output is the mask, (B, Nq, H, Nk)."""
    B, Nq, H, Nk, p = 2, 130, 2, 128, 0.3
    problem = attention_problem(B, Nq, H, Nk, FP16, Nk=Nk, dropout_p=p)
    q = torch.zeros_like(problem.inputs["q"])
    k = problem.inputs["k"]
    v = torch.eye(Nk, dtype=FP16)[None, :, None, :].expand(B, Nk, H, Nk).contiguous()
    with torch.no_grad():
        out = problem.ours("cuda")(q, k, v)
    kept = keep_mask(problem.dropout_seed(), (B, H, Nq, Nk), p)
    assert torch.equal(out.permute(0, 2, 1, 3) != 0, kept)
    dout = torch.ones_like(out)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    problem.ours("cuda")(*leaves).backward(dout)  # dv: how many queries keep each key
    counts = kept.sum(2).double() / Nk / (1 - p)  # (B, H, Nk)
    dv = leaves[2].grad[..., 0].transpose(1, 2).double()
    assert ((dv - counts).abs() <= counts * 2**-9).all()


@needs_kernels
def test_a_fully_masked_row_is_zero_and_has_no_gradient():
    keep = torch.ones(1, 1, 20, 290, dtype=torch.bool)
    keep[..., 3, :] = False
    problem = attention_problem(1, 20, 2, 64, BF16, Nk=290, bool_bias=keep)
    out, grads = grads_of(problem.ours("cuda"), list(problem.inputs.values()))
    assert (out[0][:, 3] == 0).all() and (grads[0][:, 3] == 0).all()
    assert all(g.isfinite().all() for g in grads)
    check(problem, "cuda", shape_class="sm80 long, a fully masked row")
    padded = torch.zeros(2, 290, dtype=torch.bool)
    padded[1] = True
    problem = attention_problem(
        2, 20, 1, 64, BF16, Nk=290, key_padding_mask=padded, bias=(1, 1, 1, 290), dropout_p=0.1
    )
    out, grads = grads_of(problem.ours("cuda"), list(problem.inputs.values()))
    assert all((t[1] == 0).all() for t in (*out, *grads[:3]))
    check(problem, "cuda", shape_class="sm80 long, a batch item of padding")


# ---- Special values, repeats, layouts


@needs_kernels
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_special_values_are_where_the_truth_has_them(name, value):
    problem = attention_problem(1, 20, 2, 16, BF16, Nk=290)
    problem.inputs[name][0, 17, 1, 3] = value
    check_specials(problem)


@needs_kernels
def test_a_nan_stays_in_its_head_forward_and_backward():
    problem = attention_problem(1, 20, 2, 64, FP16, Nk=290, bias=(1, 2, 1, 1))
    clean = list(problem.inputs.values())
    with torch.no_grad():
        grads = output_gradients(problem, testing.as_tuple(problem.ours("cuda")(*clean)))
    expected = sum(grads_of(problem.ours("cuda"), clean, grads), ())
    dirty = [t.clone() for t in clean]
    dirty[1][0, 4, 1, 2] = NAN
    *mine, dbias = sum(grads_of(problem.ours("cuda"), dirty, grads), ())
    for spoilt, clean_one in zip(mine, expected, strict=False):
        assert_bitwise_equal(spoilt[:, :, 0].contiguous(), clean_one[:, :, 0].contiguous())
        assert spoilt[:, :, 1].isnan().any()
    assert dbias[0, 0] == 0 and dbias[0, 1].isnan()


@needs_kernels
def test_repeats_are_equal_and_a_gradient_does_not_depend_on_the_others():
    """With partial sums of dbias, dropout, and tiles that are not whole."""
    options = {"Nk": 70, "bias": (1, 1, 66, 70), "dropout_p": 0.2}
    check_repeats(attention_problem(2, 66, 2, 64, BF16, **options), "cuda", repeats=3)


@needs_kernels
def test_a_head_does_not_depend_on_its_neighbours():
    check_heads_alone(attention_problem(2, 20, 2, 72, BF16, Nk=290))


@needs_kernels
@pytest.mark.parametrize("layout", ["outer_transposed", "rows_sliced", "expanded", "offset"])
def test_layouts(layout):
    options = {"Nk": 274, "bias": (1, 2, 18, 274)}
    run(attention_problem, (2, 18, 2, 24), BF16, options, layout=layout)


# ---- Refusals: of any length, those of the short kernels


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
    problem = attention_problem(1, 273, 1, options["D"], options["dtype"])
    with pytest.raises(RuntimeError, match=f"path sm80 cannot serve this call: .*{why}"):
        problem.ours("cuda")(*problem.inputs.values())


# ---- Plans


def plan(D, options=False, by_key=False):
    return _native.build_facts().attention_sm80_long_plan(D, options, by_key)


@needs_plans
@pytest.mark.parametrize("D", range(8, 129, 8))
def test_two_blocks_fit_a_multiprocessor_of_sm80_and_one_those_with_100_kb(D):
    for options in (False, True):
        for by_key in (False, True):
            p = plan(D, options, by_key)
            row = 2 * p["head_dim"]
            assert p["head_dim"] == min(d for d in INSTANCES if d >= D)
            assert p["shared_bytes"] == (128 + 3 * p["columns"]) * row
            rows = 2 * p["backward_rows"] + 4 * p["backward_columns"]
            sums = 16 * p["backward_columns"] if by_key else 0
            assert p["backward_shared_bytes"] == rows * row + sums
            for key in ("shared_bytes", "backward_shared_bytes", "bias_shared_bytes"):
                assert 2 * (p[key] + 1024) <= 164 * 1024, key
                assert p[key] <= 99 * 1024, key


@needs_plans
def test_few_of_the_products_do_not_count():
    """Of the forward at the lengths of models: (N, D, share of the scores computed that count)."""
    for N, D, least in ((577, 64, 0.92), (729, 72, 0.95), (1025, 64, 0.95), (1370, 64, 0.98)):
        assert plan(D)["columns"] == 64
        queries, keys = -(-N // 32) * 32, -(-N // 16) * 16
        assert N * N / (queries * keys) > least


@needs_plans
@pytest.mark.parametrize(
    "sizes",
    [(2, 3, 66, 70), (64, 12, 577, 577), (1, 1, 1, 1), (256, 16, 50, 2000), (1, 1, 8000, 8000)],
)
def test_every_member_of_a_bias_is_added_once_in_bounded_memory(sizes):
    B, H, Nq, Nk = sizes
    for batch in {1, B}:
        for heads in {1, H}:
            for rows in {1, Nq}:
                p = _native.build_facts().attention_sm80_long_bias_plan(*sizes, batch, heads, rows)
                assert p["tiles"] == batch * heads * -(-rows // 64) * -(-Nk // 64)
                added = B // batch * (H // heads) * (-(-Nq // 64) if rows == 1 else 1)
                assert p["members"] == added
                assert (p["splits"] - 1) * p["share"] < added <= p["splits"] * p["share"]
                assert p["splits"] == 1 or p["tiles"] * p["splits"] <= 512
                assert p["partial_floats"] * 4 <= 8 << 20
                assert (p["partial_floats"] == 0) == (p["splits"] == 1)


@needs_plans
@pytest.mark.parametrize(("bias", "partial"), BIASES, ids=str)
def test_the_cases_above_have_partial_sums_and_none(bias, partial):
    p = _native.build_facts().attention_sm80_long_bias_plan(2, 2, 66, 70, *bias[:3])
    assert bias[3] == 1 or (p["splits"] > 1) == partial


# ---- The compiled code. A product is an mma of a warp; a copy 16 bytes of a thread.


def copies(rows, head_dim):
    """Of a tile by each thread: a row's chunks go to 2, 4 or 8 neighbours."""
    lanes = 8 if head_dim % 64 == 0 else 4 if head_dim % 32 == 0 else 2
    return -(-rows // (128 // lanes)) * (head_dim // 8 // lanes)


def forward_counts(head_dim, options):
    columns = 32 if options else 64 if head_dim <= 96 else 48
    # S and P V of 32 queries and a tile's keys; then of 16 keys. q, and two tiles twice.
    return (columns + 16) * head_dim // 32, copies(128, head_dim) + 4 * copies(columns, head_dim)


def backward_counts(head_dim, by_key):
    tiles = 2 if head_dim <= (64 if by_key else 80) else 1
    columns = 64 if head_dim == 64 else 32
    products = (4 if by_key else 3) * tiles * head_dim // 8  # S, dP and each sum, of 16 columns
    per_stage = 2 * copies(columns, head_dim) + by_key
    return products, 2 * copies(64 * tiles, head_dim) + 2 * per_stage


@needs_nvcc
@pytest.mark.parametrize("part", ["", "_backward", "_dbias"])
def test_registers_are_there_for_two_blocks(part):
    for (name, arch), used in compiled(CSRC / f"attention/attention_sm80_long{part}.cu").items():
        assert used["registers"] <= 255 and used["spills"] == used["stack"] == 0, (name, arch)


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("part", ["", "_backward", "_dbias"])
def test_instructions_are_those_of_the_plan(part, arch):
    name = f"attention_attention_sm80_long{part}.cu.cuda.o"
    code = sass(ROOT / "build/native/inplace/obj" / name, arch)
    expected = {}
    for dtype in (1, 2):
        for dim in INSTANCES:
            if part == "_dbias":  # S and dP of 64 x 64, a warp a quarter; q, dout, k, v
                expected[f"dbias_kernel<{dtype},{dim}>"] = dim, 4 * copies(64, dim)
                continue
            for options in (0, 1):
                if part == "":
                    key = f"forward_kernel<{dtype},{dim},{options}>"
                    expected[key] = forward_counts(dim, options)
                    continue
                for by_key in (0, 1):
                    key = f"gradient_kernel<{dtype},{dim},{options},{by_key}>"
                    expected[key] = backward_counts(dim, by_key)
    others = {"": 0, "_backward": 2, "_dbias": 1}  # row sums of two dtypes; the finish
    assert len(code) == len(expected) + others[part] and expected.keys() <= code.keys()
    for kernel, lines in code.items():
        words = ("HMMA", "LDGSTS", "LDL", "STL", "ATOM", "RED.")
        products, copied = expected.get(kernel, (0, 0))
        none = dict.fromkeys(words[2:], 0)
        assert counts(lines, words) == {"HMMA": products, "LDGSTS": copied, **none}, kernel
