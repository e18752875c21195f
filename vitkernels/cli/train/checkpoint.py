"""What a run leaves on disk, so that nothing is ever half-written.

    DIR/options.json                 what was asked
    DIR/checkpoints/epoch-0003/      model.safetensors, config.json, state.pt
    DIR/last.json, DIR/best.json     which of them is which
    DIR/log.csv, log.json, curves.png
    DIR/model.safetensors, config.json    the best weights, for `vitkernels predict --weights DIR`

A checkpoint is written under another name and renamed when it is complete; the pointer follows.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..usage import UsageError, one_line, whole_file

WEIGHTS, CONFIG, STATE = "model.safetensors", "config.json", "state.pt"


class CheckpointError(Exception):
    """One line: what could not be saved or read, and what is left."""


class Store:
    """The checkpoints of the run in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"

    def save(self, name: str, weights: dict[str, Tensor], config: dict, state: dict) -> Path:
        """A complete checkpoint, and `last` points to it."""
        try:
            self.checkpoints.mkdir(exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=self.checkpoints))
            try:
                save_file(
                    {k: v.contiguous() for k, v in weights.items()}, building / WEIGHTS,
                    {"format": "pt"},
                )  # fmt: skip
                (building / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
                torch.save(state, building / STATE)
                for path in building.iterdir():
                    _to_disk(path)
                target = self.checkpoints / name
                if target.exists():
                    shutil.rmtree(target)
                building.chmod(0o755)
                building.rename(target)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            self._point("last", target)
            self._prune()
        except Exception as error:  # torch and safetensors have their own for a full disk
            raise CheckpointError(
                f"no checkpoint could be written in {self.checkpoints} ({one_line(error)}): make "
                f"room; {self.last_good()}"
            ) from error
        return target

    def mark_best(self, checkpoint: Path) -> None:
        """These weights are the ones to use: they are in the run's folder, too."""
        try:
            for name in (WEIGHTS, CONFIG):
                with whole_file(self.folder / name) as building:
                    shutil.copyfile(checkpoint / name, building)
            self._point("best", checkpoint)
        except OSError as error:
            raise CheckpointError(
                f"the best weights could not be written in {self.folder} ({one_line(error)}): make "
                f"room; {self.last_good()}"
            ) from error

    def last(self) -> Path | None:
        return self._pointed("last")

    def last_good(self) -> str:
        """For messages."""
        last = self.last()
        if last is None:
            return "there is no earlier checkpoint"
        return f"the last good one is {last}: go on with --resume {self.folder}"

    def read(self, checkpoint: Path) -> tuple[dict[str, Tensor], dict]:
        try:
            weights = load_file(checkpoint / WEIGHTS)
            return weights, torch.load(checkpoint / STATE, weights_only=True)
        except Exception as error:  # of safetensors, pickle, zip
            raise UsageError(
                f"--resume: {checkpoint} is damaged ({one_line(error)}): name another checkpoint "
                f"in {self.folder / 'last.json'}"
            ) from error

    def _point(self, name: str, checkpoint: Path) -> None:
        with whole_file(self.folder / f"{name}.json") as building:
            relative = checkpoint.relative_to(self.folder)
            building.write_text(json.dumps({"checkpoint": str(relative)}) + "\n")

    def _pointed(self, name: str) -> Path | None:
        try:
            found = json.loads((self.folder / f"{name}.json").read_text())["checkpoint"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self.folder / found if (self.folder / found).is_dir() else None

    def _prune(self, keep: int = 2) -> None:
        """Only the newest checkpoints stay, and the best."""
        best = self._pointed("best")
        found = sorted(
            (p for p in self.checkpoints.iterdir() if not p.name.startswith(".")),
            key=lambda p: p.stat().st_mtime,
        )
        for path in found[:-keep]:
            if path != best:
                shutil.rmtree(path)


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


# --- random numbers -------------------------------------------------------------------------------


def random_state() -> dict:
    """Of every generator that a step may draw from, as torch.load takes it without pickles."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
