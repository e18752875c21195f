"""Raw patch_embed and linear_gelu called directly: launchers refuse what they would misread."""

import os

import pytest
import torch

from vitkernels.testing import available_for

# The Triton launchers run here only in the interpreter; on a GPU machine test-gpu has them.
KERNELS = [
    backend
    for backend in ("cpu", "triton")
    if backend in available_for("linear_gelu") + available_for("patch_embed")
    if backend == "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
]
B, N, K, Cin, D, P = 2, 7, 12, 3, 8, 2
FP32 = torch.float32


def linear_arguments():
    x, weight, bias = torch.randn(B, 5, K), torch.randn(N, K), torch.randn(N)
    y = torch.randn(B, 5, N)
    parameters = {"x": x, "weight": weight, "bias": bias}
    forward = {**parameters, "activation": 1, "save_preactivation": True, "out_dtype": FP32}
    backward = {"dy": y, **parameters, "preactivation": y.clone(), "activation": 1,
                "output_mask": [True] * 3}  # fmt: skip
    return {"linear_gelu_fwd": forward, "linear_gelu_bwd": backward}


def patch_embed_arguments():
    inputs = {
        "images": torch.rand(B, Cin, 8, 12),
        "weight": torch.randn(D, Cin, 4, 4),
        "bias": torch.randn(D),
        "pos_embed": torch.randn(1, P + 6, D),
        "prefix_tokens": torch.randn(1, P, D),
        "mean": torch.rand(Cin),
        "std": torch.rand(Cin) + 0.5,
    }
    tokens = torch.randn(B, P + 6, D)
    forward = {**inputs, "out_dtype": FP32}
    backward = {"dtokens": tokens, **inputs, "output_mask": [True] * 5}
    return {"patch_embed_fwd": forward, "patch_embed_bwd": backward}


GOOD = linear_arguments() | patch_embed_arguments()
ANY_TENSOR = {
    "float64": torch.Tensor.double,
    "int32": torch.Tensor.int,
    "bool": torch.Tensor.bool,
    "complex": lambda t: t.to(torch.complex64),
}
# What no tensor of any call may be: one element less, or more dimensions.
SHAPES = {
    "shorter rows": lambda t: t[..., :-1],
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0],
    "twice as many": lambda t: torch.cat([t, t], 0),
}
# x, dy and the like have any leading dimensions; a batch, N and D are free where nothing repeats.
FREE = {
    ("linear_gelu_fwd", "x"): ("one dimension more", "one dimension less", "twice as many"),
    ("linear_gelu_fwd", "weight"): ("twice as many",),
    ("patch_embed_fwd", "images"): ("twice as many",),
    ("patch_embed_fwd", "weight"): ("shorter rows",),  # a patch of (4, 3)
}
OTHERS = {
    "linear_gelu_fwd": {
        "weight of other N": {"weight": torch.randn(N + 1, K)},
        "no columns": {"x": torch.randn(B, 0), "weight": torch.randn(N, 0)},
        "x without dimensions": {"x": torch.tensor(1.0)},
        "activation 4": {"activation": 4},
        "activation -1": {"activation": -1},
        "int out_dtype": {"out_dtype": torch.int32},
        "float64 out_dtype": {"out_dtype": torch.float64},
    },
    "linear_gelu_bwd": {
        "mask of two": {"output_mask": [True, True]},
        "bias absent": {"bias": None},
        "activation 4": {"activation": 4},
        "dy of other rows": {"dy": torch.randn(B, 6, N), "preactivation": None},
        "dy flat": {"dy": torch.randn(B * 5 * N), "preactivation": None},
    },
    "patch_embed_fwd": {
        "weight of other D": {"weight": torch.randn(D + 1, Cin, 4, 4)},
        "height no multiple": {"images": torch.rand(B, Cin, 9, 12)},
        "width no multiple": {"images": torch.rand(B, Cin, 8, 11)},
        "one position more": {"pos_embed": torch.randn(1, P + 7, D)},
        "positions of each sample": {"pos_embed": torch.randn(B, P + 6, D)},
        "bf16 mean": {"mean": torch.rand(Cin).bfloat16()},
        "int out_dtype": {"out_dtype": torch.int32},
        "float64 out_dtype": {"out_dtype": torch.float64},
    },
    "patch_embed_bwd": {
        "mask of three": {"output_mask": [True] * 3},
        "bias absent": {"bias": None},
        "pos_embed absent": {"pos_embed": None},
        "prefix_tokens absent": {"prefix_tokens": None},
        "tokens without the prefix": {"dtokens": torch.randn(B, 6, D)},
        "gradient of uint8 images": {"images": torch.zeros(B, Cin, 8, 12, dtype=torch.uint8)},
    },
}


def bad_calls():
    for op, good in GOOD.items():
        for name, value in good.items():
            if not isinstance(value, torch.Tensor):
                continue
            for what, change in ANY_TENSOR.items():
                yield op, f"{what} {name}", {name: change(value)}
            for what, change in SHAPES.items():
                if what not in FREE.get((op, name), ()) and (value.dim() > 1 or "less" not in what):
                    yield op, f"{name}: {what}", {name: change(value)}
        for what, changes in OTHERS[op].items():
            yield op, what, changes


CALLS = [
    pytest.param(backend, op, changes, id=f"{backend}-{op}-{what}")
    for backend in KERNELS
    for op, what, changes in bad_calls()
    if backend in available_for(op.rsplit("_", 1)[0])
]


def raw(op, backend, changes=None):
    arguments = {**GOOD[op], **(changes or {})}
    return getattr(getattr(torch.ops.vitkernels, op), backend)(*arguments.values())


@pytest.mark.parametrize(("backend", "op", "changes"), CALLS)
def test_a_bad_raw_call_is_refused(backend, op, changes):
    with pytest.raises((RuntimeError, ValueError), match=op):
        raw(op, backend, changes)


@pytest.mark.parametrize("op", GOOD)
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_the_good_calls_are_good(backend, op):
    if backend == "reference" or backend in available_for(op.rsplit("_", 1)[0]):
        raw(op, backend)


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_unwanted_gradients_are_none(backend):
    """Every mask, so that no gradient is computed into another's place."""
    for op in ("linear_gelu_bwd", "patch_embed_bwd"):
        if backend != "reference" and backend not in available_for(op.rsplit("_", 1)[0]):
            continue
        everything = raw(op, backend)
        for bits in range(2 ** len(everything)):
            mask = [bool(bits >> i & 1) for i in range(len(everything))]
            for wanted, mine, full in zip(
                mask, raw(op, backend, {"output_mask": mask}), everything, strict=True
            ):
                assert (mine is not None) == wanted
                if wanted:
                    torch.testing.assert_close(mine, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("activation", range(4))
def test_the_preactivation_is_saved_where_it_is_asked_for(backend, activation):
    if backend not in available_for("linear_gelu"):
        return
    for save in (True, False):
        changes = {"activation": activation, "save_preactivation": save}
        y, kept = raw("linear_gelu_fwd", backend, changes)
        assert (kept is not None) == (save and activation != 0)
        if kept is not None:
            assert kept.shape == y.shape and kept.dtype == y.dtype and kept.is_contiguous()
            good = GOOD["linear_gelu_fwd"]
            exact = torch.nn.functional.linear(good["x"], good["weight"], good["bias"])
            torch.testing.assert_close(kept, exact, rtol=1e-5, atol=1e-5)
