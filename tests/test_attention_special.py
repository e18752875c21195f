"""attention and attention_qkvpacked: special values, symmetries, dropout, determinism."""

import functools
import math

import pytest
import torch
from attention_problems import attention_problem, packed_problem
from problems import check, output_gradients, philox_keep_mask

from vitkernels import testing
from vitkernels.ops import attention, attention_weights
from vitkernels.testing import assert_bitwise_equal, available_for, grads_of, same_specials

BACKENDS = available_for("attention", D=64)
KERNELS = [name for name in BACKENDS if name not in ("torch", "reference")]
MAKERS = {"attention": attention_problem, "attention_qkvpacked": packed_problem}
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


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 17, 1, 23)], ids=["first", "last"])
@pytest.mark.parametrize("where", ["q", "v"])
@each_kernel
def test_specials_spread_as_in_the_reference(backend, where, place, value):
    """Through its query row or its value column, and not into other heads or batch items."""
    problem = attention_problem(2, 18, 2, 24)
    problem.inputs[where][place] = value
    ours, expected = run(problem, backend), run(problem, "reference")
    # Inf in q makes -Inf scores, which the reference takes as masked: compare only what it made.
    names = ("out",) if (where, value) == ("q", INF) else ("out", "dq", "dk", "dv")
    for name, mine, theirs in zip(names, sum(ours, ()), sum(expected, ()), strict=False):
        assert not same_specials(mine, theirs, name)


@each_kernel
def test_a_nan_key_spoils_its_head_only(backend):
    problem = attention_problem(2, 18, 2, 24)
    problem.inputs["k"][1, 5, 0, 3] = NAN
    (out,), grads = run(problem, backend)
    for tensor in (out, *grads):
        assert tensor[1, :, 0].isnan().all()
        assert torch.isfinite(tensor[0]).all() and torch.isfinite(tensor[1, :, 1]).all()


@pytest.mark.parametrize("what", ["k", "v"])
@each_kernel
def test_ignored_keys_are_finite_garbage(backend, what):
    """Whatever finite value a padded key holds, the bits of the result stay."""
    mask = torch.zeros(2, 18, dtype=torch.bool)
    mask[:, 15:] = True
    problem = attention_problem(2, 18, 2, 24, key_padding_mask=mask)
    expected, expected_grads = run(problem, backend)
    problem.inputs[what][:, 15:] = 1e30
    mine, grads = run(problem, backend)
    assert_bitwise_equal(mine, expected)
    assert_bitwise_equal(grads[0], expected_grads[0])
    assert not grads[1][:, 15:].any() and not grads[2][:, 15:].any()


@pytest.mark.parametrize("magnitude", [1e-4, 30.0, 3e3, 1e4], ids=str)
@each_op
@each_backend
def test_logits_of_any_size(backend, op, magnitude):
    """Rows from uniform to one-hot: exp neither overflows nor loses the small ones."""
    problem = MAKERS[op](1, 33, 2, 32)
    first = next(iter(problem.inputs.values()))
    first[..., : 32 if op == "attention" else 64] *= magnitude
    # A logit of size L carries an error of L eps into its probability.
    shape_class = f"N33 D32 logits times {magnitude}"
    check(problem, backend, shape_class=shape_class, slack=max(1.0, 5 * magnitude))


@pytest.mark.parametrize("value", [1e4, -1e4, 80.0], ids=str)
@each_backend
def test_a_large_constant_in_the_bias(backend, value):
    problem = attention_problem(1, 18, 2, 24, bias=(1, 2, 18, 18))
    problem.inputs["bias"] += value
    check(problem, backend, shape_class=f"N18 D24 bias + {value}", slack=abs(value))


@pytest.mark.parametrize("low", [-1e9, -1e30], ids=str)
@each_backend
def test_a_row_of_large_negative_biases_is_a_softmax(backend, low):
    """What masks of -1e9 make of a row without a key: a log-sum-exp has no digits for log(Nk)."""
    problem = attention_problem(1, 18, 2, 24)
    problem.inputs["q"][:, 4] = 0.0  # at -1e9 the scores, too, are lost or not by rounding
    bias = torch.zeros(18, 18)
    bias[4] = low
    out = attention(*problem.inputs.values(), bias=bias, backend=backend)
    mean = problem.inputs["v"].mean(1)
    torch.testing.assert_close(out[:, 4], mean, rtol=1e-5, atol=1e-6)


def test_the_reference_differentiates_a_row_of_large_negative_biases():
    problem = attention_problem(1, 18, 2, 24)
    bias = torch.zeros(18, 18)
    bias[4] = -1e30
    incoming = torch.zeros(1, 18, 2, 24)
    incoming[:, 4] = torch.randn(1, 2, 24)
    call = functools.partial(attention, bias=bias, backend="reference")
    _, (_, _, dv) = grads_of(call, problem.inputs.values(), [incoming])
    expected = (incoming[:, 4] / 18)[:, None].expand_as(dv)
    torch.testing.assert_close(dv, expected, rtol=1e-5, atol=1e-6)
    weights = attention_weights(problem.inputs["q"], problem.inputs["k"], bias=bias)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 18), rtol=1e-5, atol=1e-6)


@each_backend
def test_equal_logits_average_the_values(backend):
    problem = attention_problem(2, 18, 2, 24)
    problem.inputs["q"].zero_()
    out = problem.ours(backend)(*problem.inputs.values())
    mean = problem.inputs["v"].mean(1, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean, rtol=1e-5, atol=1e-6)


