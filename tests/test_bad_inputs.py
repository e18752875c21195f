"""Bad arguments: TypeError or ValueError naming operator, argument, what was expected and got."""

import numpy
import pytest
import torch
from bad_arguments import OPTIONAL_SCALE, bad_arguments, good_arguments

import vitkernels.ops

PUBLIC_OPS = (
    "add_layer_norm",
    "layer_norm_add",
    "patch_merge_layer_norm",
    "attention",
    "attention_qkvpacked",
    "patch_embed",
    "linear_gelu",
    "linear",
    "window_attention",
    "distillation_loss",
    "attention_weights",
)
WITH_BACKENDS = PUBLIC_OPS[:-1]
CASES = [
    pytest.param(op, name, value, id=f"{op}-{name}-{what}")
    for op in PUBLIC_OPS
    for name, what, value in bad_arguments(op)
    if not (op == "attention_weights" and name == "backend")
]


@pytest.mark.parametrize(("op", "name", "value"), CASES)
def test_the_error_names_everything(op, name, value):
    arguments = good_arguments(op) | {name: value}
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(vitkernels.ops, op)(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{op}: ") and name in message, message
    assert "must be" in message and "got" in message, message


@pytest.mark.parametrize("value", [v for _, v in OPTIONAL_SCALE], ids=str)
def test_scale_of_window_attention(value):
    """Without logit_scale, beside which it has to be None."""
    arguments = good_arguments("window_attention") | {"logit_scale": None, "scale": value}
    with pytest.raises((TypeError, ValueError), match=r"^window_attention: scale must be .*, got "):
        vitkernels.ops.window_attention(**arguments)


def test_sixty_bad_inputs_of_each_operator():
    counts = {op: sum(case.values[0] == op for case in CASES) for op in PUBLIC_OPS}
    assert min(counts[op] for op in WITH_BACKENDS) >= 60, counts


@pytest.mark.parametrize("op", PUBLIC_OPS)
def test_the_good_arguments_are_good(op):
    getattr(vitkernels.ops, op)(**good_arguments(op))


@pytest.mark.parametrize("op", WITH_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_a_refusing_backend_says_what_the_others_do(op, dtype):
    """An explicit request never falls back."""
    arguments = {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in good_arguments(op).items()
    }
    with pytest.raises(
        ValueError, match=f"{op}: backend='triton' cannot serve .* Others - "
    ) as caught:
        getattr(vitkernels.ops, op)(**arguments, backend="triton")
    assert "reference: can serve it" in str(caught.value)


def test_what_came_is_told_in_one_line():
    many_lines = numpy.zeros((2, 4, 4, 24))
    with pytest.raises(TypeError, match=r"^window_attention: qkv must be .*ndarray ") as error:
        vitkernels.ops.window_attention(**good_arguments("window_attention") | {"qkv": many_lines})
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
