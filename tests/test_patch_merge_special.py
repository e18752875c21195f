"""patch_merge_layer_norm: special values, symmetries, determinism, what raw calls refuse."""

import math

import pytest
import torch
from patch_merge_problems import patch_merge_problem
from problems import check, output_gradients

from vitkernels import testing
from vitkernels.testing import assert_bitwise_equal, available_for, grads_of, same_specials

BACKENDS = available_for("patch_merge_layer_norm")
KERNELS = [name for name in BACKENDS if name not in ("torch", "reference")]
NAN, INF = math.nan, math.inf

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", KERNELS)


def run(problem, backend):
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = testing.as_tuple(problem.ours(backend)(*tensors))
    return sum(grads_of(problem.ours(backend), tensors, output_gradients(problem, outputs)), ())


# ---- Special values


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(
    "place", [(0, 0, 0, 0), (1, 4, 3, 23), (1, 4, 2, 7), (0, 1, 2, 16)], ids=str
)
@each_kernel
def test_specials_spread_as_in_the_reference(backend, place, value):
    """One bad value spoils its row and the parameters' gradients, and nothing else; the last row of
    the map has zeros beside it."""
    problem = patch_merge_problem((2, 5, 4, 24))
    problem.inputs["x"][place] = value
    ours, expected = run(problem, backend), run(problem, "reference")
    names = ("y", "dx", "dweight", "dbias")
    for name, mine, theirs in zip(names, ours, expected, strict=True):
        assert not same_specials(mine, theirs, name)
    b, i, j = place[0], place[1] // 2, place[2] // 2
    clean = torch.ones(2, 3, 2, dtype=torch.bool)
    clean[b, i, j] = False
    assert torch.isfinite(ours[0][clean]).all() and not torch.isfinite(ours[0][b, i, j]).any()


@pytest.mark.parametrize("where", ["weight", "bias"])
@each_kernel
def test_special_parameters(backend, where):
    problem = patch_merge_problem((2, 5, 4, 24))
    problem.inputs[where][7] = NAN
    for mine, theirs in zip(run(problem, backend), run(problem, "reference"), strict=True):
        assert not same_specials(mine, theirs)


@pytest.mark.parametrize("dtype", testing.FLOATS, ids=str)
@each_backend
def test_constant_rows(backend, dtype):
    """No variance: y is the bias, and the gradients stay as small as eager's."""
    problem = patch_merge_problem((2, 4, 4, 32), dtype)
    problem.inputs["x"][0, :2] = 0.0
    problem.inputs["x"][1, 2:] = 1.25
    check(problem, backend, shape_class="4x4 C32 constant rows")


@each_backend
def test_denormals(backend):
    problem = patch_merge_problem((2, 4, 5, 24), eps=1e-12)
    problem.inputs["x"] *= 1e-39
    check(problem, backend, shape_class="4x5 C24 denormal")


@pytest.mark.parametrize("scale", [1e-4, 1e4, 1e15], ids=str)
@each_backend
def test_magnitudes(backend, scale):
    problem = patch_merge_problem((2, 4, 5, 24))
    problem.inputs["x"] *= scale
    check(problem, backend, shape_class=f"4x5 C24 times {scale}")


@each_kernel
def test_largest_finite_values(backend):
    """The variance overflows: whatever follows, it is where the reference has it."""
    problem = patch_merge_problem((2, 4, 4, 24))
    problem.inputs["x"][0, 1, 1] = torch.finfo(torch.float32).max / 128
    problem.inputs["x"][0, 1, 1, ::2] *= -1
    with torch.no_grad():
        mine, theirs = (problem.ours(b)(*problem.inputs.values()) for b in (backend, "reference"))
    assert not same_specials(mine, theirs)


# ---- Symmetries


@each_backend
def test_permuting_the_batch_permutes_the_result(backend):
    problem = patch_merge_problem((5, 3, 4, 24))
    order = torch.tensor([3, 0, 4, 1, 2])
    x, *parameters = problem.inputs.values()
    plain, shuffled = (problem.ours(backend)(t, *parameters) for t in (x, x[order]))
    assert_bitwise_equal(plain[order], shuffled)


@each_backend
def test_a_split_batch_gives_the_same_bits(backend):
    """A row's result depends on nothing but the row."""
    problem = patch_merge_problem((5, 6, 6, 96))
    x, *parameters = problem.inputs.values()
    (whole,), (dx, *_) = grads_of(problem.ours(backend), [x, *parameters])
    for part in (slice(0, 1), slice(1, 5)):
        (y,), (mine, *_) = grads_of(problem.ours(backend), [x[part], *parameters])
        assert_bitwise_equal((y, mine), (whole[part], dx[part]))


@each_backend
def test_padding_by_hand_changes_nothing(backend):
    """An odd map is the even one with zeros at its bottom and its right."""
    problem = patch_merge_problem((2, 5, 7, 24))
    x, *parameters = problem.inputs.values()
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 1))
    incoming = [torch.randn(2, 3, 4, 96)]
    odd, odd_grads = grads_of(problem.ours(backend), [x, *parameters], incoming)
    even, even_grads = grads_of(problem.ours(backend), [padded, *parameters], incoming)
    assert_bitwise_equal(odd, even)
    assert_bitwise_equal(odd_grads, (even_grads[0][:, :5, :7], *even_grads[1:]))


