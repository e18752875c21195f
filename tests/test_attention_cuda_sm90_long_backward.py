"""attention's backward of many tokens on Hopper, forced: every gradient, what it refuses, what
nvcc made of it, and its launch plans. The forward takes whatever path serves."""

import math

import pytest
import torch
from attention_paths import needs_kernels, needs_nvcc
from attention_problems import attention_problem, packed_problem
from compiled_code import counts, sass
from native_build import ROOT
from problems import DTYPE_IDS, check, check_repeats
from test_attention_cuda_sm90_backward import backward_only, run

from vitkernels import _native, testing
from vitkernels.testing import assert_bitwise_equal, cuda_path, grads_of

FP32, BF16, FP16 = DTYPE_IDS
INF = math.inf

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def sm90():
    with cuda_path("sm90"):
        yield


# ---- Values

CASES = [  # B, Nq, H, D, Nk: edges of 64 and 128 rows, of the passes' columns
    ((1, 257, 1, 64, 257), BF16),
    ((1, 320, 1, 64, 1), FP16),
    ((1, 1, 1, 64, 384), BF16),
    ((1, 81, 1, 64, 385), FP16),
    ((1, 577, 1, 64, 577), BF16),
    ((1, 66, 1, 32, 300), FP16),
    ((1, 81, 1, 80, 257), BF16),
    ((1, 20, 1, 72, 300), FP16),
    ((1, 65, 1, 96, 97), BF16),
    ((1, 49, 1, 128, 193), FP16),
    ((1, 5, 1, 104, 7), BF16),
    ((2, 130, 3, 64, 290), BF16),  # more items than blocks, the second warpgroup idle in some
]


@needs_kernels
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_every_gradient(sm90, shape, dtype):
    B, Nq, H, D, Nk = shape
    problem = backward_only(attention_problem, B, Nq, H, D, dtype, Nk=Nk)
    name = f"sm90 long backward Nq{Nq} Nk{Nk} D{D}"
    check(problem, "cuda", shape_class=name, rmse_factor=0.9 if min(Nq, Nk) >= 49 else None)


@needs_kernels
def test_packed(sm90):
    problem = backward_only(packed_problem, 1, 260, 1, 64, BF16)
    check(problem, "cuda", shape_class="sm90 long backward packed", rmse_factor=0.9)


@needs_kernels
@pytest.mark.parametrize(
    ("layout", "grad_layout"),
    [("rows_sliced", "packed"), ("offset", "outer_transposed"), ("sliced", "transposed")],
)
def test_layouts(sm90, layout, grad_layout):
    problem = backward_only(attention_problem, 2, 265, 2, 32, BF16, Nk=50)
    shape_class = "sm90 long backward Nq265 Nk50 D32"
    check(problem, "cuda", shape_class=shape_class, layout=layout, grad_layout=grad_layout)


MASKS = [
    {"key_padding_mask": (2, 270)},
    {"bool_bias": (1, 1, 66, 270)},
    {"dropout_p": 0.2},
    {"bool_bias": (2, 1, 66, 270), "key_padding_mask": (2, 270), "dropout_p": 0.2},
]


@needs_kernels
@pytest.mark.parametrize("options", MASKS, ids=lambda o: " ".join(o))
def test_masks_and_dropout(sm90, options):
    for D, dtype in ((64, BF16), (80, FP16)):
        problem = backward_only(attention_problem, 2, 66, 1, D, dtype, Nk=270, **options)
        check(problem, "cuda", shape_class=f"sm90 long backward D{D} {' '.join(options)}")


def constant_bias_gradients(problem, backend, grads):
    """Of q, k and v; the bias gets none."""
    leaves = [
        t.detach().requires_grad_(name != "bias") if t is not None else None
        for name, t in problem.inputs.items()
    ]
    problem.ours(backend)(*leaves).backward(grads)
    return [leaf.grad for leaf in leaves[:3]]


