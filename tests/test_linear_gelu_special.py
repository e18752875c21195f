"""linear_gelu and linear: special values, symmetries, determinism."""

import math

import pytest
import torch
from linear_gelu_problems import APPROXIMATIONS, linear_gelu_problem, linear_problem
from problems import DTYPE_IDS, backend_and_dtype, check, output_gradients

from vitkernels import testing
from vitkernels.ops import linear, linear_gelu
from vitkernels.testing import assert_bitwise_equal, available_for, grads_of, same_specials

BACKENDS = available_for("linear_gelu")
KERNELS = [name for name in BACKENDS if name not in ("torch", "reference")]
MAKERS = {"linear_gelu": linear_gelu_problem, "linear": linear_problem}
NAN, INF = math.nan, math.inf
FP32, BF16, FP16 = DTYPE_IDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", KERNELS)
each_op = pytest.mark.parametrize("op", MAKERS)
each_approximation = pytest.mark.parametrize("approximate", APPROXIMATIONS)


def dtype_for(backend, dtype):
    return FP32 if backend == "triton" else dtype


def run(problem, backend):
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = testing.as_tuple(problem.ours(backend)(*tensors))
    return grads_of(problem.ours(backend), tensors, output_gradients(problem, outputs))


def assert_same_specials(problem, backend):
    """As in float64: stock PyTorch's fp32 GELU makes NaN of +Inf on some CPUs."""
    names = [*problem.outputs, *(f"d{name}" for name in problem.inputs)]
    ours = sum(run(problem, backend), ())
    incoming = output_gradients(problem, ours[:1])
    exact = sum(grads_of(problem.truth(), problem.double().inputs.values(), incoming), ())
    for name, mine, theirs in zip(names, ours, exact, strict=True):
        assert not same_specials(mine, theirs, name)


# ---- Special values


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 16, 36)], ids=["first", "last"])
@each_op
@backend_and_dtype(KERNELS, DTYPE_IDS)
def test_specials_in_x_spread_as_they_should(backend, op, dtype, place, value):
    """Over their row of y and dx, over all of dweight, and nowhere else."""
    problem = MAKERS[op]((2, 17, 37), 41, dtype_for(backend, dtype))
    problem.inputs["x"][place] = value
    assert_same_specials(problem, backend)


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("where", ["weight", "bias"])
@each_op
@backend_and_dtype(KERNELS, DTYPE_IDS)
def test_special_parameters(backend, op, dtype, where, value):
    problem = MAKERS[op]((2, 17, 37), 41, dtype_for(backend, dtype))
    problem.inputs[where].view(-1)[-1] = value
    assert_same_specials(problem, backend)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("value", [INF, -INF], ids=str)
@each_kernel
def test_gelu_of_infinity(backend, approximate, value):
    """GELU(-Inf) is -Inf * 0 = NaN, as stock PyTorch has it."""
    problem = linear_gelu_problem((5, 8), 16, approximate=approximate)
    problem.inputs["bias"][3] = value
    assert_same_specials(problem, backend)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], ids=hex)
