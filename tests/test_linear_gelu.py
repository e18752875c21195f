"""linear_gelu and linear: forward and every gradient against float64, every backend."""

import itertools

import pytest
import torch
from linear_gelu_problems import APPROXIMATIONS, linear_gelu_problem, linear_problem
from problems import DTYPE_IDS, backend_and_dtype, check

from vitkernels.testing import available_for

BACKENDS = available_for("linear_gelu")
FP32, BF16, FP16 = DTYPE_IDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_approximation = pytest.mark.parametrize("approximate", APPROXIMATIONS)


def dtype_for(backend, dtype):
    """tl.dot of 16-bit operands is wrong in the interpreter: its numbers are those of fp32."""
    return FP32 if backend == "triton" else dtype


# ---- Shapes: every number of rows with tails of every kind in K and N

ROWS = (1, 2, 3, 50, 197, 785)
# (K, N): ones, primes, odd numbers around vector widths, tile multiples, and their mixtures.
SIZES = (
    (1, 1), (1, 97), (7, 1), (17, 31), (33, 15), (96, 384), (97, 384), (384, 97), (192, 768),
    (768, 192), (384, 384), (129, 63),
)  # fmt: skip
SHAPES = [
    pytest.param(backend, M, K, N, dtype, id=f"{backend}-M{M}-K{K}-N{N}-{DTYPE_IDS[dtype]}")
    for backend, M, (K, N), dtype in itertools.product(BACKENDS, ROWS, SIZES, DTYPE_IDS)
    # The interpreter is slow and computes in fp32, the emulator is slow; stock fp16 products, too.
    if backend != "triton" or (dtype == FP32 and M in (3, 50) and M * K * N < 4e6)
    if backend != "cuda" or (4e6 if dtype == FP32 else 2e7) > M * K * N
    if dtype != FP16 or M * K * N < 4e6
]


def slack_of(M, K):
    """One number, or an outer product of a few, is no sample to take an RMSE or a mean of."""
    return 4.0 if K == 1 else 1.1 if M < 4 else 1.0


@pytest.mark.parametrize(("backend", "M", "K", "N", "dtype"), SHAPES)
def test_every_shape(backend, M, K, N, dtype):
    """GELU's kinds take turns over the shapes; the plain Linear has every shape too."""
    approximate = APPROXIMATIONS[(M + K + N) % 3]
    problem = linear_gelu_problem((M, K), N, dtype, approximate=approximate)
    shape_class = f"M{M} K{K} N{N} {approximate}"
    check(problem, backend, shape_class=shape_class, slack=slack_of(M, K))


LINEAR_SHAPES = [case for case in SHAPES if case.values[0] != "triton" or case.values[1] in (3, 50)]


@pytest.mark.parametrize(("backend", "M", "K", "N", "dtype"), LINEAR_SHAPES)
def test_linear_every_shape(backend, M, K, N, dtype):
    problem = linear_problem((M, K), N, dtype)
    check(problem, backend, shape_class=f"M{M} K{K} N{N}", slack=slack_of(M, K))


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=DTYPE_IDS.get)
@pytest.mark.parametrize(("K", "N"), [(768, 768), (384, 1536), (1536, 384)])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("triton", "cuda")])
def test_sizes_of_models(backend, K, N, dtype):
    """fc1 and fc2 of ViT-S, the projection of ViT-B: enough rows for every blocking."""
    check(linear_gelu_problem((2, 197, K), N, dtype), backend, shape_class=f"M394 K{K} N{N}")
    check(linear_problem((2, 197, K), N, dtype), backend, shape_class=f"M394 K{K} N{N}")


TAILS = [
    pytest.param(b, n, id=f"{b}-{n}")
    for b in BACKENDS
    for n in range(1, 36, {"cpu": 1, "triton": 17, "cuda": 6}.get(b, 2))
]


@pytest.mark.parametrize(("backend", "size"), TAILS)
def test_every_tail(backend, size):
    """Rows, K and N of every remainder of the blocks, together and against each other."""
    for M, K, N in {(size, size + 1, size), (36 - size, 40, size), (5, size, 36 - size)}:
        check(linear_gelu_problem((M, K), N), backend, shape_class=f"tails M{M} K{K} N{N}")
        if backend not in ("triton", "torch"):
            problem = linear_gelu_problem((M, K), N, BF16)
            check(problem, backend, shape_class=f"tails M{M} K{K} N{N}")


LEADING = {
    "one row": (),
    "rows": (5,),
    "tokens": (2, 9),
    "image": (2, 3, 4),
    "windows": (2, 2, 3, 2),
}


@pytest.mark.parametrize("op", (linear_gelu_problem, linear_problem), ids=("gelu", "linear"))
@pytest.mark.parametrize("leading", LEADING)
@each_backend
def test_leading_dimensions(backend, leading, op):
    problem = op((*LEADING[leading], 48), 40)
    check(problem, backend, shape_class=f"{leading} K48 N40")