@needs_kernels
@pytest.mark.parametrize("bias", [(1, 2, 66, 300), (2, 1, 1, 300), (1, 2, 66, 1)], ids=str)
@pytest.mark.parametrize("bias_dtype", [FP32, BF16, FP16], ids=DTYPE_IDS.get)
def test_constant_bias(sm90, bias, bias_dtype):
    """As close to the reference in fp64 as twice what bf16's rounding loses."""
    problem = backward_only(
        attention_problem, 2, 66, 2, 64, BF16, Nk=300, bias=bias, bias_dtype=bias_dtype
    )
    problem.inputs["bias"][..., :1, :1] = -INF  # a score, a key or a row
    grads = torch.randn(2, 66, 2, 64).to(BF16)
    ours = constant_bias_gradients(problem, "cuda", grads)
    truth = constant_bias_gradients(problem.double(), "reference", grads.double())
    for mine, exact in zip(ours, truth, strict=True):
        assert (mine - exact).norm() <= 0.01 * exact.norm()
        assert torch.equal(mine.isnan(), exact.isnan())


BIASES = [  # shape for B, H; B, Nq, H, D, Nk; dtype of q, k, v and of the bias
    ((1, 2), (3, 66, 2, 64, 258), BF16, FP32),
    ((1, 1), (1, 130, 2, 64, 258), BF16, BF16),
    ((2, 2), (2, 66, 2, 80, 97), FP16, FP32),
    ((2, 1), (2, 257, 2, 32, 20), FP16, FP16),
    ((1, 1), (2, 65, 1, 128, 192), BF16, FP32),
    ((1, 2), (1, 20, 2, 96, 260), BF16, BF16),
]


@needs_kernels
@pytest.mark.parametrize("case", BIASES, ids=str)
def test_dbias(sm90, case):
    matrices, (B, Nq, H, D, Nk), dtype, bias_dtype = case
    problem = backward_only(
        attention_problem, B, Nq, H, D, dtype, Nk=Nk, bias=(*matrices, Nq, Nk),
        bias_dtype=bias_dtype
    )  # fmt: skip
    problem.inputs["bias"][..., 5, :] = -INF
    problem.inputs["bias"][..., :, 7] = -INF
    check(problem, "cuda", shape_class=f"sm90 long backward Nq{Nq} Nk{Nk} D{D} bias {matrices}")
    dq, dk, dv, dbias = run(problem)
    for nothing in (dq[:, 5], dk[:, 7], dv[:, 7], dbias[..., 5, :], dbias[..., 7]):
        assert not nothing.any()


@needs_kernels
def test_a_batch_of_one_adds_nothing_to_dbias(sm90):
    """Each item's own dbias and the shared one: the same terms, the latter added up."""
    problem = backward_only(attention_problem, 3, 20, 2, 32, BF16, Nk=258, bias=(1, 2, 20, 258),
                            bias_dtype=FP32, dropout_p=0.2)  # fmt: skip
    q, k, v, bias = problem.inputs.values()
    grads = [torch.randn(3, 20, 2, 32).to(BF16)]
    each = run(problem, [q, k, v, bias.expand(3, -1, -1, -1).clone()], grads)
    shared = run(problem, [q, k, v, bias], grads)
    assert_bitwise_equal(shared[:3], each[:3])
    assert_bitwise_equal(run(problem, [q, k, v, bias], grads)[3], shared[3])
    torch.testing.assert_close(shared[3], each[3].double().sum(0, keepdim=True).float())


# ---- Special values


@needs_kernels
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_spreads_as_in_the_reference(sm90, where):
    problem = backward_only(attention_problem, 1, 70, 2, 64, BF16, Nk=270)
    problem.inputs[where][0, -1, 1, 31] = math.nan
    tensors = list(problem.inputs.values())
    grads = [torch.randn(1, 70, 2, 64).to(BF16)]
    expected = grads_of(problem.ours("reference"), tensors, grads)[1]
    for name, mine, theirs in zip("qkv", run(problem, tensors, grads), expected, strict=True):
        assert not testing.same_specials(mine, theirs, f"d{name}")


