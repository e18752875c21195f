"""Fifty training steps three times over: fused, reference, reference in float64."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable

import torch

from ... import use_backend
from .digits import Digits, make_model, make_optimizer, train_step

FLOOR = 1e-4
FACTOR = 3.0


@dataclasses.dataclass
class Agreement:
    """Loss curves on identical batches from one checkpoint, and whether fused follows reference."""

    fused: list[float]
    reference: list[float]
    float64: list[float]

    @property
    def difference(self) -> float:
        return _furthest(self.fused, self.reference)

    @property
    def reference_divergence(self) -> float:
        return _furthest(self.reference, self.float64)

    @property
    def allowed(self) -> float:
        return max(FLOOR, FACTOR * self.reference_divergence)

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed  # False for NaN


def _furthest(a: list[float], b: list[float]) -> float:
    return (
        (torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64))
        .abs()
        .max()
        .item()
    )


def compare(
    checkpoint: dict, digits: Digits, backend: str, steps: int, seed: int, step: Callable
) -> Agreement:
    batches = digits.batches(torch.Generator().manual_seed(seed + 1))
    batches = list(itertools.islice(batches, steps))
    curves = []
    for name, dtype in (
        (backend, torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        model = make_model(seed).to(digits.train_x.device)
        model.load_state_dict(checkpoint["model"])
        model.to(dtype)
        optimizer = make_optimizer(model)
        # A copy: load_state_dict keeps tensors of the right dtype, and steps change them in place.
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        losses = []
        with use_backend(name):
            for x, y in batches:
                losses.append(train_step(model, optimizer, x.to(dtype), y, checkpoint["lr"]))
                step(f"{name} {str(dtype).removeprefix('torch.')}, loss {losses[-1]:.5f}")
        curves.append(losses)
    return Agreement(*curves)
