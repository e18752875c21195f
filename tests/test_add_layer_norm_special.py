"""add_layer_norm and layer_norm_add: special values, symmetries, dropout, determinism."""

import math

import pytest
import torch
from layer_norm_problems import layer_norm_add_problem, layer_norm_problem
from problems import check, output_gradients, philox_keep_mask

import vitkernels.ops
from vitkernels import testing
from vitkernels.testing import assert_bitwise_equal, available_for, grads_of, same_specials

BACKENDS = available_for("add_layer_norm")
KERNELS = [name for name in BACKENDS if name not in ("torch", "reference")]
MAKERS = {"add_layer_norm": layer_norm_problem, "layer_norm_add": layer_norm_add_problem}
NAN, INF = math.nan, math.inf

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", KERNELS)
each_op = pytest.mark.parametrize("op", MAKERS)


def run(problem, backend):
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = testing.as_tuple(problem.ours(backend)(*tensors))
    return grads_of(problem.ours(backend), tensors, output_gradients(problem, outputs))


# ---- Special values


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(
    "place", [(0, 0, 0), (1, 4, 39), (2, 2, 20)], ids=["first", "last", "dropped"]
)
@pytest.mark.parametrize("where", ["x", "residual"])
@each_op
@each_kernel
def test_specials_spread_as_in_the_reference(backend, op, where, place, value):
    """One bad value spoils its row and the parameters' gradients, and nothing else."""
    problem = MAKERS[op]((3, 5, 40))
    problem.inputs[where][place] = value
    ours, expected = run(problem, backend), run(problem, "reference")
    names = [*problem.outputs, *(f"d{name}" for name in problem.inputs)]
    sample_is_dropped = problem.options["row_scale"][place[0]] == 0
    for name, mine, theirs in zip(names, sum(ours, ()), sum(expected, ()), strict=True):
        if name == "dgamma" and sample_is_dropped:
            continue  # 0 * NaN, or skipped: both are fair
        assert not same_specials(mine, theirs, name)


@pytest.mark.parametrize("where", ["weight", "bias"])
@each_op
@each_kernel
def test_special_parameters(backend, op, where):
    problem = MAKERS[op]((3, 5, 40))
    problem.inputs[where][7] = NAN
    ours, expected = run(problem, backend), run(problem, "reference")
    for mine, theirs in zip(sum(ours, ()), sum(expected, ()), strict=True):
        assert not same_specials(mine, theirs)


@each_op
@each_backend
def test_a_dropped_sample_is_not_read(backend, op):
    """row_scale 0: the branch may hold NaN; the stream goes through, the branch gets 0."""
    problem = MAKERS[op]((3, 5, 40))
    dropped = problem.options["row_scale"] == 0
    assert dropped.any() and not dropped.all()
    if op == "add_layer_norm":
        problem.inputs["x"][dropped] = NAN
    outputs, grads = run(problem, backend)
    assert_bitwise_equal(outputs[-1][dropped], problem.inputs["residual"][dropped])
    assert not grads[0][dropped].any()
    assert all(torch.isfinite(t).all() for t in (*outputs, *grads))


@pytest.mark.parametrize("dtype", testing.FLOATS, ids=str)
@each_backend
def test_constant_rows(backend, dtype):
    """No variance: y is the bias, and the gradients stay as small as eager's."""
    problem = layer_norm_problem((3, 5, 128), dtype, gamma=False, row_scale=False)
    problem.inputs["x"][0], problem.inputs["residual"][0] = 0.0, 0.0
    problem.inputs["x"][1], problem.inputs["residual"][1] = 0.25, 1.0
    check(problem, backend, shape_class="C128 constant rows")


@pytest.mark.parametrize("dtype", testing.SIXTEEN_BIT, ids=str)
@each_backend
def test_constant_rows_that_round(backend, dtype):
    """The stored sum is not the sum that was normalised; the gradients must not see the gap."""
    problem = layer_norm_problem((3, 5, 128), dtype, gamma=False, row_scale=False)
    problem.inputs["x"][1], problem.inputs["residual"][1] = 0.3, 1.1
    check(problem, backend, shape_class="C128 constant rows, rounded")


@each_op
@each_backend
def test_denormals(backend, op):
    problem = MAKERS[op]((3, 5, 40), eps=1e-12)
    for name in ("x", "residual"):
        problem.inputs[name] *= 1e-39
    check(problem, backend, shape_class="C40 denormal")


@pytest.mark.parametrize("scale", [1e-4, 1e4, 1e15], ids=str)
@each_op
@each_backend
def test_magnitudes(backend, op, scale):
    problem = MAKERS[op]((3, 5, 96))
    for name in ("x", "residual"):
        problem.inputs[name] *= scale
    check(problem, backend, shape_class=f"C96 times {scale}")


