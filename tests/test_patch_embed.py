"""patch_embed: forward and every gradient against float64, every backend."""

import itertools

import pytest
import torch
from patch_embed_problems import MEAN, STD, UINT8, patch_embed_problem
from problems import DTYPE_IDS, INPUT_DTYPE_IDS, backend_and_dtype, check

from vitkernels.testing import available_for

BACKENDS = available_for("patch_embed")
NOT_INTERPRETED = [b for b in BACKENDS if b != "triton"]
SLOW_BACKENDS = ("triton", "cuda")  # interpreted 10 s, emulated 5 s for 16 x 16 x 3 to 768
NOT_EMULATED = [b for b in NOT_INTERPRETED if b != "cuda"]  # whose models' sizes gpu_cases.py has
FP32, BF16, FP16 = DTYPE_IDS
IMAGES = (UINT8, FP32, BF16, FP16)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_images = pytest.mark.parametrize("images", IMAGES, ids=INPUT_DTYPE_IDS.get)


def precision_for(backend, images, dtype):
    """tl.dot of 16-bit operands is wrong in the interpreter: its numbers are those of fp32."""
    if backend != "triton":
        return images, dtype
    return (images if images == UINT8 else FP32), FP32


# ---- Shapes

PATCHES = (1, 2, 3, 4, 7, 8, 14, 16, 32, (4, 8), (16, 8), (3, 5), (14, 7), (1, 16), (32, 4))
CHANNELS = (1, 3, 4)
WIDTHS = (1, 3, 17, 32, 96, 97, 192, 384, 768)


@pytest.mark.parametrize("patch", PATCHES, ids=str)
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_every_patch_size(backend, patch, dtype):
    """On a grid that is no square, from uint8 and from float images."""
    for images in (UINT8, dtype):
        images, weights = precision_for(backend, images, dtype)
        problem = patch_embed_problem((2, 3), patch, 40, images, weights)
        check(problem, backend, shape_class=f"patch {patch} D40")


@pytest.mark.parametrize("Cin", (*CHANNELS, 2, 7))
@backend_and_dtype(BACKENDS, IMAGES, "images")
def test_every_number_of_channels(backend, Cin, images):
    for patch in (4, 16):
        own, dtype = precision_for(backend, images, BF16 if images == BF16 else FP32)
        problem = patch_embed_problem((3, 2), patch, 33, own, dtype, Cin=Cin)
        check(problem, backend, shape_class=f"patch {patch} Cin {Cin} D33")


@pytest.mark.parametrize("D", WIDTHS)
@backend_and_dtype(BACKENDS, DTYPE_IDS)
def test_every_width(backend, D, dtype):
    for patch in (4, 16) if backend not in SLOW_BACKENDS or D < 100 else (4,):
        images, weights = precision_for(backend, UINT8, dtype)
        problem = patch_embed_problem((3, 5), patch, D, images, weights)
        check(problem, backend, shape_class=f"patch {patch} D{D}")


GRIDS = ((1, 1), (1, 5), (5, 1), (1, 17), (3, 3), (7, 2), (4, 8), (9, 11), (14, 14))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@backend_and_dtype(BACKENDS, IMAGES, "images")
def test_every_grid(backend, grid, images):
    """H and W from one patch to a model's."""
    B = 1 if backend == "triton" else 3
    own, dtype = precision_for(backend, images, FP16 if images == FP16 else FP32)
    problem = patch_embed_problem(grid, 4, 24, own, dtype, B=B)
    check(problem, backend, shape_class=f"grid {grid} patch 4 D24 B{B}")


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=DTYPE_IDS.get)
@pytest.mark.parametrize(
    ("patch", "grid", "D"),
    [(16, 14, 192), (16, 14, 384), (32, 7, 768), (14, 16, 192), (8, (14, 28), 96), (4, 56, 96)],
    ids=str,
)
@pytest.mark.parametrize("backend", NOT_EMULATED)
def test_sizes_of_models(backend, patch, grid, D, dtype):
    for images in (UINT8, dtype):
        problem = patch_embed_problem(grid, patch, D, images, dtype)
        check(problem, backend, shape_class=f"model patch {patch} grid {grid} D{D}")


@pytest.mark.parametrize("B", (1, 2, 5, 9))
@each_backend
def test_every_batch_size(backend, B):
    problem = patch_embed_problem((3, 3), 8, 40, B=B)
    check(problem, backend, shape_class=f"B{B} patch 8 D40")


# ---- Position, prefix tokens, bias

ADDITIONS = [
    (pos, prefix, bias)
    for pos, prefix, bias in itertools.product(
        ("all", "patches", None), (None, 0, 1, 5), (True, False)
    )
]


@pytest.mark.parametrize(("pos", "prefix", "bias"), ADDITIONS, ids=str)
@backend_and_dtype(BACKENDS, (FP32, BF16))
def test_every_addition(backend, pos, prefix, bias, dtype):
    images, dtype = precision_for(backend, UINT8, dtype)
    problem = patch_embed_problem((3, 4), 8, 40, images, dtype, pos=pos, prefix=prefix, bias=bias)
    shape_class = f"patch 8 D40 pos {pos}, {prefix} prefix tokens, bias {bias}"
    check(problem, backend, shape_class=shape_class)


@pytest.mark.parametrize("prefix", (1, 3))
@each_backend
def test_as_many_prefix_tokens_as_patches(backend, prefix):
    """(1, N, D) is still the position of the patches, and not of the prefix tokens."""
    problem = patch_embed_problem((1, prefix), 8, 24, prefix=prefix, pos="patches")
    check(problem, backend, shape_class=f"N = P = {prefix}")


# ---- Normalisation

