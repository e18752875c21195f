"""add_layer_norm and layer_norm_add: forward and every gradient against float64, every backend."""

import itertools

import pytest
import torch
from layer_norm_problems import layer_norm_add_problem, layer_norm_problem
from problems import DTYPE_IDS, check

from vitkernels.testing import available_for

BACKENDS = available_for("add_layer_norm")
SLOW_BACKENDS = ("triton", "cuda")  # by interpreter and emulator: milliseconds a row
CHANNELS = (1, 3, 96, 192, 384, 768, 1024, 1280, 1408, 1536, 4096, 6144)
DTYPES = tuple(DTYPE_IDS)
FP32, BF16, FP16 = DTYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def shape_for(backend, channels):
    """Odd numbers of rows, enough for the statistics and for several programs of the backward."""
    if backend in SLOW_BACKENDS:
        return (3, 7, channels) if channels < 768 else (2, 2, channels)
    return (3, 65, channels) if channels < 4096 else (2, 13, channels)


# The interpreter truncates 16-bit stores and is slow: three widths show that its casts are right.
WIDTHS = [
    pytest.param(backend, channels, dtype, id=f"{backend}-{channels}-{DTYPE_IDS[dtype]}")
    for backend, channels, dtype in itertools.product(BACKENDS, CHANNELS, DTYPES)
    if backend != "triton" or dtype == FP32 or channels in (1, 96, 768)
]


@pytest.mark.parametrize(("backend", "channels", "dtype"), WIDTHS)
def test_every_width(backend, channels, dtype):
    problem = layer_norm_problem(shape_for(backend, channels), dtype)
    check(problem, backend, shape_class=f"C{channels}")


@pytest.mark.parametrize(("backend", "channels", "dtype"), WIDTHS)
def test_layer_norm_add_every_width(backend, channels, dtype):
    problem = layer_norm_add_problem(shape_for(backend, channels), dtype)
    check(problem, backend, shape_class=f"C{channels}")


# Leading dimensions: none but C, one, images, and more rows than any kernel has programs.
LEADING = {"row": (), "rows": (5,), "image": (2, 3, 4), "many": (17, 197)}


@pytest.mark.parametrize("leading", LEADING)
@each_backend
def test_leading_dimensions(backend, leading):
    rows = (4, 97) if leading == "many" and backend in SLOW_BACKENDS else LEADING[leading]
    problem = layer_norm_problem((*rows, 48), row_scale=bool(rows))
    check(problem, backend, shape_class=f"{leading} C48")


# Branch, residual stream, parameters, output.
MIXED = {
    "bf16 branch, fp32 stream": (BF16, FP32, FP32, BF16),
    "bf16 branch, fp32 stream, bf16 parameters": (BF16, FP32, BF16, BF16),
    "bf16 with fp32 parameters": (BF16, BF16, FP32, BF16),
    "fp16 with fp32 parameters": (FP16, FP16, FP32, FP16),
    "fp16 branch, fp32 stream": (FP16, FP32, FP32, FP16),
    "bf16 branch, fp16 stream": (BF16, FP16, FP16, FP32),
    "fp32 in, bf16 out": (FP32, FP32, FP32, BF16),
    "bf16 in, fp32 out": (BF16, BF16, BF16, FP32),
}


@pytest.mark.parametrize("name", MIXED)
@each_backend
def test_mixed_dtypes(backend, name):
    dtype, residual, params, out = MIXED[name]
    problem = layer_norm_problem(
        shape_for(backend, 384),
        dtype,
        residual_dtype=residual,
        param_dtype=params,
        out_dtype=out,
    )
    check(problem, backend, shape_class=f"C384 {name}")


@pytest.mark.parametrize("name", [name for name in MIXED if "out" not in name])
@each_backend
def test_layer_norm_add_mixed_dtypes(backend, name):
    dtype, residual, params, _ = MIXED[name]
    problem = layer_norm_add_problem(
        shape_for(backend, 384), dtype, residual_dtype=residual, param_dtype=params
    )
    check(problem, backend, shape_class=f"C384 {name}")


OPTIONS = [
    {"residual": residual, "gamma": gamma, "row_scale": row_scale, "dropout_p": dropout_p}
    for residual, gamma, row_scale, dropout_p in itertools.product(
        (True, False), (True, False), (True, False), (0.0, 0.2)
    )
    if residual or not (gamma or row_scale or dropout_p)
]


def option_id(options):
    return "-".join(k for k, v in options.items() if v) or "none"


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=DTYPE_IDS.get)
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
@each_backend
def test_every_option(backend, options, dtype):
    problem = layer_norm_problem(shape_for(backend, 96), dtype, **options)
    check(problem, backend, shape_class=f"C96 {option_id(options)}")


@pytest.mark.parametrize("affine", [(), ("weight",), ("bias",)], ids=lambda a: a[0] if a else "no")
@each_backend
def test_without_weight_or_bias(backend, affine):
    shape = shape_for(backend, 192)
    for problem in (layer_norm_problem, layer_norm_add_problem):
        check(problem(shape, affine=affine), backend, shape_class=f"C192 affine {affine}")


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
@each_backend
def test_eps(backend, eps):
    for problem in (layer_norm_problem, layer_norm_add_problem):
        check(
            problem(shape_for(backend, 96), eps=eps),
            backend,
            shape_class=f"C96 eps {eps}",
        )


@each_backend
def test_layer_norm_add_without_row_scale(backend):
    problem = layer_norm_add_problem(shape_for(backend, 96), row_scale=False)
    check(problem, backend, shape_class="C96 no row_scale")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
def test_scales_are_not_rounded_to_16_bits(backend):
    """1 / 0.7 is not a bf16 number: a kernel that multiplies in bf16 drifts."""
    for make in (layer_norm_problem, layer_norm_add_problem):
        problem = make(shape_for(backend, 384), BF16, param_dtype=FP32, keep_prob=0.7)
        if "dropout_p" in problem.options:
            problem.options["dropout_p"] = 0.3
        check(problem, backend, shape_class="C384 scales 1/0.7")


@each_backend
def test_residual_none_returns_x_itself(backend):
    problem = layer_norm_problem((2, 3, 16), residual=False)
    x = problem.inputs["x"]
    assert problem.ours(backend)(*problem.inputs.values())[1] is x


@each_backend
def test_large_mean_keeps_its_variance(backend):
    """A variance from E[z^2] - E[z]^2 loses every digit here."""
    problem = layer_norm_problem(shape_for(backend, 384), row_scale=False)
    problem.inputs["residual"] += 1000.0
    check(problem, backend, shape_class="C384 mean 1000")


def test_eager_and_specification_agree_in_float64():
    """The yardstick and the truth were written apart; in float64 they are one function."""
    for make in (layer_norm_problem, layer_norm_add_problem):
        problem = make((4, 9, 40), torch.float64)
        problem.options["row_scale"] = problem.options["row_scale"].double()
        if "dropout_p" in problem.options:
            problem.options["dropout_p"] = 0.25
        tensors = list(problem.inputs.values())
        for a, b in zip(problem.truth()(*tensors), problem.base()(*tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
