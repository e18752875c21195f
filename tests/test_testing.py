"""The error model itself: it accepts correct rounding and catches each kind of planted fault."""

import pytest
import torch

from vitkernels import testing
from vitkernels.testing import assert_close_to_truth, in_layout

HALF = pytest.mark.parametrize("dtype", testing.SIXTEEN_BIT, ids=("bf16", "fp16"))


def problem(dtype=torch.float32, n=8192):
    """A truth, base with the rounding errors of `dtype`, and a perfectly rounded result."""
    truth = torch.randn(n, dtype=torch.float64)
    base = (truth + torch.randn(n) * truth.abs() * torch.finfo(dtype).eps * 0.3).to(dtype)
    return truth.to(dtype), base, truth


@pytest.mark.parametrize("dtype", testing.FLOATS)
def test_correct_rounding_passes(dtype):
    for n in (1, 16, 100, 8192):
        assert_close_to_truth(*problem(dtype, n))


@HALF
def test_one_wrong_element_is_caught(dtype):
    ours, base, truth = problem(dtype)
    ours[77] += 0.25
    with pytest.raises(AssertionError, match=r"max error .* at \(77,\) ours"):
        assert_close_to_truth(ours, base, truth, what="y")


def test_fp32_computed_in_bf16_is_caught():
    ours, base, truth = problem()
    with pytest.raises(AssertionError, match="RMSE"):
        assert_close_to_truth(ours.bfloat16().float(), base, truth)


@HALF
def test_noise_of_one_ulp_is_caught(dtype):
    ours, base, truth = problem(dtype)
    noise = torch.randint(-1, 2, ours.shape) * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="RMSE"):
        assert_close_to_truth((ours * (1 + noise)).to(dtype), base, truth)


@HALF
def test_truncation_is_caught_even_beside_a_worse_base(dtype):
    _, base, truth = problem(dtype)
    towards_zero = torch.nextafter(truth.to(dtype), torch.zeros((), dtype=dtype))
    truncated = torch.where(
        truth.to(dtype).double().abs() > truth.abs(), towards_zero, truth.to(dtype)
    )
    with pytest.raises(AssertionError, match="truncated, not rounded"):
        assert_close_to_truth(truncated, base + torch.randn(8192) * 0.02, truth)
    assert_close_to_truth(truncated, base, truth, truncating_stores=True)


def test_exact_base_leaves_the_fp32_floor():
    zeros = torch.zeros(16)
    tiny = torch.full((16,), 1e-7)
    large = torch.ones(4)
    assert_close_to_truth((tiny, large), (zeros, large), (zeros, large))
    with pytest.raises(AssertionError):
        assert_close_to_truth((tiny * 100, large), (zeros, large), (zeros, large))


def test_a_missing_output_is_caught():
    ours, base, truth = problem()
    with pytest.raises(AssertionError, match=r"dx: ours is None"):
        assert_close_to_truth((None,), (base,), (truth,), what=("dx",))
    with pytest.raises(AssertionError, match="shapes"):
        assert_close_to_truth(ours[:-1], base, truth)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_specials_must_match(special):
    ours, base, truth = problem()
    for tensor in (ours, base, truth):
        tensor[5] = special
    assert_close_to_truth(ours, base, truth)
    ours[5] = 0
    with pytest.raises(AssertionError, match=r"differs at 1 of 8192 places, first at \(5,\)"):
        assert_close_to_truth(ours, base, truth)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4, 5)])
def test_layouts_keep_the_values(layout, shape):
    values = torch.randn(shape)
    laid = in_layout(values, layout)
    want = values[:1].expand(shape) if layout == "expanded" else values
    assert torch.equal(laid, want)
    if layout in ("sliced", "rows_sliced", "packed", "nan_border"):
        storage = torch.empty(0).set_(laid.untyped_storage())
        assert storage.isnan().sum() == storage.numel() - laid.numel() > 0


def test_layouts_are_what_they_are_called():
    values = torch.randn(4, 6, 8)
    assert in_layout(values, "transposed").stride() == (48, 1, 6)
    assert in_layout(values, "outer_transposed").stride() == (8, 32, 1)
    assert in_layout(values, "expanded").stride(0) == 0
    assert in_layout(values, "misaligned_3").data_ptr() % 16 == 12
    assert in_layout(values, "sliced").stride(-1) == 2


def test_writing_around_an_input_is_caught():
    x = in_layout(torch.randn(3, 4), "nan_border")
    with testing.unchanged(x):
        pass
    with pytest.raises(AssertionError, match="was written to"), testing.unchanged(x):
        torch.empty(0).set_(x.untyped_storage())[0] = 1.0


def test_grads_of_keeps_strides_and_marks_what_is_missing():
    x = in_layout(torch.randn(3, 4), "transposed")
    strides = []
    (out,), (dx, none, unused) = testing.grads_of(
        lambda a, flag, b: strides.append(a.stride()) or a * 2,
        (x, True, torch.randn(2)),
    )
    assert strides == [x.stride()] and torch.equal(out, 2 * x)
    assert torch.equal(dx, torch.full((3, 4), 2.0)) and none is None and unused is None


def test_bitwise_equality_sees_signed_zero_and_accepts_nan():
    nan = torch.tensor([float("nan"), 1.0])
    testing.assert_bitwise_equal(nan, nan.clone())
    with pytest.raises(AssertionError, match="1 of 2"):
        testing.assert_bitwise_equal(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))


def test_cases_are_counted_once():
    counter = testing.DistinctCases()
    for _ in range(2):
        counter.record("attention", "cpu", torch.bfloat16, (1, 2), "sliced")
    counter.merge([["attention", "triton", "fp32", "(1, 2)", "contiguous"]])
    assert counter.summary() == "2 distinct cases: attention cpu 1, triton 1"


def test_uninitialised_memory_is_poisoned(poisoned_memory):
    assert torch.empty(1000).isnan().all()
    assert torch.randn(3).new_empty(5, dtype=torch.bfloat16).isnan().all()
