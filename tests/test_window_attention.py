"""window_attention: forward and every gradient against float64, every backend that runs here."""

import itertools
import math

import pytest
import torch
from problems import DTYPE_IDS, backend_and_dtype, check
from window_attention_problems import LN_100, LN_100_FP32, pair, window_problem

from vitkernels.testing import SIXTEEN_BIT, available_for

BACKENDS = available_for("window_attention", D=32, N=49)
FP32, BF16, FP16 = DTYPE_IDS
SQUARE = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24)
OBLONG = (
    (2, 3),
    (3, 2),
    (7, 8),
    (8, 7),
    (4, 16),
    (16, 4),
    (1, 7),
    (7, 1),
    (12, 6),
    (24, 8),
    (2, 24),
)
HEAD_DIMS = (8, 16, 24, 32, 48, 64, 80, 128)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
# Large problems are not for the interpreter; it computes 16-bit products in fp32, so fp32 alone.
LARGE = [name for name in BACKENDS if name != "triton"]
each_pair = backend_and_dtype(BACKENDS, DTYPE_IDS)
each_large_pair = backend_and_dtype(LARGE, DTYPE_IDS)
COSINE = pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])


def factor(backend, dtype, window):
    """16-bit kernels keep scores and probabilities in fp32: from 49 tokens on they beat eager."""
    N = math.prod(pair(window))
    return 0.9 if dtype in SIXTEEN_BIT and N >= 49 and backend != "torch" else None


def make(backend, window, shift=0, dtype=FP32, **options):
    """Few tokens: one row of windows where they are large, and one head for the interpreter."""
    sizes = {}
    if backend == "triton":
        sizes = {"windows": (1, 2), "B": 1, "heads": 1}
    elif math.prod(pair(window)) > 100:
        sizes = {"windows": (1, 2), "B": 1}
    return window_problem(window, shift, dtype, **(sizes | options))


def name(window, shift=0, **others):
    text = f"window {pair(window)} shift {pair(shift)}"
    return " ".join([text, *(f"{key} {value}" for key, value in others.items())])


