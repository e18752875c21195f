"""window_attention: special values, determinism, dropout."""

import math

import pytest
import torch
from problems import DTYPE_IDS, backend_and_dtype, check, output_gradients, philox_keep_mask
from window_attention_problems import (
    relative_position_index,
    shift_mask,
    small_windows,
    window_problem,
)

from vitkernels import testing
from vitkernels.ops import window_attention
from vitkernels.testing import assert_bitwise_equal, available_for, grads_of, same_specials

BACKENDS = available_for("window_attention", D=32, N=49)
KERNELS = [name for name in BACKENDS if name not in ("torch", "reference")]
FP32, BF16, FP16 = DTYPE_IDS
NAN, INF = math.nan, math.inf

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", KERNELS)
each_pair = backend_and_dtype(BACKENDS, DTYPE_IDS)
each_kernel_pair = backend_and_dtype(KERNELS, DTYPE_IDS)
COSINE = pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])


def run(problem, backend):
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = testing.as_tuple(problem.ours(backend)(*tensors))
    return grads_of(problem.ours(backend), tensors, output_gradients(problem, outputs))


def assert_same_specials(problem, backend, names):
    ours, expected = sum(run(problem, backend), ()), sum(run(problem, "reference"), ())
    for name, mine, theirs in zip(names, ours, expected, strict=False):
        difference = same_specials(mine, theirs, name)
        assert not difference, difference


# ---- Special values