STATISTICS = {
    "none": (None, None),
    "mean only": (MEAN, None),
    "std only": (None, STD),
    "one number each": (0.5, 0.5),
    "a list and a number": ([0.1, 0.2, 0.3], 0.25),
    "tensors": (torch.tensor(MEAN), torch.tensor(STD)),
    "bf16 tensors": (torch.tensor(MEAN).bfloat16(), torch.tensor(STD).bfloat16()),
    "float64 tensors, strided": tuple(torch.tensor((v, v)).T[:, 0].double() for v in (MEAN, STD)),
    "integers": (0, 1),
    "mean 0": (0.0, 0.5),
    "mean 1": (1.0, 0.5),
    "mean beyond the range": ((-3.0, 2.0, 0.5), 1.0),
    "std 1e-3": (MEAN, 1e-3),
    "std 1000": (MEAN, 1000.0),
    "stds far apart": (MEAN, (1e-3, 1.0, 1e3)),
    "halves of a grey level": ((0.5 / 255, 127.5 / 255, 254.5 / 255), 0.25),
    "whole grey levels": ((1 / 255, 128 / 255, 254 / 255), 0.25),
}


@pytest.mark.parametrize("name", STATISTICS)
@backend_and_dtype(BACKENDS, IMAGES, "images")
def test_statistics(backend, name, images):
    mean, std = STATISTICS[name]
    for dtype in (FP32, BF16):
        own, weights = precision_for(backend, images, dtype)
        problem = patch_embed_problem((3, 4), 8, 40, own, weights, mean=mean, std=std)
        check(problem, backend, shape_class=f"patch 8 D40 {name}")
        if backend == "triton":
            break


CONSTANTS = (0, 1, 127, 128, 255)


@pytest.mark.parametrize("value", CONSTANTS)
@pytest.mark.parametrize("name", ["none", "tensors", "mean 1", "std 1e-3", "whole grey levels"])
@backend_and_dtype(BACKENDS, (FP32, BF16))
def test_constant_images(backend, name, value, dtype):
    """One grey everywhere: nothing but the constant term is left."""
    mean, std = STATISTICS[name]
    images, dtype = precision_for(backend, UINT8, dtype)
    problem = patch_embed_problem((2, 3), 8, 40, images, dtype, mean=mean, std=std)
    problem.inputs["images"].fill_(value)
    # dweight holds each of its 120 numbers 64 times: too few for an RMSE or a mean to be sharp.
    check(problem, backend, shape_class=f"patch 8 D40 all {value}, {name}", slack=1.25)


# ---- Dtypes: images, weight, bias, position, prefix tokens

MIXED = {
    "uint8, bf16 weight, fp32 rest": (UINT8, BF16, FP32, FP32, FP32),
    "uint8, fp16 weight, fp32 rest": (UINT8, FP16, FP32, FP32, FP32),
    "uint8, fp32 weight, bf16 rest": (UINT8, FP32, BF16, BF16, BF16),
    "uint8, fp32 weight, all differ": (UINT8, FP32, FP16, BF16, FP32),
    "fp32, bf16 weight": (FP32, BF16, FP32, FP32, FP32),
    "fp32, 16-bit parameters": (FP32, FP16, BF16, FP16, BF16),
    "bf16, fp32 parameters": (BF16, FP32, FP32, FP32, FP32),
    "fp16, fp32 parameters": (FP16, FP32, FP32, FP32, FP32),
    "bf16, fp16 weight": (BF16, FP16, BF16, FP32, FP16),
    "fp16, bf16 parameters": (FP16, BF16, BF16, BF16, BF16),
}


def mixed(name, grid=(3, 5), patch=8, D=40, **options):
    images, weight, bias, pos, prefix = MIXED[name]
    return patch_embed_problem(
        grid, patch, D, images, weight_dtype=weight, bias_dtype=bias, pos_dtype=pos,
        prefix_dtype=prefix, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("backend", NOT_INTERPRETED)
def test_mixed_dtypes(backend, name):
    for patch, D in ((8, 40), (16, 97)):
        problem = mixed(name, patch=patch, D=D)
        check(problem, backend, shape_class=f"patch {patch} D{D} {name}")


@pytest.mark.parametrize("autocast", (BF16, FP16), ids=DTYPE_IDS.get)
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("backend", NOT_INTERPRETED)
def test_autocast(backend, name, autocast):
    """Tokens come in the autocast dtype, gradients in their tensors' own."""
    problem = mixed(name, autocast=autocast)
    assert problem.ours(backend)(*problem.inputs.values()).dtype == autocast
    shape_class = f"patch 8 D40 {name} autocast {DTYPE_IDS[autocast]}"
    check(problem, backend, shape_class=shape_class)


@each_images
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=DTYPE_IDS.get)
@each_backend
def test_sixteen_bit_smoke(backend, dtype, images):
    """Loads, casts and stores of 16 bits also where the interpreter can show no more."""
    if backend == "triton" and images in (BF16, FP16):
        images = dtype
    problem = patch_embed_problem((2, 2), 4, 24, images, dtype)
    check(problem, backend, shape_class="patch 4 D24 smoke")


# ---- The specification itself


@pytest.mark.parametrize("images", (UINT8, torch.float64), ids=str)
@pytest.mark.parametrize("pos", ("all", "patches", None))
def test_eager_and_specification_agree_in_float64(images, pos):
    """The yardstick and the truth were written apart; in float64 they are one function."""
    problem = patch_embed_problem((3, 2), (4, 6), 24, images, torch.float64, pos=pos, prefix=2)
    tensors = list(problem.inputs.values())
    torch.testing.assert_close(
        problem.truth()(*tensors), problem.base()(*tensors), rtol=1e-12, atol=1e-12
    )
