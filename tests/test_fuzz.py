"""Random problems: shape, dtypes, options and layouts all drawn from one printed seed.

A failure names its seed; `REPLAY` keeps seeds that once failed. `pytest -m slow` runs thousands.
"""

import random

import pytest
import torch
from attention_problems import attention_problem, packed_problem
from distillation_problems import distillation_problem
from every_op import OPS_AND_BACKENDS
from layer_norm_problems import layer_norm_add_problem, layer_norm_problem
from linear_gelu_problems import APPROXIMATIONS, linear_gelu_problem, linear_problem
from patch_embed_problems import IMAGE_LAYOUTS, MEAN, STD, UINT8, patch_embed_problem
from patch_merge_problems import patch_merge_problem
from problems import check
from window_attention_problems import MAP_LAYOUTS, window_problem

from vitkernels.testing import FLOATS, LAYOUTS, SIXTEEN_BIT

RUNS = {"cpu": 60, "reference": 15, "torch": 10, "cuda": 10, "triton": 3}
SLOW_RUNS = {"cpu": 2000, "reference": 100, "torch": 100, "cuda": 200, "triton": 30}
CHUNK = 100  # of the long run: one test each, so that workers share them
REPLAY: dict[str, list[int]] = {}  # operator: seeds

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def draw_layer_norm(op, rng, small):
    sizes = [rng.randint(1, 4 if small else 9) for _ in range(rng.randint(1, 3))]
    # Narrow 16-bit rows are ill-conditioned (their stored sum is not the normalised one).
    dtypes = [rng.choice(FLOATS) for _ in range(3)]
    channels = rng.randint(24, 130 if small else 700)
    options = {
        "residual_dtype": dtypes[1],
        "param_dtype": dtypes[2],
        "affine": rng.choice([("weight", "bias"), ("weight",), ("bias",), ()]),
        "row_scale": rng.random() < 0.5,
        "eps": rng.choice([1e-6, 1e-5, 1e-3]),
    }
    make = layer_norm_add_problem
    if op == "add_layer_norm":
        make = layer_norm_problem
        options["residual"] = rng.random() < 0.9
        options["gamma"] = rng.random() < 0.5
        options["dropout_p"] = rng.choice([0.0, 0.0, 0.2, 0.5]) if options["residual"] else 0.0
        options["out_dtype"] = rng.choice(FLOATS)
    return make((*sizes, channels), dtypes[0], seed=rng.randrange(2**20), **options)


def draw_attention(op, rng, small):
    B, H = rng.randint(1, 3), rng.randint(1, 3)
    N, D = rng.randint(1, 40 if small else 210), rng.randint(1, 40 if small else 130)
    if small:
        B, H = 1, 1
    Nk = N if op == "attention_qkvpacked" or rng.random() < 0.6 else rng.randint(1, N + 20)
    options = {
        "scale": rng.choice([None, None, 0.3]),
        "dropout_p": rng.choice([0.0, 0.0, 0.2]),
        "seed": rng.randrange(2**20),
    }
    kind = rng.choice(["none", "bias", "bool"])
    if kind != "none":
        shape = tuple(rng.choice([1, size]) for size in (B, H, N, Nk))
        options["bias" if kind == "bias" else "bool_bias"] = shape
    if kind == "bias":
        options["bias_dtype"] = rng.choice(FLOATS)
    if rng.random() < 0.3:
        options["key_padding_mask"] = (B, Nk)
    dtype = torch.float32 if small else rng.choice(FLOATS)
    if op == "attention_qkvpacked":
        return packed_problem(B, N, H, D, dtype, **options)
    return attention_problem(B, N, H, D, dtype, Nk=Nk, **options)


