"""Handwritten digits: the data, the small FusedViT, and its training."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ... import FusedViT

BATCH = 32
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
AVERAGING = 0.99  # decay of the moving average of the weights, which is what is tested
MEAN, STD = 0.305, 0.376  # of the pixels in [0, 1]


@dataclasses.dataclass
class Digits:
    """1,797 images of 8x8 pixels, normalised; a fixed quarter is held out."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @staticmethod
    def load(device: torch.device) -> Digits:
        data = load_digits()
        x = (torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 - MEAN) / STD
        y = torch.tensor(data.target)
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
        x, y = x[order].to(device), y[order].to(device)
        held_out = len(y) // 4
        return Digits(x[held_out:], y[held_out:], x[:held_out], y[:held_out])

    def steps_per_epoch(self) -> int:
        return len(self.train_y) // BATCH

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Epochs without end, in random order, each image shifted by at most one pixel."""
        while True:
            order = torch.randperm(len(self.train_y), generator=generator)
            for i in range(self.steps_per_epoch()):
                rows = order[i * BATCH : (i + 1) * BATCH].to(self.train_y.device)
                yield shifted(self.train_x[rows], generator), self.train_y[rows]


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel both ways; background comes in."""
    B, _, H, W = x.shape
    padded = F.pad(x, (1, 1, 1, 1), value=-MEAN / STD)[:, 0]
    dy, dx = torch.randint(0, 3, (2, B, 1), generator=generator)
    rows, columns = (dy + torch.arange(H))[:, :, None], (dx + torch.arange(W))[:, None, :]
    return padded[torch.arange(B)[:, None, None], rows, columns][:, None]


def make_model(seed: int) -> FusedViT:
    """Patch 2, width 64, depth 4: 200 thousand parameters."""
    torch.manual_seed(seed)
    model = FusedViT(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=4,
        num_heads=4,
        class_token=False,
        global_pool="avg",
        weight_init="reset",
        dynamic_img_size=True,  # for its attention over a photograph
    )
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    return model


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)


def train_step(model, optimizer, x: Tensor, y: Tensor, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


def accuracy(model: FusedViT, digits: Digits) -> float:
    model.eval()
    with torch.no_grad():
        return (model(digits.test_x).argmax(1) == digits.test_y).float().mean().item()


@dataclasses.dataclass
class Training:
    """What training left: the model, curves, and a checkpoint of when the loss had halved."""

    model: FusedViT  # the average of the last weights
    losses: list[float]
    accuracies: list[float]  # held out, after each epoch
    seconds: float
    checkpoint: dict


def train(
    model: FusedViT, digits: Digits, epochs: int, peak_lr: float, seed: int, step: Callable
) -> Training:
    """AdamW, warm-up and cosine decay, averaged weights; calls `step(text)` after every step."""
    optimizer = make_optimizer(model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))
    batches = digits.batches(torch.Generator().manual_seed(seed))
    per_epoch = digits.steps_per_epoch()
    total = epochs * per_epoch
    losses, accuracies, checkpoint = [], [], {}
    start = time.perf_counter()
    for i in range(total):
        lr = peak_lr * min(1.0, (i + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * i / total))
        losses.append(train_step(model, optimizer, *next(batches), lr))
        averaged.update_parameters(model)
        if not checkpoint and (halved(losses) or i == total - 1):
            checkpoint = {
                "step": i + 1,
                "lr": lr,
                "halved": halved(losses),
                "model": copy.deepcopy(model.state_dict()),
                "optimizer": copy.deepcopy(optimizer.state_dict()),
            }
        if (i + 1) % per_epoch == 0:
            accuracies.append(accuracy(averaged.module, digits))
        held_out = f", held out {accuracies[-1]:.1%}" if accuracies else ""
        step(f"loss {losses[-1]:.3f}{held_out}")
    return Training(averaged.module, losses, accuracies, time.perf_counter() - start, checkpoint)


def halved(losses: list[float], window: int = 10) -> bool:
    """Whether the mean of the last losses is half the mean of the first."""
    if len(losses) < 2 * window:
        return False
    return sum(losses[-window:]) <= 0.5 * sum(losses[:window])
