"""Labelled images as uint8 pixels: a folder of class folders, or scikit-learn's digits.

What happens to an image at random follows from (seed, epoch, index) alone, so that neither the
number of worker processes nor an interruption changes a single pixel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..images import SUFFIXES, Preprocessing, read_image
from ..usage import UsageError

DIGITS_MEAN, DIGITS_STD = 0.305, 0.376  # of the digits' pixels in [0, 1]


class Unreadable(UsageError):
    """What one of several processes may meet alone: an image that cannot be read."""


@dataclasses.dataclass
class Bad:
    """An image that could not be read, and why."""

    reason: str


@dataclasses.dataclass
class Batch:
    images: Tensor  # (B, C, H, W), uint8
    targets: Tensor  # (B,), int64; -1 where a row only fills the batch
    bad: list[str]

    def pin_memory(self) -> Batch:
        self.images, self.targets = self.images.pin_memory(), self.targets.pin_memory()
        return self


def collate(samples: list) -> Batch:
    good = [s for s in samples if not isinstance(s, Bad)]
    images = (
        torch.stack([image for image, _ in good]) if good else torch.empty(0, dtype=torch.uint8)
    )
    targets = torch.tensor([target for _, target in good], dtype=torch.int64)
    return Batch(images, targets, [s.reason for s in samples if isinstance(s, Bad)])


@dataclasses.dataclass
class Data:
    """What a run trains and tests on. An index comes with its epoch; None: to be tested."""

    train: Dataset
    held_out: Dataset
    classes: list[str]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# --- a folder of class folders --------------------------------------------------------------------


class Folder(Dataset):
    """files: (path, class). Keys are (epoch or None, index)."""

    def __init__(self, files, how: Preprocessing, seed: int, min_crop: float, flip: float):
        self.files, self.how, self.seed = files, how, seed
        self.min_crop, self.flip = min_crop, flip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key):
        epoch, index = key
        path, target = self.files[index]
        try:
            image = read_image(path)
        except UsageError as error:
            return Bad(str(error))
        if epoch is None:
            return self.how.pixels(image), target
        rng = np.random.default_rng((self.seed, epoch, index))
        return _pixels(self._at_random(image, rng)), target

    def _at_random(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A part of min_crop to 1 of the area and 3:4 to 4:3 of the shape, perhaps mirrored."""
        H, W = self.how.size
        method = Image.Resampling[self.how.interpolation.upper()]
        image = image.resize((W, H), method, box=random_box(image.size, self.min_crop, rng))
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def random_box(size: tuple[int, int], least: float, rng) -> tuple[float, float, float, float]:
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(least, 1.0)
        shape = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    side = min(width, height)  # nothing of that shape fits: the middle
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def find_files(root: Path, name: str) -> dict[str, list[Path]]:
    """Class name: its images, both in order."""
    if not root.is_dir():
        raise UsageError(f"{name}: {root} is no folder: it must hold one folder for each class")
    found = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found[folder.name] = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
        )
        if not found[folder.name]:
            raise UsageError(f"{name}: the class folder {folder} holds no image")
    if len(found) < 2:
        raise UsageError(
            f"{name}: {root} must hold a folder for each of at least two classes, got {len(found)}"
        )
    return found


def split_folder(data: Path, val_data: Path | None, fraction: float):
    """(classes, files to train on, files held out): lists of (path, class)."""
    inside = data / "train"
    beside = next((data / n for n in ("val", "validation", "test") if (data / n).is_dir()), None)
    if inside.is_dir() and val_data is None and beside is not None:
        data, val_data = inside, beside
    train = find_files(data, "--data")
    classes = list(train)
    if val_data is not None:
        held_out = find_files(val_data, "--val-data")
        strange = [name for name in held_out if name not in train]
        if strange:
            raise UsageError(
                f"--val-data: {val_data} has the class {strange[0]!r}, which {data} has not"
            )
    else:
        held_out = {}
        for name, files in train.items():
            order = np.random.default_rng(0).permutation(len(files))
            apart = max(1, round(fraction * len(files)))
            if apart >= len(files):
                raise UsageError(
                    f"--data: class {name!r} has {len(files)} image(s), too few to hold out "
                    f"{fraction:g} of them: name --val-data DIR"
                )
            held_out[name] = [files[i] for i in sorted(order[:apart])]
            train[name] = [files[i] for i in sorted(order[apart:])]
    numbered = {name: i for i, name in enumerate(classes)}
    return classes, *(
        [(path, numbered[name]) for name, files in part.items() for path in files]
        for part in (train, held_out)
    )