def draw_linear(op, rng, small):
    leading = [rng.randint(1, 3 if small else 8) for _ in range(rng.randint(0, 3))]
    K, N = (rng.randint(1, 70 if small else 300) for _ in range(2))
    dtype = torch.float32 if small else rng.choice(FLOATS)
    options = {"bias": rng.random() < 0.8, "seed": rng.randrange(2**20)}
    if not small:
        options |= {"weight_dtype": rng.choice(FLOATS), "bias_dtype": rng.choice(FLOATS)}
        options["autocast"] = rng.choice([None, None, *SIXTEEN_BIT])
    if op == "linear":
        return linear_problem((*leading, K), N, dtype, **options)
    options["approximate"] = rng.choice(APPROXIMATIONS)
    options["save_preactivation"] = rng.random() < 0.5
    return linear_gelu_problem((*leading, K), N, dtype, **options)


def draw_patch_embed(op, rng, small):
    grid = rng.randint(1, 3 if small else 7), rng.randint(1, 3 if small else 7)
    patch = rng.choice([4, 8, 14, 16, (rng.randint(1, 9), rng.randint(1, 17))])
    images, dtype = (torch.float32,) * 2 if small else (rng.choice(FLOATS), rng.choice(FLOATS))
    images = UINT8 if rng.random() < 0.6 else images
    options = {
        "B": rng.randint(1, 2 if small else 4),
        "Cin": rng.choice([1, 2, 3, 3, 4]),
        "bias": rng.random() < 0.8,
        "pos": rng.choice(["all", "all", "patches", None]),
        "prefix": rng.choice([None, 0, 1, 1, 5]),
        "mean": rng.choice([MEAN, None, 0.5, 0.0, 1.0, rng.random()]),
        "std": rng.choice([STD, None, 0.5, 1e-2, 10.0]),
        "seed": rng.randrange(2**20),
    }
    if not small:
        names = ("weight_dtype", "bias_dtype", "pos_dtype", "prefix_dtype")
        options |= {name: rng.choice(FLOATS) for name in names}
        options["autocast"] = rng.choice([None, None, *SIXTEEN_BIT])
    D = rng.randint(1, 40 if small else 200)
    return patch_embed_problem(grid, patch, D, images, dtype, **options)


def draw_window_attention(op, rng, small):
    # Not one token: its scores get a gradient of 0, which has no error to compare.
    window = rng.randint(1, 4 if small else 9), rng.randint(2, 4 if small else 9)
    shift = tuple(rng.choice([0, rng.randrange(size)]) for size in window)
    dtypes = [torch.float32 if small else rng.choice(FLOATS) for _ in range(3)]
    options = {
        "B": rng.randint(1, 3),
        "windows": (rng.randint(1, 2 if small else 3), rng.randint(1, 2 if small else 4)),
        "heads": rng.randint(1, 2 if small else 5),
        "D": rng.choice([8, 16, 24, 32, 32, 48, 64, rng.randint(2, 70)]),
        "table_dtype": dtypes[1],
        "scale_dtype": dtypes[2],
        "cosine": rng.choice([False, True, "timm"]),
        "dropout_p": rng.choice([0.0, 0.0, 0.2]),
        "autocast": rng.choice([None, None, None if small else rng.choice(SIXTEEN_BIT)]),
        "seed": rng.randrange(2**20),
    }
    if small:
        options["B"] = 1
    if not options["cosine"]:
        options["scale"] = rng.choice([None, None, 0.3])
    return window_problem(window, shift, dtypes[0], **options)


def draw_patch_merge(op, rng, small):
    size = [rng.randint(1, limit) for limit in ((2, 5, 5) if small else (4, 15, 15))]
    options = {
        "weight_dtype": rng.choice(FLOATS),
        "bias_dtype": rng.choice(FLOATS),
        "affine": rng.choice([("weight", "bias"), ("weight",), ("bias",), ()]),
        "autocast": rng.choice([None, None, None, *SIXTEEN_BIT]),
        "eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "seed": rng.randrange(2**20),
    }
    channels = rng.randint(6, 40 if small else 300)
    return patch_merge_problem((*size, channels), rng.choice(FLOATS), **options)


