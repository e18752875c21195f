"""The recipe: parameter groups, learning rates, averaged weights, mixed and erased images.

Groups with layer decay, mixup, cutmix and erasing are timm's and need it; the rest is torch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..timm_peer import import_timm
from ..usage import UsageError
from .options import Options


def check(o: Options) -> None:
    """Refuse before any work what needs timm where it is not installed."""
    asked = [name for name in ("layer_decay", "mixup", "cutmix", "erase") if getattr(o, name)]
    if asked and import_timm() is None:
        raise UsageError(
            f"--{asked[0].replace('_', '-')} needs timm: pip install 'vitkernels[timm]' or pip "
            "install timm"
        )


# --- optimiser and schedule -----------------------------------------------------------------------


def make_optimizer(model: nn.Module, o: Options, sharded: bool = False) -> torch.optim.Optimizer:
    groups = _groups(model, o)
    for group in groups:
        group["lr"] = o.lr * group.pop("lr_scale", 1.0)
    return torch.optim.AdamW(groups, lr=o.lr, fused=None if sharded else True)


def _groups(model: nn.Module, o: Options) -> list[dict]:
    """Biases, norms and what the model names (positions, tokens, bias tables) do not decay."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    if o.layer_decay is not None:
        from timm.optim import param_groups_layer_decay

        groups = param_groups_layer_decay(
            model, o.weight_decay, no_weight_decay_list=exempt, layer_decay=o.layer_decay
        )
        return [{k: v for k, v in g.items() if k != "param_names"} for g in groups]
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spare = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
            (spared if spare else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": o.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_schedule(optimizer: torch.optim.Optimizer, o: Options, steps_per_epoch: int):
    """Linear warm-up, then half a cosine down to min_lr, step by step."""
    total = o.epochs * steps_per_epoch
    warm = round(o.warmup_epochs * steps_per_epoch)
    least = o.min_lr / o.lr if o.lr else 0.0

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = min((step - warm) / max(total - warm, 1), 1.0)
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# --- averaged weights -----------------------------------------------------------------------------


class Average:
    """An exponential moving average of the parameters, short at first: decay at most
    (1 + steps) / (10 + steps)."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay, self.steps = model, decay, 0
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in self.model.named_parameters():
            self.values[name].lerp_(parameter.detach(), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.model.named_parameters():
            mine = self.values[name]
            kept = parameter.detach().clone()
            parameter.copy_(mine)
            mine.copy_(kept)


# --- images ---------------------------------------------------------------------------------------


class Mixing:
    """Mixup or cutmix of a batch, then erased rectangles, on normalised images."""

    def __init__(self, o: Options, num_classes: int, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std
        self.mixup = self.erase = None
        if o.mixup or o.cutmix:
            from timm.data import Mixup

            self.mixup = Mixup(
                o.mixup, o.cutmix, label_smoothing=o.label_smoothing, num_classes=num_classes
            )
        if o.erase:
            from timm.data.random_erasing import RandomErasing

            self.erase = RandomErasing(o.erase, mode="pixel", device=str(mean.device))

    def __bool__(self) -> bool:
        return self.mixup is not None or self.erase is not None

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images to fp32 ones; class numbers to probabilities where images are mixed."""
        x = (images.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]
        if self.mixup is not None:
            if len(x) % 2:  # timm mixes pairs, from both ends
                middle = slice(len(x) // 2, len(x) // 2 + 1)
                x, targets = (torch.cat((t, t[middle])) for t in (x, targets))
            x, targets = self.mixup(x, targets)
        return (x if self.erase is None else self.erase(x)), targets
