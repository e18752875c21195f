"""patch_embed: special values, symmetries, determinism."""

import math

import pytest
import torch
from patch_embed_problems import MEAN, STD, UINT8, patch_embed_problem
from problems import DTYPE_IDS, INPUT_DTYPE_IDS, backend_and_dtype, check, output_gradients

from vitkernels import testing
from vitkernels.ops import patch_embed
from vitkernels.testing import assert_bitwise_equal, available_for, grads_of, same_specials

BACKENDS = available_for("patch_embed")
KERNELS = [name for name in BACKENDS if name not in ("torch", "reference")]
NAN, INF = math.nan, math.inf
FP32, BF16, FP16 = DTYPE_IDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", KERNELS)
IMAGES = (UINT8, FP32, BF16, FP16)


def small(backend, images=UINT8, dtype=FP32, grid=(3, 4), patch=4, D=24, **options):
    if backend == "triton":
        images, dtype = (images if images == UINT8 else FP32), FP32
    return patch_embed_problem(grid, patch, D, images, dtype, **options)


def run(problem, backend):
    tensors = list(problem.inputs.values())
    with torch.no_grad():
        outputs = testing.as_tuple(problem.ours(backend)(*tensors))
    return grads_of(problem.ours(backend), tensors, output_gradients(problem, outputs))


def assert_same_specials(problem, backend):
    names = [*problem.outputs, *(f"d{name}" for name in problem.inputs)]
    ours, expected = sum(run(problem, backend), ()), sum(run(problem, "reference"), ())
    for name, mine, theirs in zip(names, ours, expected, strict=True):
        if theirs is not None:
            assert not same_specials(mine, theirs, name)


# ---- Special values


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 2, 11, 15), (1, 1, 6, 3)], ids=str)
@backend_and_dtype(KERNELS, DTYPE_IDS)
def test_specials_in_the_image_spread_as_in_the_reference(backend, dtype, place, value):
    """Over one token, and over one element of each filter's gradient."""
    problem = small(backend, dtype, dtype)
    problem.inputs["images"][place] = value
    assert_same_specials(problem, backend)


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("where", ["weight", "bias", "pos_embed", "prefix_tokens"])
@pytest.mark.parametrize("images", (UINT8, FP32), ids=INPUT_DTYPE_IDS.get)
@each_kernel
def test_special_parameters(backend, images, where, value):
    """A filter's NaN fills its column of every token, a position's one number of each sample."""
    for dtype in (FP32, BF16):
        problem = small(backend, images if images == UINT8 else dtype, dtype)
        problem.inputs[where].view(-1)[-1] = value
        tokens = problem.ours(backend)(*problem.inputs.values())
        bad = ~torch.isfinite(tokens)
        expected = {
            "weight": bad[:, 1:, -1],
            "bias": bad[:, 1:, -1],
            "pos_embed": bad[:, -1, -1],
            "prefix_tokens": bad[:, 0, -1],
        }[where]
        assert expected.all() and bad.sum() == expected.numel()
        # The sign of Inf * (pixel - mean) is lost where the mean goes into a constant term.
        if where != "weight" or value is NAN or (images == FP32 and dtype == FP32):
            assert_same_specials(problem, backend)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001], ids=hex)
@pytest.mark.parametrize("where", ["images", "weight", "bias", "pos_embed", "prefix_tokens"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_every_nan_stays_one_when_rounded(backend, where, bits):
    """A payload of ones overflows into -0 where rounding to bf16 only adds to the bits."""
    problem = small(backend, FP32, autocast=BF16)
    problem.inputs[where].view(-1).view(torch.int32)[-1] = bits
    tokens = problem.ours(backend)(*problem.inputs.values())
    bad = {
        "images": tokens[-1, -1],
        "weight": tokens[:, 1:, -1],
        "bias": tokens[:, 1:, -1],
        "pos_embed": tokens[:, -1, -1],
        "prefix_tokens": tokens[:, 0, -1],
    }[where]
    assert bad.isnan().all() and tokens.isnan().sum() == bad.numel()


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20], ids=str)
@each_backend
def test_images_of_any_size(backend, scale):
    problem = small(backend, FP32, mean=None, std=None, bias=False, pos=None, prefix=None)
    problem.inputs["images"] *= scale
    check(problem, backend, shape_class=f"patch 4 D24 times {scale}")


