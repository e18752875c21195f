"""The teacher of a distilled run: a checkpoint of any model here, or a small CNN trained first."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import naming
from ..progress import bar
from ..usage import UsageError, whole_file
from .data import Data, InOrder, Shuffled, loader
from .options import Options

CNN_FILE = "teacher.pt"
CNN_BATCH, CNN_LR = 64, 3e-3


class SmallCNN(nn.Module):
    """Three pairs of 3 x 3 convolutions with BatchNorm, halving the map twice; takes uint8."""

    def __init__(self, in_chans: int, num_classes: int, width: int, mean, std):
        super().__init__()
        self.settings = {"in_chans": in_chans, "num_classes": num_classes, "width": width}
        layers: list[nn.Module] = []
        channels = in_chans
        for stage in range(3):
            for _ in range(2):
                layers += [
                    nn.Conv2d(channels, width << stage, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width << stage),
                    nn.ReLU(inplace=True),
                ]
                channels = width << stage
            if stage < 2:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images if images.is_floating_point() else (images / 255 - self.mean) / self.std
        return self.head(self.features(x).mean((2, 3)))


class Teacher:
    """Logits for a batch as the student sees it: uint8, or normalised by the student's numbers."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor):
        self.model = model.eval().requires_grad_(False)
        self.mean, self.std = mean[:, None, None], std[:, None, None]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.is_floating_point() and not isinstance(self.model, SmallCNN):
            embed = self.model.patch_embed
            pixels = images * self.std + self.mean
            images = (pixels - embed.mean[:, None, None]) / embed.std[:, None, None]
        return self.model(images).float()


def make_teacher(o: Options, data: Data, device: torch.device, console, folder: Path) -> Teacher:
    mean, std = (_channels(v, data.in_chans, device) for v in (data.mean, data.std))
    if o.teacher != "cnn":
        return Teacher(_loaded(o, data).to(device), mean, std)
    model = SmallCNN(data.in_chans, len(data.classes), 32, data.mean, data.std).to(device)
    path = folder / CNN_FILE
    if path.exists():  # of the run that goes on
        model.load_state_dict(torch.load(path, weights_only=True))
        return Teacher(model, mean, std)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(o.seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        _train_cnn(model, o, data, device, console)
    correct, seen = accuracy(model, data, device)
    console.print(
        f"  teacher: a CNN of {sum(p.numel() for p in model.parameters()) / 1e3:.0f} thousand "
        f"parameters, {correct / seen:.2%} of {seen} held-out images right"
    )
    with whole_file(path) as building:
        torch.save(model.state_dict(), building)
    return Teacher(model, mean, std)


def _channels(values, in_chans: int, device: torch.device) -> Tensor:
    return torch.tensor(tuple(values) * (in_chans if len(values) == 1 else 1), device=device)


def _loaded(o: Options, data: Data) -> nn.Module:
    try:
        model = naming.load_model(None, Path(o.teacher))
    except UsageError as error:
        raise UsageError(str(error).replace("--weights", "--teacher")) from error
    if model.num_classes != len(data.classes):
        raise UsageError(
            f"--teacher: {o.teacher} has {model.num_classes} classes, the data have "
            f"{len(data.classes)}"
        )
    if model.in_chans != data.in_chans:
        raise UsageError(
            f"--teacher: {o.teacher} takes {model.in_chans} channels, the images have "
            f"{data.in_chans}"
        )
    return model


def _train_cnn(model: SmallCNN, o: Options, data: Data, device: torch.device, console) -> None:
    """AdamW with one cycle of the learning rate; the same augmentation as the student's."""
    batches = Shuffled(len(data.train), min(CNN_BATCH, len(data.train)), o.seed)
    feed = loader(data.train, batches, o.workers, pinned=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=CNN_LR, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, CNN_LR, total_steps=o.teacher_epochs * len(batches)
    )
    model.train()
    with bar(console, "teacher", o.teacher_epochs * len(batches)) as step:
        for batches.epoch in range(o.teacher_epochs):
            for batch in feed:
                if len(batch.targets) < 2:
                    continue
                images, targets = batch.images.to(device), batch.targets.to(device)
                loss = F.cross_entropy(model(images), targets, label_smoothing=0.1)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                step(f"loss {loss.item():.3f}")


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, device: torch.device) -> tuple[int, int]:
    """(right, seen) of the held-out images."""
    model.eval()
    correct = seen = 0
    for batch in loader(data.held_out, InOrder(len(data.held_out), 128), 0, pinned=False):
        if len(batch.targets):
            right = model(batch.images.to(device)).argmax(1) == batch.targets.to(device)
            correct, seen = correct + int(right.sum()), seen + len(right)
    return correct, max(seen, 1)