@needs_kernels
@pytest.mark.parametrize("magnitude", [30.0, 1e3], ids=str)
def test_large_logits(sm90, magnitude):
    problem = backward_only(attention_problem, 1, 66, 1, 64, BF16, Nk=270, magnitude=magnitude)
    # Rows are nearly one-hot: few values decide, too few for an exact test of truncation.
    shape_class = f"sm90 long backward logits times {magnitude}"
    check(problem, "cuda", shape_class=shape_class, slack=1.1)
    problem.inputs["q"][:] = -problem.inputs["k"][:, :1]  # lse far below zero
    problem.inputs["q"] *= magnitude
    assert all(torch.isfinite(g).all() for g in run(problem))


# ---- The same bits


@needs_kernels
def test_repeats_and_unwanted_gradients(sm90):
    problem = backward_only(attention_problem, 1, 140, 2, 64, BF16, Nk=260)
    check_repeats(problem, "cuda", ("q", "k", "v", "qv"))


@needs_kernels
def test_a_split_batch_gives_the_same_bits(sm90):
    """Whatever item a block had before."""
    problem = backward_only(packed_problem, 4, 70, 2, 72, BF16)
    (qkv,) = problem.inputs.values()
    grads = torch.randn(4, 70, 144).to(BF16)
    (whole,) = run(problem, [qkv], [grads])
    for item in range(4):
        (part,) = run(problem, [qkv[item : item + 1]], [grads[item : item + 1]])
        assert_bitwise_equal(part, whole[item : item + 1])


# ---- Refusals


@needs_kernels
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": FP32}, "bf16 and fp16"),
        ({"D": 20}, "multiples of 8"),
        ({"D": 136}, "multiples of 8"),
        ({"bias": (1, 1, 1, 257)}, "no dbias of one row"),
        ({"bias": (1, 1, 5, 1)}, "no dbias of one row or column"),
    ],
    ids=str,
)
def test_refusals(sm90, options, why):
    options = {"D": 16, "dtype": BF16} | options
    D, dtype = (options.pop(name) for name in ("D", "dtype"))
    problem = backward_only(attention_problem, 2, 5, 1, D, dtype, Nk=257, **options)
    with pytest.raises(RuntimeError, match=f"sm90 cannot serve this call: .*{why}"):
        run(problem)


@needs_kernels
@pytest.mark.parametrize("layout", ["misaligned_1", "expanded"])
def test_refused_layouts(sm90, layout):
    for laid_out, name in (("q", "q, k and v"), ("v", "q, k and v"), ("dout", "dout and out")):
        problem = backward_only(attention_problem, 2, 5, 1, 16, BF16, Nk=257)
        grad = torch.randn(2, 5, 1, 16).to(BF16)
        if laid_out == "dout":
            grad = testing.in_layout(grad, layout)
        else:
            problem.inputs[laid_out] = testing.in_layout(problem.inputs[laid_out], layout)
        with pytest.raises(RuntimeError, match=f"rows of {name} must begin on 16-byte lines"):
            run(problem, grads=[grad])


# ---- Plans

needs_plans = pytest.mark.skipif(
    not hasattr(_native.build_facts(), "attention_sm90_long_backward_plan"),
    reason="vitkernels._C is not built (it needs Python.h and pybind11)",
)
COLUMNS = {  # of a width: by query, by key
    64: (128, 80),
    80: (128, 80),
    96: (96, 64),
    128: (96, 48),
}


def plan(Nq, Nk, D, by_key, B=64, H=12, multiprocessors=132):
    return _native.build_facts().attention_sm90_long_backward_plan(
        B, H, Nq, Nk, D, by_key, multiprocessors
    )


