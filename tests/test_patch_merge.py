"""patch_merge_layer_norm: forward and every gradient against float64, every backend."""

import pytest
import torch
from patch_merge_problems import patch_merge_problem
from problems import DTYPE_IDS, backend_and_dtype, check

from vitkernels.testing import available_for

BACKENDS = available_for("patch_merge_layer_norm")
DTYPES = tuple(DTYPE_IDS)
FP32, BF16, FP16 = DTYPES
# Channels of Swin-T and Swin-B's maps; tails of every vector width; rows beyond a block of rows.
CHANNELS = (1, 3, 8, 17, 40, 96, 128, 192, 384, 768, 1000)
SIZES = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 5), (5, 4), (6, 7), (8, 8), (13, 1), (1, 14), (14, 14))

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("channels", CHANNELS)
@backend_and_dtype(BACKENDS, DTYPES)
def test_every_width(backend, channels, dtype):
    size = (5, 6) if backend in ("triton", "cuda") else (9, 14)
    problem = patch_merge_problem((2, *size, channels), dtype)
    check(problem, backend, shape_class=f"C{channels}")


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@backend_and_dtype(BACKENDS, (FP32, BF16))
def test_every_size(backend, size, dtype):
    """Odd heights and widths, one pixel, one row of them: zeros stand beyond the edge."""
    problem = patch_merge_problem((2, *size, 24), dtype)
    check(problem, backend, shape_class=f"{size[0]}x{size[1]} C24")


@backend_and_dtype([b for b in BACKENDS if b != "triton"], DTYPES)
def test_more_rows_than_chunks(backend, dtype):
    """Weight gradients summed over more chunks of rows than one, the last one not full."""
    problem = patch_merge_problem((3, 27, 30, 20), dtype)
    check(problem, backend, shape_class="3x27x30 C20")


# x, weight, bias.
MIXED = {
    "bf16 with fp32 parameters": (BF16, FP32, FP32),
    "fp16 with fp32 parameters": (FP16, FP32, FP32),
    "fp32 with bf16 parameters": (FP32, BF16, BF16),
    "bf16 with fp16 weight, fp32 bias": (BF16, FP16, FP32),
    "fp32 with fp32 weight, bf16 bias": (FP32, FP32, BF16),
}


@pytest.mark.parametrize("name", MIXED)
@each_backend
def test_mixed_dtypes(backend, name):
    dtype, weight, bias = MIXED[name]
    problem = patch_merge_problem((2, 5, 6, 96), dtype, weight_dtype=weight, bias_dtype=bias)
    check(problem, backend, shape_class=f"C96 {name}")


@pytest.mark.parametrize("autocast", (BF16, FP16), ids=DTYPE_IDS.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS.get)
@each_backend
def test_autocast(backend, dtype, autocast):
    """The output is in the autocast dtype, whatever x is; gradients keep their inputs' dtypes."""
    options = {"weight_dtype": FP32, "bias_dtype": FP32, "autocast": autocast}
    problem = patch_merge_problem((2, 6, 5, 48), dtype, **options)
    assert problem.ours(backend)(*problem.inputs.values()).dtype == autocast
    check(problem, backend, shape_class=f"C48 autocast {DTYPE_IDS[autocast]}")


@pytest.mark.parametrize("affine", [(), ("weight",), ("bias",)], ids=lambda a: a[0] if a else "no")
@backend_and_dtype(BACKENDS, (FP32, BF16))
def test_without_weight_or_bias(backend, affine, dtype):
    problem = patch_merge_problem((2, 5, 6, 40), dtype, affine=affine)
    check(problem, backend, shape_class=f"C40 affine {affine}")


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1.0])
@each_backend
def test_eps(backend, eps):
    check(patch_merge_problem((2, 4, 5, 24), eps=eps), backend, shape_class=f"C24 eps {eps}")


@each_backend
def test_large_mean_keeps_its_variance(backend):
    """A variance from E[x^2] - E[x]^2 loses every digit here."""
    problem = patch_merge_problem((2, 4, 6, 96))
    problem.inputs["x"] += 300.0
    check(problem, backend, shape_class="C96 mean 300")


@each_backend
def test_the_order_of_the_four_pixels(backend):
    """(0,0), (1,0), (0,1), (1,1): one pixel at a time stands out where the row has its channels."""
    C, places = 8, ((0, 0), (1, 0), (0, 1), (1, 1))
    for segment, (row, column) in enumerate(places):
        x = torch.zeros(1, 2, 2, C)
        x[0, row, column] = 1.0
        problem = patch_merge_problem((1, 2, 2, C), affine=())
        y = problem.ours(backend)(x, None, None).view(4, C)
        assert (y > 0).all(1).tolist() == [s == segment for s in range(4)]


def test_eager_and_specification_agree_in_float64():
    """The yardstick and the truth were written apart; in float64 they are one function."""
    problem = patch_merge_problem((2, 5, 7, 12), torch.float64)
    tensors = list(problem.inputs.values())
    torch.testing.assert_close(
        problem.truth()(*tensors), problem.base()(*tensors), rtol=1e-12, atol=1e-12
    )