@each_kernel
def test_largest_finite_values(backend):
    problem = small(backend, FP32, mean=None, std=None)
    problem.inputs["images"][1, 0, 5, 5] = torch.finfo(FP32).max
    problem.inputs["weight"][3:, 0, 1, 1] = 4.0
    problem.inputs["weight"][:3, 0, 1, 1] = 0.0
    assert_same_specials(problem, backend)


@each_backend
def test_fp16_overflow_gives_infinity(backend):
    problem = patch_embed_problem((3, 4), 4, 24, UINT8, FP16, std=1e-3)
    problem.inputs["images"][:, :, :4, :4] = 255
    problem.inputs["weight"][5] = 8.0
    tokens = problem.ours(backend)(*problem.inputs.values())
    assert torch.isposinf(tokens[:, 1, 5]).all() and not tokens.isnan().any()


# ---- Exactness


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=DTYPE_IDS.get)
@pytest.mark.parametrize("mean", (0.0, 0.5, 128 / 255, 1.0), ids=str)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("torch", "triton")])
def test_every_grey_level_is_exact(backend, mean, dtype):
    """Pixels enter the product as integers: one filter that picks one pixel returns it, rounded
    once, where normalising and rounding first would lose bits."""
    images = torch.arange(256, dtype=UINT8).view(1, 1, 16, 16)
    weight = torch.zeros(16, 1, 4, 4, dtype=dtype)
    weight.view(16, 16).fill_diagonal_(1.0)
    tokens = patch_embed(images, weight, mean=mean, std=0.25, backend=backend)
    pixels = tokens.unflatten(2, (4, 4)).unflatten(1, (4, 4)).transpose(2, 3).reshape(16, 16)
    exact = (images[0, 0].double() / 255 - mean) / 0.25
    ulps = (pixels.double() - exact).abs() / exact.abs().clamp(min=1e-2)
    assert (ulps <= 0.502 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("images", (UINT8, FP32, BF16), ids=INPUT_DTYPE_IDS.get)
@each_backend
def test_one_hot_filters_copy_pixels(backend, images):
    """Every pixel lands where it belongs, once: patches row-major, channels before rows."""
    Cin, ph, pw, rows, columns = 3, 4, 2, 3, 5
    K = Cin * ph * pw
    values = torch.arange(2 * Cin * rows * ph * columns * pw) % 251
    image = values.view(2, Cin, rows * ph, columns * pw)
    image = image.to(FP32 if backend == "triton" and images != UINT8 else images)
    weight = torch.eye(K).view(K, Cin, ph, pw)
    scale = 1 / 255 if images == UINT8 else None  # undoes the scaling of uint8 to [0, 1]
    tokens = patch_embed(image, weight, std=scale, backend=backend)
    patches = image.float().unfold(2, ph, ph).unfold(3, pw, pw)
    expected = patches.permute(0, 2, 3, 1, 4, 5).reshape(2, rows * columns, K)
    torch.testing.assert_close(tokens.float(), expected, rtol=1e-6, atol=1e-4)


# ---- Symmetries


@backend_and_dtype(KERNELS, IMAGES, "images")
def test_an_image_depends_on_nothing_but_the_image(backend, images):
    """Permuted and split batches give the same bits."""
    problem = small(backend, images, BF16 if images == BF16 else FP32, B=4)
    image, *parameters = problem.inputs.values()
    incoming = torch.randn(4, 13, 24)

    def run_on(order):
        tensors = [image[order], *parameters]
        (tokens,), (dimages, *_) = grads_of(problem.ours(backend), tensors, [incoming[order]])
        return tokens, dimages

    tokens, dimages = run_on([0, 1, 2, 3])
    for order in ([3, 0, 2, 1], [2], [0, 1, 3]):
        mine, mine_grad = run_on(order)
        assert_bitwise_equal(mine, tokens[order])
        if dimages is not None:
            assert_bitwise_equal(mine_grad, dimages[order])


@backend_and_dtype(BACKENDS, IMAGES, "images")
def test_gradients_of_a_split_batch_add_up(backend, images):
    problem = small(backend, images, B=5)
    image, *parameters = problem.inputs.values()
    call = problem.ours(backend)
    whole = grads_of(call, [image, *parameters])[1][1:]
    pieces = [grads_of(call, [image[p], *parameters])[1][1:] for p in (slice(2), slice(2, 5))]
    low = BF16 if images in (BF16, FP16) else FP32
    tolerance = 2e-5 if low == FP32 else 2e-2
    for mine, first, second in zip(whole, *pieces, strict=True):
        torch.testing.assert_close(mine, first + second, rtol=tolerance, atol=tolerance)


@each_backend
def test_a_constant_position_is_a_bias(backend):
    """Of the patches; and the position of the prefix tokens is added to them."""
    image, weight, bias, pos, prefix = small(backend, prefix=2).inputs.values()
    options = {"mean": MEAN, "std": STD, "backend": backend}
    constant = torch.randn(24)
    mine = patch_embed(
        image, weight, bias, pos_embed=constant.expand(1, 14, 24), prefix_tokens=prefix, **options
    )
    expected = patch_embed(
        image, weight, bias + constant, prefix_tokens=prefix + constant, **options
    )
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    bare = patch_embed(image, weight, bias, **options)
    with_position = patch_embed(image, weight, bias, pos_embed=pos[:, 2:], **options)
    torch.testing.assert_close(with_position - pos[:, 2:], bare, rtol=1e-5, atol=1e-5)


@each_backend
def test_prefix_tokens_go_through_untouched(backend):
    problem = small(backend, prefix=5, pos="patches")
    tokens = problem.ours(backend)(*problem.inputs.values())
    for sample in tokens:
        assert_bitwise_equal(sample[:5], problem.inputs["prefix_tokens"][0])


@pytest.mark.parametrize("std", (STD, 0.5, 1e-3), ids=str)
@each_backend
def test_uint8_is_the_float_image_normalised(backend, std):
    """By ToTensor and Normalize, and by the operator itself from the image in [0, 1]."""
    problem = small(backend, mean=MEAN, std=std)
    image, *parameters = problem.inputs.values()
    names = list(problem.inputs)[1:]
    named = dict(zip(names, parameters, strict=True))
    tokens = problem.ours(backend)(image, *parameters)
    scaled = image.float() / 255
    mean, spread = (torch.as_tensor(s).expand(3).view(3, 1, 1) for s in (MEAN, std))
    rest = {"backend": backend, **named}
    for other in (
        patch_embed(scaled, mean=MEAN, std=std, **rest),
        patch_embed((scaled - mean) / spread, **rest),
    ):
        limit = 1e-6 * tokens.abs().max().item()
        torch.testing.assert_close(other, tokens, rtol=1e-5, atol=max(limit, 3e-6))


@each_backend
def test_swapping_channels_swaps_nothing(backend):
    problem = small(backend)
    image, weight, *rest = problem.inputs.values()
    tokens = problem.ours(backend)(image, weight, *rest)
    swapped = problem.ours(backend, mean=MEAN[::-1], std=STD[::-1])
    mine = swapped(image.flip(1), weight.flip(1), *rest)
    torch.testing.assert_close(mine, tokens, rtol=1e-5, atol=1e-5)


# ---- The same bits every time


@pytest.mark.parametrize("images", ("uint8", "float"))
@backend_and_dtype(KERNELS, (FP32, BF16))
def test_repeats_are_bitwise_equal(backend, images, dtype):
    repeats, grid, D = (100, (7, 9), 96) if backend == "cpu" else (3, (3, 4), 24)
    problem = small(backend, UINT8 if images == "uint8" else dtype, dtype, grid, D=D)
    first = run(problem, backend)
    for _ in range(repeats):
        assert_bitwise_equal(sum(run(problem, backend), ()), sum(first, ()))


@pytest.mark.parametrize("images", ("uint8", "float"))
@backend_and_dtype(KERNELS, DTYPE_IDS)
def test_threads_do_not_change_bits(backend, images, dtype):
    grid, patch, D = ((14, 14), 8, 160) if backend == "cpu" else ((3, 4), 4, 24)
    images = UINT8 if images == "uint8" else dtype
    problem = small(backend, images, dtype, grid, patch, D, B=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(sum(run(problem, backend), ()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_bitwise_equal(other, results[0])
