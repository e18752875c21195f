"""One operator at one shape: inputs, our call, plain PyTorch's, the truth, and the cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _regimes
from .._regimes import BOTH, FORWARD

__all__ = ["BOTH", "FORWARD", "Subject"]


@dataclasses.dataclass(frozen=True)
class Subject:
    """Every function takes the inputs; the floating ones of them, or of the first `with_gradient`,
    get gradients.

    make: (seed, dtype, device) -> inputs. ours: backend -> function. eager: plain PyTorch in
    the tested dtype, the yardstick of the error model. truth: of float64 inputs. cost: (itemsize,
    backward) -> (FLOPs, least bytes). sizes, variant: of the regime. peers: further stock ways.
    """

    op: str
    shape: tuple
    make: Callable[..., list[Tensor]]
    ours: Callable[[str | None], Callable]
    eager: Callable
    truth: Callable
    cost: Callable[[int, bool], tuple[float, float]]
    sizes: tuple[int, ...]
    variant: str = ""
    peers: dict[str, Callable] = dataclasses.field(default_factory=dict)
    with_gradient: int | None = None

    def regime(self, dtype: torch.dtype, direction: str) -> str:
        return _regimes.regime(self.op, (dtype,), direction == BOTH, self.sizes, self.variant)

    def cost_of(self, dtype: torch.dtype, direction: str) -> tuple[float, float]:
        """(FLOPs, least bytes) of the forward, with the backward's where the direction has it."""
        flops, moved = self.cost(dtype.itemsize, False)
        if direction == BOTH:
            more_flops, more = self.cost(dtype.itemsize, True)
            flops, moved = flops + more_flops, moved + more
        return flops, moved


Device = str | torch.device


def normal(seed: int, device: Device) -> Callable[..., Tensor]:
    """normal(*size), all from one generator."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator, device=device)


def uint8(seed: int, device: Device, size: Sequence[int]) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randint(0, 256, tuple(size), generator=generator, device=device)
    return values.to(torch.uint8)