@COSINE
@pytest.mark.parametrize("place", [(0, 0, 0), (-1, -1, -1), (0, 2, 4)], ids=["first", "last", "in"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
@each_kernel_pair
def test_nan_spreads_as_in_the_reference(backend, part, place, dtype, cosine):
    """Through one window and one head; the mask keeps a NaN key, not a NaN value, from others."""
    if backend == "triton" and place != (0, 2, 4):
        return
    problem = small_windows(backend, dtype=dtype, cosine=cosine)
    C = problem.inputs["qkv"].shape[-1] // 3
    problem.inputs["qkv"][(*place, "qkv".index(part) * C + 3)] = NAN
    names = ("out", "dqkv", "dbias_table", "dlogit_scale")[: 4 if cosine else 3]
    assert_same_specials(problem, backend, names)
    out = problem.ours(backend)(*problem.inputs.values())
    assert 0 < out.isnan().sum() <= 6 * 16, "not beyond the six tokens of its head"


@pytest.mark.parametrize("value", [INF, -INF], ids=str)
@pytest.mark.parametrize("part", ["q", "k", "v"])
@each_kernel_pair
def test_infinity_spreads_as_in_the_reference(backend, part, value, dtype):
    """Scores of -Inf are masked ones to the reference: only what it made of them is compared."""
    problem = small_windows(backend, dtype=dtype)
    C = problem.inputs["qkv"].shape[-1] // 3
    problem.inputs["qkv"][0, 1, 1, "qkv".index(part) * C + 3] = value
    assert_same_specials(problem, backend, ("out",))


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@each_kernel
def test_a_special_entry_of_the_table_reaches_its_pairs(backend, value):
    """The entry of one offset in one head: the rows that have that offset, in every window."""
    problem = small_windows(backend, shift=0)
    index = relative_position_index((2, 3))
    problem.inputs["bias_table"][index[4, 2], 1] = value
    out = problem.ours(backend)(*problem.inputs.values())
    rows = (index == index[4, 2]).any(-1)
    windows = out.unflatten(1, (-1, 2)).unflatten(3, (-1, 3)).transpose(2, 3).flatten(3, 4)
    windows = windows.unflatten(-1, (2, -1))  # (B, rows, columns, N, heads, D)
    assert windows[:, :, :, rows, 1].isnan().all()
    assert torch.isfinite(windows[..., 0, :]).all()
    assert torch.isfinite(windows[:, :, :, ~rows, 1]).all()
    assert_same_specials(problem, backend, ("out",))


@each_kernel
def test_minus_infinity_in_the_table_masks(backend):
    """As a model may: the offset is never attended to, and its gradients are finite."""
    problem = small_windows(backend, shift=0)
    index = relative_position_index((2, 3))
    problem.inputs["bias_table"][index[4, 2]] = -INF
    outputs, grads = run(problem, backend)
    assert all(torch.isfinite(t).all() for t in (*outputs, *grads))
    assert not grads[1][index[4, 2]].any()
    check(problem, backend, shape_class="window (2, 3) table -inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@each_backend
def test_a_special_logit_scale_stays_in_its_head(backend, value):
    """NaN spoils its head; Inf counts as ln 100, and -Inf as a factor of 0."""
    problem = small_windows(backend, cosine=True, heads=2)
    problem.inputs["logit_scale"][1] = value
    out = problem.ours(backend)(*problem.inputs.values()).unflatten(-1, (2, -1))
    assert torch.isfinite(out[..., 0, :]).all()
    assert out[..., 1, :].isnan().all() if value is NAN else torch.isfinite(out).all()


@pytest.mark.parametrize("magnitude", [1e-4, 30.0, 1e4], ids=str)
@COSINE
@each_pair
def test_vectors_of_any_size(backend, dtype, cosine, magnitude):
    """Scores from uniform to one-hot, to 1e4 and more; cosines do not see the length at all."""
    if backend == "triton" and magnitude < 1e4:
        return
    if dtype == FP16 and magnitude == 1e4:
        magnitude = 1e3  # eager's scores overflow beyond that
    problem = small_windows(backend, dtype=dtype, cosine=cosine, magnitude=magnitude)
    shape_class = f"window (2, 3) logits times {magnitude} cosine {cosine}"
    if dtype == FP32 or cosine or magnitude < 10:
        check(problem, backend, shape_class=shape_class)
    else:  # one-hot: eager's rounded scores take another maximum
        (out,), grads = run(problem, backend)
        assert all(torch.isfinite(t).all() for t in (out, *grads))
        assert out.abs().max() <= problem.inputs["qkv"][..., 64:].abs().max() * 1.01


@COSINE
@each_backend
def test_denormals(backend, cosine):
    problem = small_windows(backend, cosine=cosine)
    C = problem.inputs["qkv"].shape[-1] // 3
    problem.inputs["qkv"][..., : C // 2] *= 1e-39
    if cosine:  # too short to have a direction: divided by 1e-12, no gradient
        outputs, (dqkv, *_) = run(problem, backend)
        assert torch.isfinite(outputs[0]).all() and not dqkv[..., : C // 2].any()
    else:
        check(problem, backend, shape_class="window (2, 3) denormal")


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e-13, 1e-11, 1.0])
@each_backend
def test_short_vectors_under_cosines(backend, length):
    """Below 1e-12 a vector is divided by 1e-12 and gets no gradient; above it is a direction."""
    problem = small_windows(backend, cosine=True)
    C = problem.inputs["qkv"].shape[-1] // 3
    heads = problem.inputs["qkv"][..., : 2 * C].unflatten(-1, (8, -1))
    heads[0, 1, 1] *= length / heads[0, 1, 1].norm(dim=-1, keepdim=True)
    (out,), (dqkv, *_) = run(problem, backend)
    (exact,) = problem.truth()(*(t.double() for t in problem.inputs.values())).unsqueeze(0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(dqkv).all()
    assert (length > 1e-12) == dqkv[0, 1, 1, : 2 * C].any()


@each_pair
def test_zero_vectors_under_cosines(backend, dtype):
    """Keys of padded tokens in Swin V2, which has no bias of keys: score 0, and no NaN in fp16."""
    problem = small_windows(backend, dtype=dtype, cosine=True)
    C = problem.inputs["qkv"].shape[-1] // 3
    problem.inputs["qkv"][:, -1, :, : 2 * C] = 0.0
    (out,), (dqkv, dtable, dlogit_scale) = run(problem, backend)
    assert all(torch.isfinite(t).all() for t in (out, dqkv, dtable, dlogit_scale))
    assert not dqkv[:, -1, :, : 2 * C].any() and dqkv[:, :-1].any()
    exact = problem.truth()(*(t.double() for t in problem.inputs.values()))
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=max(eps, 1e-5), atol=max(eps, 1e-5))


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["largest", "lowest"])
@each_kernel_pair
def test_largest_finite_values(backend, dtype, sign):
    """The first and the last value of the map: no sum of its window overflows before the softmax
    has made a mean of it."""
    problem = small_windows(backend, dtype=dtype)
    C = problem.inputs["qkv"].shape[-1] // 3
    for place in ((0, 0, 0, 2 * C), (-1, -1, -1, -1)):
        problem.inputs["qkv"][place] = sign * torch.finfo(dtype).max
    out = problem.ours(backend)(*problem.inputs.values())
    assert torch.isfinite(out).all() and (sign * out).max() > 1e-3 * torch.finfo(dtype).max
    assert_same_specials(problem, backend, ("out",))


# ---- The same bits every time


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=DTYPE_IDS.get)
@COSINE
@each_kernel
def test_repeats_are_bitwise_equal(backend, dtype, cosine):
    repeats = 2 if backend == "triton" else 100
    problem = small_windows(backend, dtype=dtype, cosine=cosine, dropout_p=0.1)
    first = sum(run(problem, backend), ())
    for _ in range(repeats):
        assert_bitwise_equal(sum(run(problem, backend), ()), first)


@COSINE
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=DTYPE_IDS.get)
@pytest.mark.parametrize("window", [(2, 3), 7], ids=str)
@pytest.mark.parametrize("backend", [name for name in KERNELS if name != "triton"])
def test_threads_do_not_change_bits(backend, window, dtype, cosine):
    """Table gradients too: their sum over windows is cut without looking at the threads."""
    windows = (1, 2) if backend == "cuda" else (4, 5)
    problem = window_problem(window, 1, dtype, windows=windows, B=3, cosine=cosine)
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
@pytest.mark.parametrize("shift", [0, (1, 2)], ids=str)
@each_backend
def test_dropout_mask_is_philox(backend, p, shift):
    """With v the identity matrix and equal scores the output is the mask itself, by window."""
    N = 6
    problem = window_problem((2, 3), shift, B=2, windows=(2, 2), heads=3, D=N, dropout_p=p)
    qkv, table = problem.inputs.values()
    table.zero_()
    rolled = torch.zeros_like(qkv)
    identity = torch.eye(N).view(2, 3, N).repeat(2, 2, 3)  # of each window, for each head
    rolled[..., 2 * 3 * N :] = identity
    shift = problem.options["shift_size"]
    qkv.copy_(torch.roll(rolled, shift, (1, 2)))
    out = torch.roll(problem.ours(backend)(qkv, table), (-shift[0], -shift[1]), (1, 2))
    out = out.unflatten(2, (2, 3)).unflatten(1, (2, 2)).transpose(2, 3)
    out = out.reshape(2, 4, N, 3, N).transpose(2, 3)  # (B, windows, heads, N, N)
    expected = philox_keep_mask(problem.dropout_seed().item(), (2, 4, 3, N, N), p)
    if any(shift):
        expected &= ~shift_mask((4, 6), (2, 3), shift)[:, None]
    assert torch.equal(out != 0, expected)
    testing.cases.record("window_attention", backend, FP32, f"dropout {p} mask shift {shift}")


@each_backend
def test_dropout_follows_torch_manual_seed(backend):
    problem = small_windows(backend)
    qkv, table = problem.inputs.values()

    def call(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        options = {"window_size": (2, 3), "num_heads": 2, "dropout_p": 0.5}
        return window_attention(qkv, table, **options, backend=backend)

    first, second = call(1), call()
    assert not torch.equal(first, second), "the second call must draw another seed"
    assert_bitwise_equal(call(1), first)


def test_no_dropout_draws_nothing():
    before = torch.get_rng_state()
    problem = small_windows("reference")
    window_attention(*problem.inputs.values(), window_size=(2, 3), num_heads=2)
    assert torch.equal(torch.get_rng_state(), before)
