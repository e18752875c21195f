"""attention and attention_qkvpacked: forward and every gradient against float64, every backend."""

import itertools

import pytest
import torch
from attention_problems import attention_problem, packed_problem
from problems import DTYPE_IDS, check

from vitkernels.ops import attention_weights
from vitkernels.testing import SIXTEEN_BIT, available_for, cases

BACKENDS = available_for("attention", D=64)
FP32, BF16, FP16 = DTYPE_IDS
SLOW = ("triton", "cuda")
LENGTHS = (1, 2, 49, 50, 64, 65, 144, 196, 197, 198, 256, 257, 577, 1024, 1025, 1370)
HEAD_DIMS = (16, 32, 48, 64, 72, 80, 88, 96, 128)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPE_IDS, ids=DTYPE_IDS.get)


def batch_and_heads(N):
    return (2, 3) if N <= 65 else (2, 2) if N <= 257 else (1, 2) if N <= 577 else (1, 1)


def factor(backend, dtype, Nk):
    """16-bit kernels keep scores and probabilities in fp32: from 49 tokens on they beat eager."""
    return 0.9 if dtype in SIXTEEN_BIT and Nk >= 49 and backend != "torch" else None


def interpreted(backend, dtype, N):
    """Triton's interpreter takes 40 ms a tile: short sequences, and 16 bits as smoke cases.

    So does the emulator of the CUDA kernels (test_attention_cuda.py has more of its shapes).
    """
    return backend in SLOW and (N > 257 or (dtype != FP32 and N != 50))


def too_long(backend, N, D):
    return backend == "cuda" and N > 65 and (N, D) != (197, 64)


SELF_ATTENTION = [
    *((backend, N, 64, dtype) for backend in BACKENDS for N in LENGTHS for dtype in DTYPE_IDS),
    *(
        (backend, N, D, dtype)
        for backend in BACKENDS
        for N, D in itertools.product((50, 197), HEAD_DIMS)
        for dtype in DTYPE_IDS
        if D != 64
    ),
]
SELF_ATTENTION = [
    pytest.param(*case, id=f"{case[0]}-N{case[1]}-D{case[2]}-{DTYPE_IDS[case[3]]}")
    for case in SELF_ATTENTION
    if not interpreted(case[0], case[3], case[1]) and not too_long(*case[:3])
]


@pytest.mark.parametrize(("backend", "N", "D", "dtype"), SELF_ATTENTION)
def test_self_attention(backend, N, D, dtype):
    B, H = (1, 1) if backend in SLOW else batch_and_heads(N)
    problem = attention_problem(B, N, H, D, dtype)
    check(problem, backend, shape_class=f"N{N} D{D}", rmse_factor=factor(backend, dtype, N))


@pytest.mark.parametrize(("backend", "N", "D", "dtype"), SELF_ATTENTION)
def test_packed(backend, N, D, dtype):
    B, H = (1, 1) if backend in SLOW else batch_and_heads(N)
    problem = packed_problem(B, N, H, D, dtype)
    check(problem, backend, shape_class=f"N{N} D{D}", rmse_factor=factor(backend, dtype, N))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=DTYPE_IDS.get)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in SLOW])
def test_four_thousand_tokens(backend, dtype):
    problem = attention_problem(1, 4097, 1, 32, dtype)
    check(problem, backend, shape_class="N4097 D32", rmse_factor=factor(backend, dtype, 4097))


@each_dtype
@pytest.mark.parametrize("D", [1, 3, 8, 20, 104, 112, 120, 127, 256])
@each_backend
def test_odd_head_dims(backend, D, dtype):
    if interpreted(backend, dtype, 33):
        dtype = FP32
    B, H = (1, 1) if backend in SLOW else (2, 2)
    check(attention_problem(B, 33, H, D, dtype), backend, shape_class=f"N33 D{D}")


@each_dtype
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 197), (197, 1), (50, 65), (65, 50), (7, 300), (2, 1)])
@each_backend
def test_cross_attention(backend, Nq, Nk, dtype):
    if interpreted(backend, dtype, Nq):
        dtype = FP32
    B, H = (1, 1) if backend in SLOW else (2, 3)
    problem = attention_problem(B, Nq, H, 64, dtype, Nk=Nk)
    check(problem, backend, shape_class=f"Nq{Nq} Nk{Nk} D64")


# ---- Bias and masks

BIAS_SHAPES = [
    *itertools.product((1, 2), (1, 3), (1, 17), (1, 21)),
    (3, 17, 21),
    (1, 17, 1),
    (17, 21),
    (21,),
    (1,),
]


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
@each_backend
def test_every_broadcast_of_the_bias(backend, shape):
    problem = attention_problem(2, 17, 3, 16, Nk=21, bias=shape)
    # Softmax does not see a bias that is the same for all keys: its gradient is 0, and what comes
    # out is the rounding of a sum of up to 2142 terms.
    slack = 4.0 if shape[-1] == 1 else 1.0
    check(problem, backend, shape_class=f"Nq17 Nk21 D16 bias {shape}", slack=slack)