# ---- The same bits every time


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kernel
def test_repeats_are_bitwise_equal(backend, dtype):
    repeats, size = (100, (13, 16)) if backend == "cpu" else (5, (3, 4))
    problem = patch_merge_problem((2, *size, 48), dtype)
    first = run(problem, backend)
    for _ in range(repeats):
        assert_bitwise_equal(run(problem, backend), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kernel
def test_threads_do_not_change_bits(backend, dtype):
    size = (27, 26) if backend == "cpu" else (3, 4)
    problem = patch_merge_problem((3, *size, 48), dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(run(problem, backend))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_bitwise_equal(other, results[0])


# ---- Raw operators called directly, as exported graphs do

X, W = torch.randn(2, 3, 4, 6), torch.randn(24)
STAT, Y = torch.ones(2, 2, 2), torch.randn(2, 2, 2, 24)
FORWARD = {"x": X, "weight": W, "bias": W, "eps": 1e-5, "out_dtype": torch.float32}
BACKWARD = {"dy": Y, "x": X, "mean": STAT, "rstd": STAT, "weight": W, "bias": W,
            "output_mask": [True] * 3}  # fmt: skip
BAD_FORWARD = {
    "x of three dimensions": {"x": X[0]},
    "x of five dimensions": {"x": X[None]},
    "x without rows": {"x": X[:, :0]},
    "x without columns": {"x": X[:, :, :0]},
    "x without channels": {"x": X[..., :0], "weight": None, "bias": None},
    "bool x": {"x": X > 0},
    "float64 x": {"x": X.double()},
    "short weight": {"weight": W[:6]},
    "weight of two dimensions": {"weight": W.view(4, 6)},
    "int weight": {"weight": W.int()},
    "bias of one value": {"bias": W[:1]},
    "float64 bias": {"bias": W.double()},
    "bool out_dtype": {"out_dtype": torch.bool},
    "float64 out_dtype": {"out_dtype": torch.float64},
}
BAD_BACKWARD = {
    "dy of x's shape": {"dy": X},
    "dy of an even map": {"dy": Y[:, :1]},
    "dy of another batch": {"dy": Y[:1]},
    "dy of three dimensions": {"dy": Y.flatten(1, 2)},
    "int dy": {"dy": Y.int()},
    "x of another size": {"x": X[:, :2]},
    "x of three dimensions": {"x": X[0]},
    "float64 x": {"x": X.double()},
    "short mean": {"mean": STAT[:1]},
    "fp16 rstd": {"rstd": STAT.half()},
    "weight absent": {"weight": None},
    "bias absent": {"bias": None},
    "short weight": {"weight": W[:6]},
    "bias of one value": {"bias": W[:1]},
    "mask of two entries": {"output_mask": [True, True]},
}
RAW = [b for b in KERNELS if b != "cuda"]
V = torch.ops.vitkernels


@pytest.mark.parametrize("name", BAD_FORWARD)
@pytest.mark.parametrize("backend", RAW)
def test_forward_refuses(backend, name):
    call = getattr(V.patch_merge_layer_norm_fwd, backend)
    with pytest.raises((RuntimeError, ValueError), match=r"patch_merge_layer_norm_fwd: .* must "):
        call(*{**FORWARD, **BAD_FORWARD[name]}.values())


@pytest.mark.parametrize("name", BAD_BACKWARD)
@pytest.mark.parametrize("backend", RAW)
def test_backward_refuses(backend, name):
    call = getattr(V.patch_merge_layer_norm_bwd, backend)
    with pytest.raises((RuntimeError, ValueError), match=r"patch_merge_layer_norm_bwd: .* must "):
        call(*{**BACKWARD, **BAD_BACKWARD[name]}.values())


@pytest.mark.parametrize("backend", [b for b in RAW if b == "cpu"])
def test_a_refused_dtype_is_told_by_the_argument_that_has_it(backend):
    forward = getattr(V.patch_merge_layer_norm_fwd, backend)
    with pytest.raises(RuntimeError, match="patch_merge_layer_norm_fwd: out_dtype must be float32"):
        forward(*{**FORWARD, "out_dtype": torch.float64}.values())
    backward = getattr(V.patch_merge_layer_norm_bwd, backend)
    with pytest.raises(RuntimeError, match="patch_merge_layer_norm_bwd: bias must be float32"):
        backward(*{**BACKWARD, "bias": W.double()}.values())


@pytest.mark.parametrize("mask", [[i >> k & 1 == 1 for k in range(3)] for i in range(8)], ids=str)
@pytest.mark.parametrize("backend", RAW)
def test_every_output_mask(backend, mask):
    call = getattr(V.patch_merge_layer_norm_bwd, backend)
    full = call(*BACKWARD.values())
    some = call(*{**BACKWARD, "output_mask": mask}.values())
    assert [t is not None for t in some] == mask
    for mine, theirs in zip(some, full, strict=True):
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", RAW)
def test_strided_statistics_are_read_as_they_are(backend):
    call = getattr(V.patch_merge_layer_norm_bwd, backend)
    mean, rstd = torch.randn(2, 2, 2), torch.rand(2, 2, 2) + 0.5
    strided = {n: torch.stack((t, t + 9), -1)[..., 0] for n, t in (("mean", mean), ("rstd", rstd))}
    dense = call(*{**BACKWARD, "mean": mean, "rstd": rstd}.values())
    assert_bitwise_equal(call(*{**BACKWARD, **strided}.values()), dense)