# ---- Activations, bias, and what is kept for the backward


@pytest.mark.parametrize("save", (True, False), ids=("saved", "recomputed"))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@each_approximation
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_every_option(backend, approximate, bias, save, dtype):
    problem = linear_gelu_problem(
        (2, 35, 64), 72, dtype_for(backend, dtype), approximate=approximate, bias=bias,
        save_preactivation=save,
    )  # fmt: skip
    options = f"{approximate}, bias {bias}, saved {save}"
    check(problem, backend, shape_class=f"M70 K64 N72 {options}")


@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_linear_without_bias(backend, dtype):
    problem = linear_problem((2, 35, 64), 72, dtype_for(backend, dtype), bias=False)
    check(problem, backend, shape_class="M70 K64 N72 no bias")


SWEEP = ((-13.0, -5.5), (-5.5, -4.0), (-4.0, -2.5), (-2.5, -0.5), (-0.5, 0.5), (0.5, 4.0), (4, 99))


@pytest.mark.parametrize(("low", "high"), SWEEP)
@each_approximation
@backend_and_dtype(BACKENDS, (FP32, BF16))
def test_the_activation_alone(backend, approximate, low, high, dtype):
    """K = 1 and a weight of 1: GELU itself, piece by piece, so that S is that of the piece."""
    problem = linear_gelu_problem(
        (769, 1), 1, dtype_for(backend, dtype), approximate=approximate, bias=False
    )
    x, weight = problem.inputs["x"], problem.inputs["weight"]
    x.copy_(torch.linspace(low, high, 769)[:, None])
    weight.fill_(1.0)
    shape_class = f"{approximate} of [{low}, {high}]"
    check(problem, backend, shape_class=shape_class, wanted=("x",))


# ---- Dtypes: x, weight, bias

MIXED = {
    "bf16, fp32 parameters": (BF16, FP32, FP32),
    "fp16, fp32 parameters": (FP16, FP32, FP32),
    "bf16, fp32 bias": (BF16, BF16, FP32),
    "fp16, fp32 weight": (FP16, FP32, FP16),
    "fp32, bf16 parameters": (FP32, BF16, BF16),
    "fp32, fp16 weight": (FP32, FP16, FP32),
    "fp32, fp16 bias": (FP32, FP32, FP16),
    "bf16, fp16 parameters": (BF16, FP16, FP16),
    "fp16, bf16 weight, fp32 bias": (FP16, BF16, FP32),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_mixed_dtypes(backend, name):
    dtype, weight, bias = MIXED[name]
    mix = {"weight_dtype": weight, "bias_dtype": bias}
    for N in (96, 41):
        check(linear_gelu_problem((3, 35, 80), N, dtype, **mix), backend,
              shape_class=f"M105 K80 N{N} {name}")  # fmt: skip
        check(linear_problem((3, 35, 80), N, dtype, **mix), backend,
              shape_class=f"M105 K80 N{N} {name}")  # fmt: skip


@pytest.mark.parametrize("autocast", (BF16, FP16), ids=DTYPE_IDS.get)
@pytest.mark.parametrize("x_dtype", (FP32, BF16, FP16), ids=DTYPE_IDS.get)
@pytest.mark.parametrize("op", (linear_gelu_problem, linear_problem), ids=("gelu", "linear"))
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_autocast(backend, op, x_dtype, autocast):
    """y comes in the autocast dtype, gradients in their tensors' own."""
    problem = op((3, 35, 80), 72, x_dtype, weight_dtype=FP32, bias_dtype=FP32, autocast=autocast)
    y = problem.ours(backend)(*problem.inputs.values())
    assert y.dtype == autocast
    check(problem, backend, shape_class=f"M105 K80 N72 autocast {DTYPE_IDS[autocast]}")


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=DTYPE_IDS.get)
@each_backend
def test_sixteen_bit_smoke(backend, dtype):
    """Loads, casts and stores of 16 bits also where the interpreter can show no more."""
    for op in (linear_gelu_problem, linear_problem):
        check(op((2, 9, 24), 40, dtype), backend, shape_class="M18 K24 N40 smoke")


# ---- The specification itself


@pytest.mark.parametrize("op", (linear_gelu_problem, linear_problem), ids=("gelu", "linear"))
def test_eager_and_specification_agree_in_float64(op):
    """The yardstick and the truth were written apart; in float64 they are one function."""
    problem = op((4, 9, 40), 24, torch.float64)
    tensors = list(problem.inputs.values())
    torch.testing.assert_close(
        problem.truth()(*tensors), problem.base()(*tensors), rtol=1e-12, atol=1e-12
    )


@each_approximation
def test_the_derivative_of_the_specification(approximate):
    """Written out in the reference, and the same as autograd's."""
    from vitkernels.ops.linear_gelu import reference

    activation = reference.ACTIVATIONS[approximate]
    h = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(reference.activate(h, activation).sum(), h)
    mine = reference.derivative(h.detach(), activation)
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
