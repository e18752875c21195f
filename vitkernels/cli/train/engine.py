"""A run: epochs of steps, a test after each, checkpoints, and going on where one ended."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ..progress import bar
from ..usage import UsageError
from . import recipe, state
from .checkpoint import Store, random_state, seed_everything, set_random_state
from .data import Batch, Data, InOrder, Shuffled, Unreadable, loader
from .interrupt import Interrupt
from .journal import Journal
from .options import Options
from .parallel import Scaler, World, clip_gradients, give_back, spread

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES_UNREAD = 10  # on a GPU, where reading one waits for the device


class Stopped(Exception):
    """Why a run ended early, in one line."""


@dataclasses.dataclass
class Place:
    """How far a run is, and the sums of the epoch under way."""

    epoch: int = 0
    step: int = 0  # optimiser steps of this epoch
    loss_sum: float = 0.0
    losses: int = 0
    seen: int = 0
    bad: int = 0
    seconds: float = 0.0
    best: tuple[float, float] = (-1.0, -math.inf)  # accuracy, minus the loss


class Trainer:
    def __init__(
        self, o: Options, data: Data, model: nn.Module, config: dict, world: World,
        device: torch.device, console, teacher=None,
    ):  # fmt: skip
        self.o, self.data, self.world, self.device, self.console = o, data, world, device, console
        self.config, self.teacher = config, teacher
        self.folder = Path(o.out)
        self.store = Store(self.folder)
        self.at = Place()
        self.model = model.to(device)
        if o.grad_checkpointing:
            model.set_grad_checkpointing(True)
        if teacher is not None and hasattr(model, "set_distilled_training"):
            model.set_distilled_training(True)
        if o.compile:  # what DDP does around it stays as it is
            if world.size > 1 and o.parallel == "tp":
                raise UsageError("--compile: not with --parallel tp: use ddp or fsdp")
            self.model.compile()
        self.runner = spread(self.model, o.parallel, world, device)
        self.layout = state.Layout(self.model, o.parallel, world)

        rank, size = world.data(o.parallel)
        self.batches = Shuffled(len(data.train), o.batch, o.seed, rank, size)
        self.steps = len(self.batches) // o.accumulate
        if self.steps == 0:
            raise UsageError(
                f"--accumulate: {o.accumulate} batches are more than the {len(self.batches)} of an "
                "epoch"
            )
        self.tests = InOrder(len(data.held_out), o.batch, rank, size)
        pinned = device.type == "cuda"
        self.feed = loader(data.train, self.batches, o.workers, pinned)
        self.test_feed = loader(data.held_out, self.tests, o.workers, pinned)

        sharded = world.size > 1 and o.parallel != "ddp"
        self.optimizer = recipe.make_optimizer(self.model, o, sharded)
        self.schedule = recipe.make_schedule(self.optimizer, o, self.steps)
        split = world.size > 1 and o.parallel == "tp"
        make_scaler = Scaler if split else torch.amp.GradScaler
        self.scaler = make_scaler(device.type, enabled=o.amp == "fp16")
        self.average = None if o.ema is None else recipe.Average(self.model, o.ema)
        mean, std = self.model.patch_embed.mean, self.model.patch_embed.std
        self.mixing = recipe.Mixing(o, len(data.classes), mean, std)
        seed_everything(o.seed + (rank if size > 1 else 0))
        self.journal = Journal(self.folder, console, []) if world.first else None
        self.unread: list[tuple[int, Tensor]] = []

    # --- the run ----------------------------------------------------------------------------------

    def fit(self) -> dict:
        """Trains to the end; the last row of the log, for the first process."""
        closed = contextlib.closing(self.journal) if self.world.first else contextlib.nullcontext()
        with Interrupt() as self.interrupt, closed:
            while self.at.epoch < self.o.epochs:
                self._epoch()
                self._end_epoch(self._row(*self._test()))
        if self.world.first:
            self.journal.draw()
        return self.rows[-1] if self.rows else {}

    def _epoch(self) -> None:
        start, at = time.perf_counter(), self.at
        self.model.train()
        self.batches.epoch, self.batches.first = at.epoch, at.step * self.o.accumulate
        title, left = f"epoch {at.epoch + 1}", self.steps - at.step
        with bar(self.console, title, left) if self.world.first else _silent() as tick:
            feed = iter(self.feed)
            for _ in range(left):
                loss = self._step([next(feed) for _ in range(self.o.accumulate)])
                at.step += 1
                tick(f"loss {loss:.4f}" if loss is not None else "")
                if self.world.any(self.interrupt.asked, self.device):
                    at.seconds += time.perf_counter() - start
                    raise self._interrupted()
            self._read_losses()
        at.seconds += time.perf_counter() - start

    def _step(self, batches: list[Batch]) -> float | None:
        """One update from several batches; the loss where it has been read."""
        total = None
        self.at.bad += sum(len(batch.bad) for batch in batches)
        batches = [batch for batch in batches if self._usable(batch)]
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with self._together(last):
                loss = self._loss(batch) / len(batches)
                self.scaler.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
            self.at.seen += len(batch.targets)
        if total is None:
            return None
        self.scaler.unscale_(self.optimizer)
        if self.o.clip_grad:
            clip_gradients(self.model.parameters(), self.o.clip_grad)
        self.unread.append((self.at.step, total))
        if self.device.type == "cpu" or len(self.unread) >= LOSSES_UNREAD:
            self._read_losses()  # before the weights take in what is not a number
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.average is not None:
            self.average.update()
        return None if self.unread else self.last_loss

    def _usable(self, batch: Batch) -> bool:
        """Whether it holds images. Bad ones are counted, or stop the run."""
        if batch.bad and not self.o.skip_bad:
            raise Unreadable(f"{batch.bad[0]}; or leave such images out with --skip-bad")
        if len(batch.targets) == 0 and self.world.size > 1:  # the others would wait for it
            raise Unreadable(f"no image of a whole batch could be read: {batch.bad[0]}")
        return len(batch.targets) > 0

    def _together(self, last: bool):
        """Replicas average their gradients once a step, with the last batch."""
        if last or not hasattr(self.runner, "no_sync"):
            return contextlib.nullcontext()
        return self.runner.no_sync()

    def _loss(self, batch: Batch) -> Tensor:
        o = self.o
        images = batch.images.to(self.device, non_blocking=True)
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.mixing:
            images, targets = self.mixing(images, targets)
        with self._autocast():
            found = self.runner(images)
        smoothing = 0.0 if targets.is_floating_point() else o.label_smoothing
        if self.teacher is None:
            return F.cross_entropy(found.float(), targets, label_smoothing=smoothing)
        logits, distilled = found if isinstance(found, tuple) else (found, found)
        return ops.distillation_loss(
            logits, distilled, self.teacher(images), targets, alpha=o.alpha,
            temperature=o.temperature, kind=o.distill, label_smoothing=smoothing,
        )  # fmt: skip

    def _autocast(self):
        dtype = AUTOCAST.get(self.o.amp)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _read_losses(self) -> None:
        """Adds up what has been computed; stops at the first that is not a number."""
        for step, loss in self.unread:
            self.last_loss = loss.item()
            if self.world.any(not math.isfinite(self.last_loss), self.device):
                loss_of_all = self.world.total(loss.double()).item()
                raise Stopped(
                    f"the loss is {loss_of_all} at step {step + 1} of epoch "
                    f"{self.at.epoch + 1}: lower --lr or raise --warmup-epochs; "
                    f"{self.store.last_good()}"
                )
            self.at.loss_sum += self.last_loss
            self.at.losses += 1
        self.unread.clear()

    # --- after an epoch ---------------------------------------------------------------------------

    @torch.no_grad()
    def _test(self) -> tuple[float, float, int]:
        """(loss, accuracy, bad images) of the held-out images."""
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        averaged = contextlib.nullcontext() if self.average is None else self.average.applied()
        with averaged:
            for batch in self.test_feed:
                sums[3] += len(batch.bad)
                if not self._usable(batch):
                    continue
                with self._autocast():
                    logits = self.runner(batch.images.to(self.device)).float()
                targets = batch.targets.to(self.device)
                real = targets >= 0
                losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
                sums[0] += losses.double()
                sums[1] += ((logits.argmax(1) == targets) & real).sum()
                sums[2] += real.sum()
            give_back(self.model)
        if self.world.data(self.o.parallel)[1] > 1:
            self.world.total(sums)
        loss, right, seen, bad = sums.tolist()
        if seen == 0:
            raise Unreadable("none of the held-out images could be read")
        return loss / seen, right / seen, int(bad)

    def _row(self, loss: float, accuracy: float, bad: int) -> dict:
        at, size = self.at, self.world.data(self.o.parallel)[1]
        sums = torch.tensor([at.loss_sum, at.losses, at.seen, at.bad], dtype=torch.float64)
        if size > 1:
            sums = self.world.total(sums.to(self.device)).cpu()
        loss_sum, losses, seen, bad_in_training = sums.tolist()
        return {
            "epoch": at.epoch + 1,
            "steps": self.steps,
            "train_loss": loss_sum / max(losses, 1),
            "val_loss": loss,
            "val_accuracy": accuracy,
            "lr": self.schedule.get_last_lr()[-1],
            "images_per_second": seen / max(at.seconds, 1e-9),
            "bad_images": int(bad_in_training) + bad,
            "seconds": at.seconds,
        }

    def _end_epoch(self, row: dict) -> None:
        score = (row["val_accuracy"], -row["val_loss"])
        better = score > tuple(self.at.best)
        best = score if better else tuple(self.at.best)
        self.at = Place(epoch=self.at.epoch + 1, best=best)
        if self.world.first:
            self.journal.add(row, self.o.epochs)
        checkpoint = self.save(f"epoch-{self.at.epoch:04d}")
        if self.world.first:
            if better:
                self.store.mark_best(checkpoint)
            self.journal.write()

    @property
    def rows(self) -> list[dict]:
        return self.journal.rows if self.world.first else []

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self, name: str) -> Path | None:
        """All processes gather, the first writes. The weights are the averaged ones, if any; the
        others are then in the state."""
        held = {}
        if self.average is not None:
            held["weights"] = state.weights_of(self.model, self.layout)
        with contextlib.nullcontext() if self.average is None else self.average.applied():
            weights = state.weights_of(self.model, self.layout)
        whole = held | {
            "place": dataclasses.asdict(self.at),
            "rows": self.rows,
            "moments": state.moments_of(self.optimizer, self.model, self.layout),
            "schedule": {"last_epoch": self.schedule.last_epoch, "lr": self.schedule.get_last_lr()},
            "scaler": self.scaler.state_dict(),
            "average_steps": 0 if self.average is None else self.average.steps,
            "random": self.world.gather(random_state()),
        }
        if not self.world.first:
            return None
        return self.store.save(name, weights, self.config, whole)

    def resume(self) -> None:
        """From the last checkpoint, if there is one; written by any number of processes."""
        last = self.store.last()
        if last is None:
            return
        weights, found = self.store.read(last)
        if self.average is not None:
            state.load_weights(self.model, self.layout, weights)
            for name, parameter in self.model.named_parameters():
                self.average.values[name].copy_(parameter.detach())
            self.average.steps = found["average_steps"]
            weights = found["weights"]
        state.load_weights(self.model, self.layout, weights)
        state.load_moments(self.optimizer, self.model, self.layout, found["moments"])
        self.schedule.last_epoch = found["schedule"]["last_epoch"]
        self.schedule._last_lr = list(found["schedule"]["lr"])
        for group, lr in zip(self.optimizer.param_groups, found["schedule"]["lr"], strict=True):
            group["lr"] = lr
        self.scaler.load_state_dict(found["scaler"])
        self.at = Place(**found["place"])
        states = found["random"]
        rank = self.world.data(self.o.parallel)[0]  # split heads must draw the same DropPath
        if rank < len(states):
            set_random_state(states[rank])
        else:
            seed_everything(self.o.seed + rank + 1000 * (self.at.epoch + 1))
        if self.world.first:
            self.journal.rows[:] = found["rows"]
            self.console.print(f"  going on after {last.name}")

    def _interrupted(self) -> Stopped:
        self._read_losses()
        self.save(f"epoch-{self.at.epoch:04d}-step-{self.at.step:05d}")
        if self.world.first:
            self.journal.write()
            self.journal.draw()
        return Stopped(
            f"interrupted after step {self.at.step} of epoch {self.at.epoch + 1}, which is saved: "
            f"go on with vitkernels train --resume {self.folder}"
        )


@contextlib.contextmanager
def _silent():
    yield lambda text="": None
