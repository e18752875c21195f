"""From a state dict with timm's names to a model: settings from shapes, all checks, copies."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.deit_names import IMAGENET as IMAGENET
from ..models.init import trunc_normal_

State = dict[str, Tensor]

BICUBIC = {"mode": "bicubic", "antialias": True}
BILINEAR = {"mode": "bilinear", "antialias": False}  # timm's choice for JAX checkpoints


class Family(NamedTuple):
    """What building must know of FusedViT, FusedDeiT or FusedSwin."""

    name: str
    head: str | tuple[str, ...]  # how the names of the classifier start
    # (loader, origin, state, hints and overrides) -> constructor arguments
    settings_from_shapes: Callable[[str, str, State, dict], dict]
    # (loader, origin, model, state, overrides, resampling) -> state at the sizes of the model
    fit_sizes: Callable[[str, str, nn.Module, State, dict, dict], State]


def build(
    family: Family,
    cls,
    loader: str,
    origin: str,
    state: State,
    hints: dict,
    overrides: dict,
    *,
    keep_requires_grad: bool = False,
    resampling: dict = BICUBIC,
) -> nn.Module:
    """A model with copies of `state`, evaluating. Nothing is made when anything does not fit.

    hints: what the source says beside its shapes; overrides: the caller's constructor arguments.
    """
    where = {key: overrides[key] for key in ("device", "dtype") if overrides.get(key) is not None}
    overrides = {key: value for key, value in overrides.items() if key not in ("device", "dtype")}
    with one_sentence(loader, origin, family.name):
        found = family.settings_from_shapes(loader, origin, state, {**hints, **overrides})
    found = {**found, **hints}
    settings = {**found, **overrides, "weight_init": "skip"}
    fresh_head = settings["num_classes"] != found["num_classes"]
    if fresh_head:
        state = {key: value for key, value in state.items() if not key.startswith(family.head)}
    try:
        model = cls(**settings, device="meta").eval()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{loader}: {origin}: {error}") from error
    if fresh_head:
        model.reset_classifier(0)
    state = family.fit_sizes(loader, origin, model, state, overrides, resampling)
    check_fit(loader, origin, model, state, family.name)
    copies = {key: value.detach().clone(memory_format=torch.contiguous_format)
              for key, value in state.items()}  # fmt: skip
    model.load_state_dict(copies, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state[name].requires_grad if keep_requires_grad else True)
    if fresh_head:
        model.reset_classifier(settings["num_classes"])
        if settings["num_classes"] > 0:
            heads = model.get_classifier()
            for head in heads if isinstance(heads, tuple) else (heads,):
                trunc_normal_(head.weight.data, std=0.02)
                nn.init.zeros_(head.bias)
    return model.to(**where) if where else model


def channels(weight: Tensor, in_chans: int) -> Tensor:
    """A projection of RGB for other channels: their sum for one, else repeated and rescaled."""
    if weight.shape[1] != 3 or in_chans == 3:
        return weight
    if in_chans == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(in_chans / 3), 1, 1)[:, :in_chans]
    return (repeated * (3 / in_chans)).to(weight.dtype)


def check_fit(loader: str, origin: str, model: nn.Module, state: State, name: str) -> None:
    """One sentence when names or shapes differ from the model's."""
    expected = model.state_dict()
    both = [(key, state[key], value) for key, value in expected.items() if key in state]
    wrong = [
        f"{key} is {tuple(got.shape)} where {tuple(value.shape)} is expected"
        for key, got, value in both
        if got.shape != value.shape
    ]
    whole_numbers = [
        f"{key} is {got.dtype} where a floating dtype is expected"
        for key, got, value in both
        if value.is_floating_point() and not got.is_floating_point()
    ]
    problems = [
        _list("missing ", [key for key in expected if key not in state]),
        _list("not expected: ", [key for key in state if key not in expected]),
        _list("", wrong),
        _list("", whole_numbers),
    ]
    if any(problems):
        raise ValueError(
            f"{loader}: {origin} does not fit {name}: {'; '.join(filter(None, problems))}"
        )


def warn_of_ignored(loader: str, keys: list[str], what: str, name: str = "FusedViT") -> None:
    if keys:
        warnings.warn(f"{loader}: {', '.join(keys)} ignored: {name} has no {what}", stacklevel=6)


@contextlib.contextmanager
def one_sentence(loader: str, origin: str, name: str = "FusedViT"):
    """What goes wrong while tensors of unexpected ranks are read, as an error about the file."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{loader}: {origin} does not fit {name}: {reason}") from error


def _list(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}{shown}{more}" if names else ""


def need(
    loader: str, origin: str, state: State, key: str, ndim: int, name: str = "FusedViT"
) -> Tensor:
    if key not in state:
        raise ValueError(f"{loader}: {origin} does not fit {name}: missing {key}")
    if state[key].ndim != ndim:
        raise ValueError(
            f"{loader}: {origin} does not fit {name}: {key} has {state[key].ndim} dimensions,"
            f" {ndim} are expected"
        )
    return state[key]