@pytest.mark.parametrize("bias_dtype", DTYPE_IDS, ids=lambda d: "bias_" + DTYPE_IDS[d])
@each_dtype
@each_backend
def test_dtype_of_the_bias(backend, dtype, bias_dtype):
    for make, shape_class in ((attention_problem, "N50 D32"), (packed_problem, "N50 D32")):
        B, H = (1, 1) if backend in SLOW else (2, 3)
        problem = make(B, 50, H, 32, dtype, bias=(1, H, 50, 50), bias_dtype=bias_dtype)
        check(problem, backend, shape_class=f"{shape_class} bias {DTYPE_IDS[bias_dtype]}")


@pytest.mark.parametrize(
    "shape", [(2, 3, 17, 21), (1, 1, 17, 21), (2, 1, 1, 21), (17, 21)], ids=str
)
@each_backend
def test_bool_bias(backend, shape):
    problem = attention_problem(2, 17, 3, 16, Nk=21, bool_bias=shape)
    check(problem, backend, shape_class=f"Nq17 Nk21 D16 bool {shape}")


@pytest.mark.parametrize("with_bias", [None, (1, 3, 17, 21), (2, 3, 17, 21)], ids=str)
@each_backend
def test_key_padding_mask(backend, with_bias):
    mask = torch.zeros(2, 21, dtype=torch.bool)
    mask[0, 15:], mask[1, ::3] = True, True
    problem = attention_problem(2, 17, 3, 16, Nk=21, key_padding_mask=mask, bias=with_bias)
    check(problem, backend, shape_class=f"Nq17 Nk21 D16 padding, bias {with_bias}")


@each_dtype
@pytest.mark.parametrize("kind", ["padding", "bool", "float"])
@each_backend
def test_fully_masked_rows(backend, kind, dtype):
    """Output 0, and no gradient comes out: from one batch item, or from one query."""
    if backend in SLOW and dtype != FP32:
        dtype = FP32
    masks = {}
    if kind == "padding":
        masks["key_padding_mask"] = torch.tensor([[False] * 21, [True] * 21])
    if kind == "bool":
        masks["bool_bias"] = torch.ones(2, 1, 17, 21, dtype=torch.bool)
        masks["bool_bias"][1, :, 4] = False
    problem = attention_problem(2, 17, 3, 16, dtype, Nk=21, **masks)
    if kind == "float":
        problem = attention_problem(2, 17, 3, 16, dtype, Nk=21, bias=(2, 1, 17, 21))
        problem.inputs["bias"][1, :, 4] = -torch.inf
        problem.inputs["bias"][0, :, :, 20] = -torch.inf
    out = problem.ours(backend)(*problem.inputs.values())
    rows = out[1] if kind == "padding" else out[1, 4]
    assert not rows.any() and out[0].any()
    check(problem, backend, shape_class=f"Nq17 Nk21 D16 fully masked by {kind}")


@pytest.mark.parametrize("make", [attention_problem, packed_problem], ids=["attention", "packed"])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1.0},
        {"scale": -0.3},
        {"scale": 0.0},
        {"dropout_p": 0.2},
        {"dropout_p": 0.5, "bias": (1, 1, 33, 33)},
        {"dropout_p": 0.2, "bool_bias": (2, 1, 33, 33), "scale": 0.5},
        {"dropout_p": 0.2, "key_padding_mask": (2, 33), "bias": (2, 2, 33, 33)},
        {"key_padding_mask": (2, 33), "bool_bias": (1, 2, 33, 33)},
    ],
    ids=str,
)
@each_dtype
@each_backend
def test_options(backend, dtype, options, make):
    if backend == "triton" or options.get("scale") == 0.0:  # equal rows have equal roundings
        dtype = FP32
    problem = make(2, 33, 2, 32, dtype, **options)
    check(problem, backend, shape_class=f"N33 D32 {sorted(options.items())}")


# ---- The pictures


@pytest.mark.parametrize("rows", [None, 0, -1, [0, 5, 3], slice(1, 4)], ids=str)
def test_attention_weights_times_v_is_attention(rows):
    problem = attention_problem(2, 17, 3, 16, torch.float64, Nk=21, bias=(1, 3, 17, 21))
    q, k, v, bias = problem.inputs.values()
    weights = attention_weights(q, k, bias=bias, rows=rows)
    index = [rows] if isinstance(rows, int) else slice(None) if rows is None else rows
    expected = problem.truth()(q, k, v, bias)[:, index]
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", weights, v), expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    cases.record("attention_weights", "torch", torch.float64, f"rows {rows}")


@each_dtype
def test_attention_weights_are_fp32_inside(dtype):
    problem = attention_problem(2, 17, 3, 16, dtype)
    q, k, _ = problem.inputs.values()
    weights = attention_weights(q, k, rows=0)
    assert weights.dtype == FP32 and weights.shape == (2, 3, 1, 17)
    exact = attention_weights(q.double(), k.double(), rows=0)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=1e-6)
    cases.record("attention_weights", "torch", dtype, "class token")