def half(window):
    return tuple(w // 2 for w in pair(window))


def _every_window():
    """Everything for the kernels; the interpreter takes 40 ms a tile: fp32, and few large windows;
    torch and the reference know one way for all windows, so half of it."""
    options = itertools.product((*SQUARE, *OBLONG), DTYPE_IDS, (False, True), (False, True))
    for backend, (window, dtype, shifted, cosine) in itertools.product(BACKENDS, options):
        tokens, both = math.prod(pair(window)), shifted == cosine
        if shifted and window == 1:
            continue  # a window of one token has no shift
        if backend == "triton" and (dtype != FP32 or tokens > 64 or (tokens > 16 and not both)):
            continue
        if (
            backend == "cuda"
            and tokens > 64
            and (dtype == FP16 or both or tokens > 256 * (not cosine))
        ):
            continue  # the emulator takes a second for 16 x 16
        if backend in ("torch", "reference") and (both or (dtype == FP16 and tokens > 50)):
            continue
        variant = f"{'shifted' * shifted}-{'cosine' if cosine else 'plain'}"
        case = (backend, window, dtype, shifted, cosine)
        yield pytest.param(*case, id=f"{backend}-{window}-{DTYPE_IDS[dtype]}-{variant}")


@pytest.mark.parametrize(("backend", "window", "dtype", "shifted", "cosine"), [*_every_window()])
def test_windows(backend, window, dtype, shifted, cosine):
    shift = half(window) if shifted else 0
    problem = make(backend, window, shift, dtype, cosine=cosine)
    check(
        problem, backend, shape_class=name(window, shift, cosine=cosine),
        rmse_factor=factor(backend, dtype, window),
    )  # fmt: skip


# ---- Shifts and maps

SHIFTS = [(4, shift) for shift in itertools.product(range(4), repeat=2)]
SHIFTS += [((3, 5), shift) for shift in itertools.product(range(3), range(5))]
SHIFTS += [(7, shift) for s in range(1, 7) for shift in ((s, s), (s, 0), (0, s))]


@pytest.mark.parametrize(("window", "shift"), SHIFTS, ids=str)
@each_backend
def test_every_shift(backend, window, shift):
    """On both axes and on one: where the shift ends, and which windows have a seam."""
    if backend == "triton" and shift not in ((1, 2), (3, 3), (0, 1), (2, 0), (2, 4)):
        return
    # The torch composition and the reference know one way for all dtypes.
    dtypes = (FP32, BF16) if backend in ("cpu", "cuda") else (FP32,)
    for dtype in dtypes:
        problem = make(backend, window, shift, dtype)
        check(problem, backend, shape_class=name(window, shift))


MAPS = [(1, 1), (1, 2), (2, 1), (3, 1), (1, 4), (2, 3), (4, 2), (3, 3)]


@each_pair
@pytest.mark.parametrize("shift", [0, (1, 2), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("windows", MAPS, ids=lambda w: f"{w[0]}x{w[1]}")
def test_maps(backend, windows, shift, dtype):
    """One window, one row or column of them, H != W; a lone window has up to four seam regions."""
    if backend == "triton" and (max(windows) > 2 or shift == 0):
        return
    problem = window_problem((3, 4), shift, dtype, windows=windows, B=1, heads=1)
    check(problem, backend, shape_class=name((3, 4), shift, windows=windows))


@each_pair
@pytest.mark.parametrize(("window", "shift"), [(2, 1), (5, 2), (7, 3), (8, 4)], ids=str)
def test_one_window_is_the_map(backend, window, shift, dtype):
    """H or W equal to the window, or both, with a shift all the same."""
    for windows in ((1, 1), (1, 3), (3, 1)):
        if backend == "triton" and window != 2:
            continue
        problem = make(backend, window, shift, dtype, windows=windows, B=1, cosine=windows[0] == 3)
        check(
            problem, backend, shape_class=name(window, shift, windows=windows),
            rmse_factor=factor(backend, dtype, window),
        )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@each_backend
def test_batches(backend, batch):
    for dtype in (FP32,) if backend == "triton" else DTYPE_IDS:
        problem = make(backend, (2, 3), (1, 1), dtype, B=batch)
        check(problem, backend, shape_class=name((2, 3), 1, batch=batch))


# ---- Heads


@COSINE
@each_pair
@pytest.mark.parametrize("D", [*HEAD_DIMS, 1, 2, 5, 20, 33, 40, 56, 72, 96, 100, 112, 127])
def test_head_dims(backend, D, dtype, cosine):
    if backend == "triton" and (D > 80 or cosine != (D in (5, 16, 48))):
        return
    if D == 1 and cosine:
        return  # +-1: no length is left to differentiate, only its rounding errors
    problem = make(backend, (3, 4), (1, 2), dtype, D=D, cosine=cosine)
    check(problem, backend, shape_class=name((3, 4), (1, 2), D=D, cosine=cosine))


@each_large_pair
@pytest.mark.parametrize("window", [7, 8])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims_of_real_windows(backend, D, window, dtype):
    problem = make(backend, window, half(window), dtype, D=D, windows=(1, 2))
    check(
        problem, backend, shape_class=name(window, half(window), D=D),
        rmse_factor=factor(backend, dtype, window),
    )  # fmt: skip


@each_pair
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 7, 8, 12, 16, 24])
def test_heads(backend, heads, dtype):
    if backend == "triton" and heads not in (2, 3, 7):
        return
    cosine = "timm" if heads in (3, 8, 24) else False
    sizes = {"B": 1, "windows": (2, 1 if backend == "triton" else 2), "heads": heads, "D": 8}
    problem = window_problem((2, 3), (1, 1), dtype, cosine=cosine, **sizes)
    check(problem, backend, shape_class=name((2, 3), 1, heads=heads, cosine=cosine))


# ---- Parameters


@COSINE
@pytest.mark.parametrize("table_dtype", DTYPE_IDS, ids=lambda d: "table_" + DTYPE_IDS[d])
@each_pair
def test_dtypes_of_the_parameters(backend, dtype, table_dtype, cosine):
    """The table and logit_scale in fp32 or 16 bits beside activations of any dtype."""
    scale_dtypes = DTYPE_IDS if cosine else (FP32,)
    for scale_dtype in scale_dtypes:
        options = {"table_dtype": table_dtype, "scale_dtype": scale_dtype, "cosine": cosine}
        problem = make(backend, (4, 5), (2, 1), dtype, **options)
        parts = f"table {DTYPE_IDS[table_dtype]} scale {DTYPE_IDS[scale_dtype]} cosine {cosine}"
        check(problem, backend, shape_class=f"{name((4, 5), (2, 1))} {parts}")


@pytest.mark.parametrize("shape", [True, "timm"], ids=["(heads,)", "(heads, 1, 1)"])
@pytest.mark.parametrize(
    "value",
    [0.0, -3.0, 1.0, math.log(10.0), LN_100 - 1e-3, LN_100_FP32, LN_100 + 1e-3, 5.5, 1e4],
    ids=lambda v: f"{v:.6g}",
)
@each_backend
def test_logit_scale_below_at_and_above_its_limit(backend, value, shape):
    """From ln 100 on the factor is 100; above it no gradient comes out, at it one does."""
    if backend == "triton" and shape != "timm":
        return
    # Cosines times 100 are half that off after rounding to 16 bits: one-hot rows flip.
    dtypes = (FP32, BF16) if value < 4 and backend != "triton" else (FP32,)
    for dtype in dtypes:
        problem = make(backend, (2, 3), (1, 1), dtype, logit_scale=value, cosine=shape)
        shape_class = name((2, 3), 1, logit_scale=value, shape=shape)
        check(problem, backend, shape_class=shape_class)


@each_backend
def test_logit_scales_of_every_head_on_its_side_of_the_limit(backend):
    values = [math.log(10.0), LN_100 + 0.1, LN_100_FP32, -1.0]
    problem = make(backend, (2, 3), (1, 1), logit_scale=torch.tensor(values), heads=4)
    check(problem, backend, shape_class=name((2, 3), 1, logit_scale="mixed"))
    tensors = [t.requires_grad_() for t in problem.inputs.values()]
    problem.ours(backend)(*tensors).square().sum().backward()
    assert [g == 0 for g in tensors[2].grad.tolist()] == [False, True, False, False]


@each_pair
@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0, 0.05, 3], ids=str)
def test_scale(backend, scale, dtype):
    if scale == 0.0:  # equal rows have equal roundings
        dtype = FP32
    problem = make(backend, (3, 4), (1, 2), dtype, scale=scale)
    check(problem, backend, shape_class=name((3, 4), (1, 2), scale=scale))