def draw_distillation_loss(op, rng, small):
    rows, classes = rng.randint(1, 5 if small else 20), rng.randint(2, 200 if small else 3000)
    options = {
        "alpha": rng.choice([0.0, 0.1, 0.5, 1.0]),
        "temperature": rng.choice([1.0, 2.0, 0.3, 7.0]),
        "kind": rng.choice(["soft", "soft", "hard"]),
        "label_smoothing": rng.choice([0.0, 0.0, 0.1, 0.5]),
        "reduction": rng.choice(["batchmean", "deit"]),
        "soft_targets": rng.choice([None, None, *FLOATS]),
        "teacher_dtype": rng.choice([None, *FLOATS]),
        "spread": rng.choice([0.3, 1.0, 4.0]),
        "seed": rng.randrange(2**20),
    }
    return distillation_problem((rows, classes), rng.choice(FLOATS), **options)


DRAW = {"attention": draw_attention, "attention_qkvpacked": draw_attention}
DRAW |= {"add_layer_norm": draw_layer_norm, "layer_norm_add": draw_layer_norm}
DRAW |= {"linear_gelu": draw_linear, "linear": draw_linear, "patch_embed": draw_patch_embed}
DRAW |= {"window_attention": draw_window_attention}
OWN_LAYOUTS = {"patch_embed": IMAGE_LAYOUTS, "window_attention": MAP_LAYOUTS}
DRAW["patch_merge_layer_norm"] = draw_patch_merge
DRAW["distillation_loss"] = draw_distillation_loss


def run_one(op, backend, seed):
    rng = random.Random(f"{op} {seed}")
    problem = DRAW[op](op, rng, small=backend in ("triton", "cuda"))
    layout, incoming = rng.choice(LAYOUTS), rng.choice([None, "ones", "contiguous"])
    if op in OWN_LAYOUTS and rng.random() < 0.4:
        layout, incoming = rng.choice(OWN_LAYOUTS[op]), incoming or "contiguous"
    if op == "patch_merge_layer_norm" and problem.inputs["weight"] is None:
        incoming = None if incoming == "ones" else incoming  # dx is 0 there, but for rounding
    if op == "distillation_loss":
        incoming = incoming or "contiguous"  # of a scalar
    tensors = {name: t for name, t in problem.inputs.items() if t is not None}
    names = [name for name, t in tensors.items() if t.is_floating_point()]
    wanted = tuple(rng.sample(names, rng.randint(1, len(names))))
    try:
        check(
            problem, backend, shape_class="fuzz", layout=layout, grad_layout=incoming,
            wanted=wanted,
            # One of thousands of draws lies further out than one of a dozen.
            slack=1.5,
        )  # fmt: skip
    except Exception as error:
        shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        raise AssertionError(
            f"run_one({op!r}, {backend!r}, {seed}): {layout}, incoming {incoming}, "
            f"gradients of {wanted}, {shapes}, {problem.options}"
        ) from error


@pytest.mark.parametrize(("op", "backend"), OPS_AND_BACKENDS)
def test_fuzz(op, backend, seed):
    for index in range(RUNS[backend]):
        run_one(op, backend, 1_000_000 * seed + index)


@pytest.mark.parametrize(("op", "backend"), OPS_AND_BACKENDS)
def test_replay(op, backend):
    for kept in REPLAY.get(op, ()):
        run_one(op, backend, kept)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(SLOW_RUNS["cpu"] // CHUNK))
@pytest.mark.parametrize(("op", "backend"), OPS_AND_BACKENDS)
def test_long_fuzz(op, backend, chunk, seed):
    start = 1000 + chunk * CHUNK
    for index in range(start, min(start + CHUNK, 1000 + SLOW_RUNS[backend])):
        run_one(op, backend, 1_000_000 * seed + index)
