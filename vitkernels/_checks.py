"""Argument checks of the public functions.

Each failure is one sentence: operator, argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import NoReturn

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(
    op: str, arg: str, expected: str, got: object, error: type[Exception] = ValueError
) -> NoReturn:
    raise error(f"{op}: {arg} must be {expected}, got {got}")


def describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    text = " ".join(repr(value).split())  # arrays and long lists, too, on one line
    return f"{type(value).__name__} {text if len(text) <= 100 else text[:97] + '...'}"


def tensor(
    op: str,
    arg: str,
    value: object,
    *,
    like: torch.Tensor | None = None,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    ndim: int | None = None,
    shape: Sequence[int] | None = None,
    meaning: str = "",
) -> None:
    """A dense tensor of one of `dtypes` on the device of `like`; `meaning` names its dims."""
    if not isinstance(value, torch.Tensor):
        fail(op, arg, f"a {_names(dtypes)} tensor", describe(value), TypeError)
    if value.layout != torch.strided:
        fail(op, arg, "a dense (strided) tensor", f"layout {value.layout}", TypeError)
    if value.dtype not in dtypes:
        fail(op, arg, f"of dtype {_names(dtypes)}", describe(value), TypeError)
    if ndim is not None and value.ndim != ndim:
        fail(op, arg, f"{ndim}-dimensional{meaning and ' ' + meaning}", describe(value))
    if shape is not None and value.shape != tuple(shape):
        fail(op, arg, f"of shape {tuple(shape)}{meaning and ' = ' + meaning}", describe(value))
    if like is not None and value.device != like.device:
        fail(op, arg, f"on {like.device} like the first argument", describe(value))


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return "/".join(str(d).removeprefix("torch.") for d in dtypes)


def number(
    op: str,
    arg: str,
    value: object,
    *,
    low: float,
    high: float,
    expected: str,
    low_open: bool = False,
) -> None:
    """A finite real number in [low, high), or (low, high) with low_open."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(op, arg, expected, describe(value), TypeError)
    if (
        not -math.inf < value < math.inf  # math.isfinite breaks the graph for a symbolic float
        or not (value > low if low_open else value >= low)
        or not value < high
    ):
        fail(op, arg, expected, value)


def eps(op: str, value: object) -> None:
    number(
        op, "eps", value, low=0.0, high=math.inf, low_open=True, expected="a positive finite number"
    )


def dropout_p(op: str, value: object, arg: str = "dropout_p") -> None:
    number(op, arg, value, low=0.0, high=1.0, expected="a probability in [0, 1)")


def positive_int(op: str, arg: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(op, arg, "a positive integer", describe(value), TypeError)
    if value <= 0:
        fail(op, arg, "a positive integer", value)


def count(op: str, arg: str, value: object) -> None:
    """An integer that is not negative; numpy's, too: classes are often counted with it."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        fail(op, arg, "an integer of at least 0", describe(value), TypeError)
    if value < 0:
        fail(op, arg, "an integer of at least 0", value)


def no_grad_tensor(op: str, arg: str, value: torch.Tensor) -> None:
    if value.requires_grad:
        fail(op, arg, "a tensor without requires_grad (it gets no gradient)", "requires_grad=True")