@each_backend
def test_one_token_passes_through(backend):
    """Softmax of one score is 1."""
    problem = attention_problem(3, 1, 2, 24)
    (out,), (dq, dk, _) = run(problem, backend)
    torch.testing.assert_close(out, problem.inputs["v"], rtol=3e-7, atol=0)
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5


@each_backend
def test_denormals(backend):
    problem = attention_problem(1, 18, 2, 24)
    problem.inputs["q"] *= 1e-39
    problem.inputs["k"] *= 1e-20
    check(problem, backend, shape_class="N18 D24 denormal")


# ---- Symmetries


@each_op
@each_kernel
def test_a_split_batch_gives_the_same_bits(backend, op):
    problem = MAKERS[op](3, 33, 2, 32)
    tensors = list(problem.inputs.values())
    whole, whole_grads = grads_of(problem.ours(backend), tensors)
    for part in (slice(0, 1), slice(1, 3)):
        outputs, grads = grads_of(problem.ours(backend), [t[part] for t in tensors])
        assert_bitwise_equal(outputs, [t[part] for t in whole])
        assert_bitwise_equal(grads, [g[part] for g in whole_grads])


@each_kernel
def test_permuting_batch_and_heads_permutes_the_results(backend):
    problem = attention_problem(3, 33, 4, 32)
    tensors = list(problem.inputs.values())
    batch, heads = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    plain = sum(grads_of(problem.ours(backend), tensors), ())
    shuffled = sum(grads_of(problem.ours(backend), [t[batch][:, :, heads] for t in tensors]), ())
    assert_bitwise_equal(shuffled, [t[batch][:, :, heads] for t in plain])


@each_backend
def test_permuting_the_keys_changes_nothing(backend):
    problem = attention_problem(2, 18, 2, 24, Nk=37)
    q, k, v = problem.inputs.values()
    order = torch.randperm(37)
    out = problem.ours(backend)(q, k, v)
    torch.testing.assert_close(problem.ours(backend)(q, k[:, order], v[:, order]), out)


@each_backend
def test_a_constant_added_to_the_logits_changes_nothing(backend):
    problem = attention_problem(2, 18, 2, 24, bias=(2, 2, 18, 18))
    out = problem.ours(backend)(*problem.inputs.values())
    problem.inputs["bias"] = problem.inputs["bias"] + torch.randn(2, 2, 18, 1)
    shifted = problem.ours(backend)(*problem.inputs.values())
    torch.testing.assert_close(shifted, out, rtol=1e-5, atol=1e-5)


@each_backend
def test_masking_keys_is_dropping_them(backend):
    """By padding mask, by bool bias and by -inf: the same as a shorter sequence."""
    problem = attention_problem(2, 18, 2, 24, Nk=37)
    q, k, v = problem.inputs.values()
    short = problem.ours(backend)(q, k[:, :29], v[:, :29])
    ignored = torch.arange(37).expand(2, 37) >= 29
    masks = (
        {"key_padding_mask": ignored},
        {"bias": ~ignored[:, None, None]},
        {"bias": torch.zeros(2, 1, 1, 37).masked_fill(ignored[:, None, None], -INF)},
    )
    for mask in masks:
        out = attention(q, k, v, **mask, backend=backend)
        torch.testing.assert_close(out, short, rtol=1e-5, atol=1e-6)


# ---- The same bits every time


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_op
@each_kernel
def test_repeats_are_bitwise_equal(backend, op, dtype):
    repeats, N = (100, 50) if backend == "cpu" else (3, 18)
    problem = MAKERS[op](2, N, 2, 32, dtype, bias=(1, 2, N, N), dropout_p=0.1)
    first = run(problem, backend)
    for _ in range(repeats):
        assert_bitwise_equal(sum(run(problem, backend), ()), sum(first, ()))


@each_op
@each_kernel
def test_threads_do_not_change_bits(backend, op):
    B, N = (3, 197) if backend == "cpu" else (1, 18)
    problem = MAKERS[op](B, N, 2, 32, torch.bfloat16, bias=(1, 2, N, N))
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
    """With v the identity matrix and equal logits the output is the mask itself."""
    B, N, H = 2, 13, 3
    problem = attention_problem(B, N, H, N, dropout_p=p)
    problem.inputs["q"].zero_()
    problem.inputs["v"] = torch.eye(N)[None, :, None].expand(B, N, H, N).clone()
    out = problem.ours(backend)(*problem.inputs.values())
    expected = philox_keep_mask(problem.dropout_seed().item(), (B, H, N, N), p)
    assert torch.equal(out.transpose(1, 2) != 0, expected)
    testing.cases.record("attention", backend, torch.float32, f"N13 dropout {p} mask")


@each_backend
def test_dropout_follows_torch_manual_seed(backend):
    problem = attention_problem(2, 18, 2, 24)
    tensors = list(problem.inputs.values())

    def call(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return attention(*tensors, dropout_p=0.5, backend=backend)

    first, second = call(1), call()
    assert not torch.equal(first, second), "the second call must draw another seed"
    assert_bitwise_equal(call(1), first)


def test_no_dropout_draws_nothing():
    before = torch.get_rng_state()
    attention(*attention_problem(1, 3, 1, 8).inputs.values())
    assert torch.equal(torch.get_rng_state(), before)