def open_folder(o, how: Preprocessing) -> Data:
    val = None if o.val_data is None else Path(o.val_data)
    classes, train, held_out = split_folder(Path(o.data), val, o.val_fraction)
    return Data(
        Folder(train, how, o.seed, o.min_crop, o.flip),
        Folder(held_out, how, o.seed, o.min_crop, o.flip),
        classes, 3, how.mean, how.std,
    )  # fmt: skip


# --- digits ---------------------------------------------------------------------------------------


class Digits(Dataset):
    """8 x 8 pixels, one channel; in training each is moved by at most one pixel both ways."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, seed: int):
        self.images, self.targets, self.seed = images, targets, seed

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key):
        epoch, index = key
        image = self.images[index]
        if epoch is not None:
            dy, dx = np.random.default_rng((self.seed, epoch, index)).integers(0, 3, 2)
            image = np.pad(image, 1)[dy : dy + 8, dx : dx + 8]
        return torch.from_numpy(image[None].copy()), int(self.targets[index])


def open_digits(seed: int) -> Data:
    """A fixed quarter is held out, the same as in `vitkernels demo`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    apart = len(images) // 4
    parts = [
        Digits(images[rows], data.target[rows], seed) for rows in (order[apart:], order[:apart])
    ]
    return Data(*parts, [str(i) for i in range(10)], 1, (DIGITS_MEAN,), (DIGITS_STD,))


# --- batches --------------------------------------------------------------------------------------


class Shuffled:
    """The batches of one epoch for one of `world` processes, from batch `first` on."""

    def __init__(self, length: int, batch: int, seed: int, rank: int = 0, world: int = 1):
        self.length, self.batch, self.seed, self.rank, self.world = length, batch, seed, rank, world
        self.epoch = self.first = 0
        if len(self) == 0:
            raise UsageError(
                f"--batch: {batch} images for each of {world} process(es) are more than the "
                f"{length} to train on"
            )

    def __len__(self) -> int:
        return self.length // (self.batch * self.world)

    def __iter__(self) -> Iterator[list]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        epoch = self.epoch
        for step in range(self.first, len(self)):
            at = (step * self.world + self.rank) * self.batch
            yield [(epoch, i) for i in order[at : at + self.batch]]


class InOrder:
    """The batches of a test: as many for every process, so that collectives meet; an index of
    -1 fills a batch that would be empty."""

    def __init__(self, length: int, batch: int, rank: int = 0, world: int = 1):
        self.length, self.batch, self.rank, self.world = length, batch, rank, world

    def __len__(self) -> int:
        return math.ceil(self.length / (self.batch * self.world))

    def __iter__(self) -> Iterator[list]:
        for step in range(len(self)):
            at = (step * self.world + self.rank) * self.batch
            rows = range(at, min(at + self.batch, self.length))
            yield [(None, i) for i in rows] or [(None, -1)]


class _Filled(Dataset):
    """Index -1 is the first readable image without a target."""

    def __init__(self, base: Dataset):
        self.base = base

    def __getitem__(self, key):
        epoch, index = key
        if index >= 0:
            return self.base[key]
        samples = (self.base[(epoch, i)] for i in range(len(self.base)))
        return next(((s[0], -1) for s in samples if not isinstance(s, Bad)), Bad("no image at all"))


def loader(dataset: Dataset, batches, workers: int, pinned: bool) -> DataLoader:
    """Its workers draw nothing from torch's own generator, which a resumed run must find again."""
    return DataLoader(
        _Filled(dataset) if isinstance(batches, InOrder) else dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pinned,
        generator=torch.Generator().manual_seed(0),
    )