@pytest.mark.parametrize("where", ["x", "weight", "bias"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_every_nan_stays_one_when_rounded(backend, where, bits):
    """A payload of ones overflows into -0 where rounding to bf16 only adds to the bits."""
    problem = linear_gelu_problem((3, 37), 41, autocast=BF16)
    tensor = problem.inputs[where].view(-1)
    tensor.view(torch.int32)[5] = bits
    y = problem.ours(backend)(*problem.inputs.values())
    expected = {"x": (0, slice(None)), "weight": (slice(None), 0), "bias": (slice(None), 5)}[where]
    assert y[expected].isnan().all()
    assert y.isnan().sum() == y[expected].numel()


@pytest.mark.parametrize("scale", [1e2, 1e4], ids=str)
@each_approximation
@backend_and_dtype(BACKENDS, (FP32, BF16))
def test_large_preactivations(backend, approximate, dtype, scale):
    """GELU is then 0 or h, its derivative 0 or 1: no NaN from Inf * 0 or Inf / Inf."""
    problem = linear_gelu_problem(
        (2, 17, 37), 41, dtype_for(backend, dtype), approximate=approximate, magnitude=scale
    )
    shape_class = f"M34 K37 N41 {approximate} times {scale}"
    # Beside h = 0 an error of h eps moves the derivative by as much.
    check(problem, backend, shape_class=shape_class, slack=2.0)


@pytest.mark.parametrize("magnitude", [1e15, 1e30], ids=str)
@each_approximation
@each_kernel
def test_preactivations_whose_powers_overflow(backend, approximate, magnitude):
    problem = linear_gelu_problem((5, 8), 16, approximate=approximate, magnitude=magnitude)
    assert_same_specials(problem, backend)


@backend_and_dtype(KERNELS, DTYPE_IDS)
def test_largest_finite_values(backend, dtype):
    """Products overflow to Inf of both signs, where they do in the truth."""
    dtype = dtype_for(backend, dtype)
    problem = linear_problem((5, 4), 16, dtype)
    problem.inputs["x"][1] = 0.0
    problem.inputs["x"][1, 2] = torch.finfo(dtype).max
    problem.inputs["weight"].mul_(8.0)
    problem.inputs["weight"][3, 2] = 0.0
    assert_same_specials(problem, backend)


@each_backend
def test_fp16_overflow_gives_infinity(backend):
    """y overflows although the product, in fp32, does not."""
    problem = linear_problem((3, 64), 24, FP16)
    problem.inputs["x"][1], problem.inputs["weight"][5] = 200.0, 200.0
    y = problem.ours(backend)(*problem.inputs.values())
    assert torch.isposinf(y[1, 5]) and torch.isfinite(y[[0, 2]]).all()


@each_op
@each_backend
def test_denormals(backend, op):
    problem = MAKERS[op]((2, 9, 24), 40, magnitude=1e-38)
    check(problem, backend, shape_class="M18 K24 N40 denormal")


@each_op
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_zeros(backend, op, dtype):
    """No row: y is the bias's GELU. No column of the weight: neither."""
    problem = MAKERS[op]((2, 9, 24), 40, dtype_for(backend, dtype))
    problem.inputs["x"][0], problem.inputs["weight"][7] = 0.0, 0.0
    check(problem, backend, shape_class="M18 K24 N40 zeros")


# ---- Symmetries


def parts(problem, backend, pick):
    """Outputs and gradients of x, all of the problem's, for the samples that `pick` picks."""
    x, *parameters = problem.inputs.values()
    incoming = torch.randn(*x.shape[:-1], parameters[0].shape[0])
    (y,), (dx, *_) = grads_of(problem.ours(backend), [pick(x), *parameters], [pick(incoming)])
    return y, dx


@each_op
@backend_and_dtype([b for b in KERNELS if b != "triton"], DTYPE_IDS)
def test_a_row_depends_on_nothing_but_the_row(backend, op, dtype):
    """Permuted and split batches give the same bits, whatever tile a row comes to lie in.

    Not in the interpreter: its product of a tile is numpy's, which treats the last rows apart."""
    shape, N = ((5, 37, 96), 72) if backend == "cpu" else ((3, 11, 40), 24)
    problem = MAKERS[op](shape, N, dtype_for(backend, dtype))
    B = shape[0]

    def picked(pick):
        torch.manual_seed(3)
        return parts(problem, backend, pick)

    whole = picked(lambda t: t)
    for order in ([*range(B)][::-1], [0], [*range(1, B)]):
        mine = picked(lambda t, order=order: t[order])
        assert_bitwise_equal(mine, [t[order] for t in whole], f"samples {order}")


@each_op
@each_backend
def test_gradients_of_a_split_batch_add_up(backend, op):
    problem = MAKERS[op]((5, 13, 40), 24)
    tensors = list(problem.inputs.values())
    _, (_, *whole) = grads_of(problem.ours(backend), tensors)
    pieces = [
        grads_of(problem.ours(backend), [tensors[0][part], *tensors[1:]])[1][1:]
        for part in (slice(0, 2), slice(2, 5))
    ]
    for mine, first, second in zip(whole, *pieces, strict=True):
        torch.testing.assert_close(mine, first + second, rtol=1e-5, atol=1e-5)


@each_backend
def test_permuting_features_permutes_the_results(backend):
    """Of y with the rows of the weight, and not at all with both operands' columns."""
    x, weight, bias = linear_gelu_problem((33, 40), 24).inputs.values()
    y = linear_gelu(x, weight, bias, backend=backend)
    rows, columns = torch.randperm(24), torch.randperm(40)
    mine = linear_gelu(x, weight[rows], bias[rows], backend=backend)
    torch.testing.assert_close(mine, y[:, rows], rtol=1e-6, atol=1e-6)
    mine = linear_gelu(x[:, columns], weight[:, columns], bias, backend=backend)
    torch.testing.assert_close(mine, y, rtol=1e-5, atol=1e-5)


@each_backend
def test_powers_of_two_pass_through_linear(backend):
    """x, weight or both scaled by a power of two scale the product exactly."""
    x, weight, _ = linear_problem((33, 40), 24).inputs.values()
    y = linear(x, weight, backend=backend)
    assert torch.equal(linear(4 * x, weight, backend=backend), 4 * y)
    assert torch.equal(linear(x / 2, weight * 8, backend=backend), 4 * y)


@each_approximation
@each_backend
def test_gelu_of_linear_is_linear_gelu(backend, approximate):
    """In fp32, where storing h loses nothing."""
    x, weight, bias = linear_gelu_problem((33, 40), 24).inputs.values()
    h = linear(x, weight, bias, backend=backend)
    eye = torch.eye(24)
    chained = linear_gelu(h, eye, approximate=approximate, backend=backend)
    fused = linear_gelu(x, weight, bias, approximate=approximate, backend=backend)
    torch.testing.assert_close(fused, chained, rtol=1e-6, atol=1e-6)


@each_backend
def test_products_with_one_hot_rows_are_exact(backend):
    """y is a column of the weight: an element read twice, dropped or misplaced shows by itself."""
    K, N = 67, 45
    weight = torch.arange(N * K, dtype=FP32).reshape(N, K)
    for dtype in (FP32,) if backend == "triton" else (FP32, BF16):
        y = linear(torch.eye(K, dtype=dtype), (weight % 251).to(dtype), backend=backend)
        assert torch.equal(y.float(), (weight % 251).T)


# ---- The same bits every time


@each_op
@backend_and_dtype(KERNELS, (FP32, BF16))
def test_repeats_are_bitwise_equal(backend, op, dtype):
    repeats, shape = (100, (3, 67, 96)) if backend == "cpu" else (3, (3, 7, 40))
    problem = MAKERS[op](shape, 72, dtype_for(backend, dtype))
    first = run(problem, backend)
    for _ in range(repeats):
        assert_bitwise_equal(sum(run(problem, backend), ()), sum(first, ()))


@pytest.mark.parametrize("save", (True, False), ids=("saved", "recomputed"))
@backend_and_dtype(KERNELS, DTYPE_IDS)
def test_threads_do_not_change_bits(backend, dtype, save):
    shape, N = ((2, 197, 160), 224) if backend == "cpu" else ((3, 7, 40), 24)
    problem = linear_gelu_problem(shape, N, dtype_for(backend, dtype), save_preactivation=save)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(sum(run(problem, backend), ()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_bitwise_equal(other, results[0])