@needs_plans
@pytest.mark.parametrize("D", range(8, 129, 8))
def test_plans(D):
    for N in range(1, 1601, 3):
        for by_key in (False, True):
            p = plan(N, 99, D, by_key) if by_key else plan(99, N, D, by_key)
            assert p["columns"] == COLUMNS[p["width"]][by_key] and p["width"] >= D
            assert (p["tiles"] - 1) * p["columns"] < N <= p["tiles"] * p["columns"]
            assert p["items"] == 1 and p["stages"] in (2, 3, 4)
            if by_key:  # every row that either pass reads
                assert p["stats_rows"] >= max(p["tiles"] * p["columns"], -(-N // 64) * 64)
            rows = 4 * 64 + 2 * p["stages"] * p["columns"]
            assert rows * 2 * p["width"] < p["shared_bytes"] <= 232_448


@needs_plans
@pytest.mark.parametrize("D", range(8, 129, 8))
def test_plans_of_dbias(D):
    of_dbias = _native.build_facts().attention_sm90_long_dbias_plan
    for N in range(1, 1601, 3):
        p = of_dbias(12, N, N, D, 132)
        assert (p["items"] - 1) * 128 < N <= p["items"] * 128
        assert (p["tiles"] - 1) * 96 < N <= p["tiles"] * 96
        assert p["all"] == 12 * p["items"] * p["tiles"] and p["blocks"] == min(p["all"], 132)
        assert p["stats_rows"] == plan(N, N, D, True)["stats_rows"] and p["stages"] in (2, 3, 4)
        assert p["stages"] * (4 * 64 + 2 * 96) * 2 * max(D, 64) < p["shared_bytes"] <= 232_448


# ---- The compiled code


def instance(width, by_key):
    """HGMMA of a tile: S and dP, then dQ, or dV and dK. UTMALDG: two operands of each warpgroup and
    of a tile, in one part or two. No local memory."""
    parts, steps = (2 if width in (80, 96) else 1), COLUMNS[width][by_key] // 16
    products = 2 * width // 16 + (2 if by_key else 1) * parts * steps
    loads = 6 * (2 if width > 64 else 1)
    return {"HGMMA": products, "UTMALDG": loads, "LDL": 0, "STL": 0, "ATOM": 0, "RED.": 0}


def compiled(part):
    """{parameters of a kernel with products: lines}"""
    name = f"attention_attention_sm90_long_{part}.cu.cuda.o"
    code = sass(ROOT / "build/native/inplace/obj" / name, "sm_90a")
    return {
        tuple(map(int, kernel.partition("<")[2].rstrip(">").split(","))): lines
        for kernel, lines in code.items()
        if "<" in kernel
    }


@needs_nvcc
def test_instructions_are_those_of_the_plan():
    kernels = compiled("backward")
    for (dtype, width, columns, by_key), lines in kernels.items():
        expected = instance(width, by_key)
        assert counts(lines, expected) == expected, (dtype, width, columns, by_key)
    assert set(kernels) == {
        (t, w, COLUMNS[w][k], k) for t in (1, 2) for w in COLUMNS for k in (0, 1)
    }


@needs_nvcc
def test_instructions_of_dbias_are_those_of_the_plan():
    """S and dP. Loads: two operands of the queries and of the keys, in one part or two; ptxas may
    write out the loops over them."""
    kernels = compiled("dbias")
    for (dtype, width), lines in kernels.items():
        words = ("HGMMA", "LDL", "STL", "ATOM", "RED.")
        expected = dict.fromkeys(words, 0) | {"HGMMA": 2 * width // 16}
        assert counts(lines, words) == expected, (dtype, width)
        loads, parts = sum("UTMALDG" in line for line in lines), 2 if width > 64 else 1
        assert loads >= 2 * parts and loads % parts == 0, (dtype, width)
    assert set(kernels) == {(t, w) for t in (1, 2) for w in COLUMNS}