@COSINE
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@each_pair
def test_dropout(backend, dtype, p, cosine):
    """The probabilities are dropped, and so are their gradients."""
    problem = make(backend, (3, 4), (1, 2), dtype, dropout_p=p, cosine=cosine)
    check(problem, backend, shape_class=name((3, 4), (1, 2), dropout=p, cosine=cosine))


# ---- Long sums


@COSINE
@each_large_pair
@pytest.mark.parametrize(
    ("window", "shift", "windows", "B", "D"),
    [(7, 3, (8, 8), 2, 8), (2, 1, (32, 32), 3, 8), ((4, 8), (2, 0), (16, 3), 4, 16)],
    ids=str,
)
def test_parameter_gradients_of_many_windows(backend, window, shift, windows, B, D, dtype, cosine):
    """Hundreds or thousands of windows add into each entry of the table."""
    if backend == "cuda" and (dtype == FP16 or cosine):
        windows = tuple(max(1, count // 4) for count in windows)
    sizes = {"windows": windows, "B": B, "D": D, "cosine": cosine}
    problem = window_problem(window, shift, dtype, **sizes)
    check(
        problem, backend, shape_class=name(window, shift, windows=windows, B=B, cosine=cosine),
        rmse_factor=factor(backend, dtype, window),
    )  # fmt: skip


@each_large_pair
@pytest.mark.parametrize(("window", "shift"), [((2, 3), (1, 1)), (7, 3)], ids=str)
def test_logit_scale_gradients_of_many_heads(backend, window, shift, dtype):
    """Enough numbers to hold their errors against eager's."""
    problem = window_problem(window, shift, dtype, heads=48, D=8, cosine=True)
    check(
        problem, backend, shape_class=name(window, shift, heads=48, cosine=True),
        rmse_factor=factor(backend, dtype, window),
    )  # fmt: skip


@pytest.mark.parametrize("backend", LARGE)
def test_gradients_that_cancel(backend):
    """Softmax gradients of a row sum to 0, and so does the table's: what is left is rounding."""
    problem = window_problem(7, 3, windows=(4, 4), heads=3, D=8)
    tensors = [t.requires_grad_() for t in problem.inputs.values()]
    problem.ours(backend)(*tensors).square().sum().backward()
    dtable = tensors[1].grad
    assert dtable.abs().max() > 1 and (dtable.sum(0).abs() < 1e-4 * dtable.abs().sum(0)).all()


@COSINE
@pytest.mark.parametrize("backend", [name for name in LARGE if name == "cpu"])
def test_roundings_of_many_windows_cancel(backend, cosine):
    """Values and gradients with a mean: every row's dS is a small difference of large numbers, and
    a rounding with one sign in all rows would add up where eager's cancel."""
    problem = window_problem(2, 1, windows=(16, 16), B=16, heads=4, D=8, cosine=cosine)
    inputs = [t + 2.0 if name == "qkv" else t for name, t in problem.inputs.items()]
    dout = torch.randn(16, 32, 32, 32, generator=torch.Generator().manual_seed(3)) + 2.0

    def gradients(backend, dtype):
        tensors = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        problem.ours(backend)(*tensors).backward(dout.to(dtype))
        return [t.grad.double() for t in tensors[1:]]

    truth = gradients("reference", torch.float64)
    ours, eager = (
        [(g - t).norm() for g, t in zip(gradients(b, FP32), truth, strict=True)]
        for b in (backend, "torch")
    )
    assert all(o <= 6 * e for o, e in zip(ours, eager, strict=True)), (ours, eager)
