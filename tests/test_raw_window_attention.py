"""Raw window_attention called directly, as exported graphs do: the launcher refuses bad calls."""

import itertools

import pytest
import torch
from test_raw_products import ANY_TENSOR, SHAPES

from vitkernels.testing import assert_bitwise_equal, available_for

V = torch.ops.vitkernels
KERNELS = [b for b in ("cpu",) if b in available_for("window_attention", D=4, N=6)]
B, H, W, HEADS, D, WINDOW, SHIFT = 2, 4, 6, 2, 4, (2, 3), (1, 2)
C, N, WINDOWS = HEADS * D, 6, 4
INPUTS = {
    "qkv": torch.randn(B, H, W, 3 * C),
    "bias_table": torch.randn(3 * 5, HEADS),
    "logit_scale": torch.randn(HEADS),
    "seed": torch.tensor([7]),
    "window_h": WINDOW[0],
    "window_w": WINDOW[1],
    "shift_h": SHIFT[0],
    "shift_w": SHIFT[1],
    "num_heads": HEADS,
    "scale": 0.5,
    "dropout_p": 0.25,
}
SAVED = {
    "dout": torch.randn(B, H, W, C),
    "qkv": INPUTS["qkv"],
    "out": torch.randn(B, H, W, C),
    "lse": torch.randn(B, WINDOWS, HEADS, N),
}
GOOD = {
    "window_attention_fwd": INPUTS,
    "window_attention_bwd": {**SAVED, **INPUTS, "output_mask": [True] * 3},
}
FREE = {  # two windows more, or another batch, are good calls of the forward
    ("window_attention_fwd", "qkv"): ("twice as many",),
}
OTHERS = {
    "no window": {"window_h": 0},
    "window across": {"window_w": 4},
    "window larger than the map": {"window_h": 8},
    "window of 2 ** 62": {"window_h": 2**62, "window_w": 4},
    "shift of a window": {"shift_h": 2},
    "negative shift": {"shift_w": -1},
    "no heads": {"num_heads": 0},
    "another head count": {"num_heads": 4},
    "heads that do not divide C": {"num_heads": 3},
    "probability of 1": {"dropout_p": 1.0},
    "negative probability": {"dropout_p": -0.1},
    "no seed": {"seed": None},
    "two seeds": {"seed": torch.tensor([1, 2])},
    "int32 seed": {"seed": torch.tensor([1], dtype=torch.int32)},
    "no channels": {"qkv": torch.randn(B, H, W, 0)},
    "no rows": {"qkv": torch.randn(B, 0, W, 3 * C)},
    "logit_scale of two columns": {"logit_scale": torch.randn(HEADS, 1, 2)},
}
BACKWARD = {
    "mask of two": {"output_mask": [True, True]},
    "dlogit_scale of nothing": {"logit_scale": None},
    "dout of another dtype": {"dout": SAVED["dout"].half()},
    "lse of another dtype": {"lse": SAVED["lse"].half()},
}


def bad_calls():
    for op, good in GOOD.items():
        for name, value in good.items():
            if not isinstance(value, torch.Tensor) or name == "seed":
                continue
            for what, change in ANY_TENSOR.items():
                yield op, f"{what} {name}", {name: change(value)}
            for what, change in SHAPES.items():
                if what not in FREE.get((op, name), ()) and (value.dim() > 1 or "less" not in what):
                    yield op, f"{name}: {what}", {name: change(value)}
        others = OTHERS | (BACKWARD if op == "window_attention_bwd" else {})
        for what, changes in others.items():
            yield op, what, changes


def raw(op, backend, changes=None):
    arguments = {**GOOD[op], **(changes or {})}
    return getattr(getattr(V, op), backend)(*arguments.values())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("op", "changes"),
    [pytest.param(op, changes, id=f"{op}-{what}") for op, what, changes in bad_calls()],
)
def test_a_bad_raw_call_is_refused(backend, op, changes):
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match="window_attention"):
        raw(op, backend, changes)


@pytest.mark.parametrize("op", GOOD)
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_the_good_calls_are_good(backend, op):
    raw(op, backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("cosine", (True, False), ids=("cosine", "product"))
@pytest.mark.parametrize("backend", KERNELS)
def test_unwanted_gradients_change_nothing(backend, cosine, dtype):
    """Every mask: what is not wanted is None, and the rest keeps its bits."""
    changes = {name: SAVED[name].to(dtype) for name in ("dout", "qkv", "out")}
    if not cosine:
        changes["logit_scale"] = None
    wanted = [True, True, cosine]
    everything = raw("window_attention_bwd", backend, changes | {"output_mask": wanted})
    for mask in itertools.product((False, True), (False, True), (False, cosine)):
        grads = raw("window_attention_bwd", backend, changes | {"output_mask": list(mask)})
        assert [g is not None for g in grads] == list(mask)
        for mine, full in zip(grads, everything, strict=True):
            if mine is not None:
                assert_bitwise_equal(mine, full)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_strided_lse_is_read_as_it_is(backend):
    strided = torch.stack((SAVED["lse"], SAVED["lse"] + 9), -1)[..., 0]
    dense = raw("window_attention_bwd", backend)
    assert_bitwise_equal(raw("window_attention_bwd", backend, {"lse": strided}), dense)