@each_op
@each_kernel
def test_largest_finite_values(backend, op):
    """The variance overflows: whatever follows, it is where the reference has it."""
    problem = (
        MAKERS[op]((3, 5, 40), gamma=False) if op == "add_layer_norm" else MAKERS[op]((3, 5, 40))
    )
    # 40 columns of max / 64: no order of summation overflows, every square does.
    problem.inputs["x"][0, 1] = torch.finfo(torch.float32).max / 64
    problem.inputs["x"][0, 1, ::2] *= -1
    ours, expected = run(problem, backend)[0], run(problem, "reference")[0]
    for mine, theirs in zip(ours, expected, strict=True):
        assert not same_specials(mine, theirs)


@each_backend
def test_fp16_overflow_gives_infinity(backend):
    problem = layer_norm_problem((2, 3, 40), torch.float16, gamma=False, row_scale=False)
    problem.inputs["x"][0, 0], problem.inputs["residual"][0, 0] = 60000.0, 60000.0
    stream = problem.ours(backend)(*problem.inputs.values())[1]
    assert torch.isposinf(stream[0, 0]).all() and torch.isfinite(stream[1]).all()


# ---- Symmetries


@each_op
@each_backend
def test_permuting_the_batch_permutes_the_results(backend, op):
    problem = MAKERS[op]((5, 3, 40), row_scale=False)
    order = torch.tensor([3, 0, 4, 1, 2])
    tensors = list(problem.inputs.values())
    permuted = [t[order] if t.dim() == 3 else t for t in tensors]
    for plain, shuffled in zip(
        testing.as_tuple(problem.ours(backend)(*tensors)),
        testing.as_tuple(problem.ours(backend)(*permuted)),
        strict=True,
    ):
        assert_bitwise_equal(plain[order], shuffled)


@each_op
@each_backend
def test_a_split_batch_gives_the_same_bits(backend, op):
    """A row's result depends on nothing but the row."""
    problem = MAKERS[op]((5, 13, 384), row_scale=False)
    tensors = list(problem.inputs.values())
    whole, whole_grads = grads_of(problem.ours(backend), tensors)
    for part in (slice(0, 1), slice(1, 5)):
        pieces = [t[part] if t.dim() == 3 else t for t in tensors]
        outputs, grads = grads_of(problem.ours(backend), pieces)
        assert_bitwise_equal(outputs, [t[part] for t in whole])
        assert_bitwise_equal(grads[:2], [g[part] for g in whole_grads[:2]])


@each_backend
def test_adding_a_constant_to_a_row_changes_only_the_stream(backend):
    problem = layer_norm_problem((3, 5, 96), gamma=False, row_scale=False)
    y, _ = problem.ours(backend)(*problem.inputs.values())
    problem.inputs["residual"] = problem.inputs["residual"] + 2.0
    shifted, _ = problem.ours(backend)(*problem.inputs.values())
    torch.testing.assert_close(shifted, y, rtol=1e-5, atol=1e-5)


# ---- The same bits every time


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_op
@each_kernel
def test_repeats_are_bitwise_equal(backend, op, dtype):
    repeats = 100 if backend == "cpu" else 5
    problem = MAKERS[op]((3, 67, 96) if backend == "cpu" else (3, 7, 96), dtype)
    first = run(problem, backend)
    for _ in range(repeats):
        assert_bitwise_equal(sum(run(problem, backend), ()), sum(first, ()))


@each_op
@each_kernel
def test_threads_do_not_change_bits(backend, op):
    problem = MAKERS[op]((7, 97, 192) if backend == "cpu" else (3, 7, 96), torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(sum(run(problem, backend), ()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_bitwise_equal(other, results[0])


# ---- Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@each_backend
def test_dropout_mask_is_philox(backend, p):
    """Every backend keeps exactly what Philox4x32-10 of (seed, flat index) says."""
    problem = layer_norm_problem((3, 7, 40), gamma=False, row_scale=False, dropout_p=p)
    problem.inputs["x"] = torch.ones(3, 7, 40)
    problem.inputs["residual"] = torch.zeros(3, 7, 40)
    outputs, grads = run(problem, backend)
    expected = philox_keep_mask(problem.dropout_seed().item(), (3, 7, 40), p)
    assert torch.equal(outputs[1] != 0, expected)
    assert torch.equal(grads[0] != 0, expected)
    torch.testing.assert_close(outputs[1], expected / (1 - p), rtol=1e-6, atol=0)
    testing.cases.record("add_layer_norm", backend, torch.float32, f"C40 dropout {p} mask")


@each_backend
def test_dropout_follows_torch_manual_seed(backend):
    x, zeros = torch.ones(2, 50, 40), torch.zeros(2, 50, 40)

    def mask(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        stream = vitkernels.ops.add_layer_norm(
            x, zeros, None, None, dropout_p=0.25, backend=backend
        )[1]
        return stream != 0

    first, second = mask(1), mask()
    assert not torch.equal(first, second), "the second call must draw another seed"
    assert torch.equal(mask(1), first)
    for kept in (first, second):
        rate, sigma = kept.float().mean().item(), math.sqrt(0.25 * 0.75 / kept.numel())
        assert abs(rate - 0.75) < 5 * sigma


def test_no_dropout_draws_nothing():
    x = torch.ones(2, 5, 40)
    before = torch.get_rng_state()
    vitkernels.ops.add_layer_norm(x, x, None, None)
    assert torch.equal(torch.get_rng_state(), before)
