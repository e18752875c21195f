"""`vitkernels train`: a model of any family here, on a folder of images or on digits."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import time
from pathlib import Path

from ..usage import UsageError, device_of, need, threads
from . import options as arguments
from .options import DIGITS_MODEL, DIGITS_SIZES, Options

SECONDS_FOR_THE_FIRST = 3.0
# All that a run leaves which did not come to its first checkpoint: there is nothing to go on with.
BEFORE_A_CHECKPOINT = {arguments.FILE, "teacher.pt"}


def configure(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model on a folder of images",
        description="Train with AdamW, a warm-up and a cosine. DIR of --out gets checkpoints, a "
        "log (CSV, JSON, curves.png) and the best weights, ready for `vitkernels predict "
        "--weights DIR`. Ctrl-C saves and ends; --resume DIR goes on, on a CPU bit for bit. "
        "Several processes: torchrun --nproc-per-node N -m vitkernels train ...",
        argument_default=argparse.SUPPRESS,
    )
    arguments.configure(parser)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    from .data import Unreadable

    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))  # torchrun's
    try:
        return _run(given)
    except UsageError as error:
        if local == 0 or isinstance(error, Unreadable):
            raise
        time.sleep(SECONDS_FOR_THE_FIRST)  # in which the first of this machine says it
        return 2
    except RuntimeError as error:
        if not re.search(r"[Cc]onnection (closed|reset)|NCCL", str(error)):
            raise
        print(f"vitkernels: process {rank} ends because another one did", file=sys.stderr)
        return 1


def _run(given: argparse.Namespace) -> int:
    need("train", "cli", "numpy", "PIL", "rich", "matplotlib")
    need("train", "checkpoints", "safetensors")
    from rich.console import Console

    from ..output import console
    from . import recipe
    from .checkpoint import CheckpointError
    from .engine import Stopped
    from .parallel import joined

    o = arguments.read(given)
    if o.data == "digits":
        need("train --data digits", "demo", "sklearn")
    recipe.check(o)
    device = device_of(o.device)
    resuming = getattr(given, "resume", None) is not None
    with threads(o.threads), joined(device) as world:
        out = console() if world.first else Console(file=io.StringIO())
        try:
            o = _shared(o, world) if resuming else _began(o, world)
            if world.first and not resuming:
                _make_folder(o)
            if o.compare_seeds is not None:
                from .study import compare

                compare(o, device, out)
            else:
                train(o, world, device, out, resuming)
        except (Stopped, CheckpointError) as error:
            if world.first:
                print(f"vitkernels: {error}", file=sys.stderr)
            return 130 if str(error).startswith("interrupted") else 1
        except UsageError:
            if world.first and not resuming:
                _remove_unused(Path(o.out))
            raise
    return 0


def train(o: Options, world, device, console, resuming: bool = False, teacher=None) -> dict:
    """One run; the last row of its log."""
    from .distill import make_teacher
    from .engine import Trainer

    data, model, config = prepare(o)
    folder = Path(o.out)
    console.print(
        f"{config['architecture']}: {_amount(model)} parameters; {len(data.train)} images of "
        f"{len(data.classes)} classes, {len(data.held_out)} held out; {device}"
        + (f", {world.size} processes ({o.parallel})" if world.size > 1 else "")
    )
    if teacher is None and o.teacher is not None:
        teacher = _first_alone(world, lambda: make_teacher(o, data, device, console, folder))
    trainer = Trainer(o, data, model, config, world, device, console, teacher)
    batch = o.batch * o.accumulate * world.data(o.parallel)[1]
    console.print(
        f"  {_count(o.epochs, 'epoch')} of {_count(trainer.steps, 'step')}, {batch} images each"
    )
    if resuming:
        trainer.resume()
    last = trainer.fit()
    if last:
        console.print(
            f"  best {trainer.at.best[0]:.2%}; weights, curves and log in {folder}: "
            f"vitkernels predict IMAGE --weights {folder}"
        )
    return {**last, "best_accuracy": trainer.at.best[0]} if last else {}


def _amount(model) -> str:
    number = sum(p.numel() for p in model.parameters())
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number:,}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _began(o: Options, world) -> Options:
    if o.compare_seeds is not None and world.size > 1:
        raise UsageError("--compare-seeds takes one process: start it without torchrun")
    return dataclasses.replace(o, processes=world.data(o.parallel)[1])


def _shared(o: Options, world) -> Options:
    """As many images in each step as the run began with, whoever goes on with it."""
    images, processes = o.batch * o.processes, world.data(o.parallel)[1]
    if images % processes:
        raise UsageError(
            f"--resume: {processes} processes cannot share the {images} images of a step evenly: "
            "use a number of processes that divides them"
        )
    return dataclasses.replace(o, batch=images // processes, processes=processes)


def _first_alone(world, make):
    """The first process makes a file, the others then read it."""
    if world.size == 1:
        return make()
    import torch.distributed as dist

    made = make() if world.first else None
    dist.barrier()
    return made if world.first else make()


def _make_folder(o: Options) -> None:
    folder = Path(o.out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out: {folder} is a file: name a new folder")
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if left and not (arguments.FILE in left and left <= BEFORE_A_CHECKPOINT):
        how = (
            f"go on with it by --resume {folder}, or " if (folder / arguments.FILE).exists() else ""
        )
        raise UsageError(f"--out: {folder} is not empty: {how}name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in left:
            (folder / name).unlink()
        o.save(folder)
    except OSError as error:
        raise UsageError(f"--out: cannot write in {folder}: {error.strerror}") from error


def _remove_unused(folder: Path) -> None:
    """A run that was refused leaves nothing behind."""
    left = list(folder.iterdir()) if folder.is_dir() else []
    if left and {path.name for path in left} <= BEFORE_A_CHECKPOINT:
        for path in left:
            path.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()


# --- data and model -------------------------------------------------------------------------------


def prepare(o: Options):
    """(data, model, config.json of the checkpoints)."""

    import torch

    from .. import naming
    from ..families import plain_family
    from ..images import Preprocessing
    from .checkpoint import seed_everything
    from .data import open_digits, open_folder

    seed_everything(o.seed)
    digits = o.data == "digits"
    if digits:
        data = open_digits(o.seed)
        name = o.model or DIGITS_MODEL
        settings = {"in_chans": 1} | (DIGITS_SIZES if o.model is None else {}) | o.model_kwargs
        if o.image_size is not None:
            raise UsageError("--image-size: the digits have 8x8 pixels")
        settings.setdefault("img_size", 8)
        if plain_family(name) is not None:  # the usual ones may be of three channels
            settings |= {"mean": data.mean, "std": data.std}
    else:
        how = Preprocessing((1, 1))
        data = open_folder(o, how)
        name, settings = o.model or naming_default(), dict(o.model_kwargs)
        if o.image_size is not None:
            settings["img_size"] = o.image_size
    settings |= {"num_classes": len(data.classes), "drop_path_rate": o.drop_path}
    try:
        if o.weights is not None:
            model = naming.load_model(o.model, Path(o.weights), **settings)
        else:
            model = naming.make_model(name, **settings)
    except TypeError as error:
        raise UsageError(f"--model-kwargs: {' '.join(str(error).split())}") from error
    if model.in_chans != data.in_chans:
        raise UsageError(
            f"--model: takes {model.in_chans} channels, the images have {data.in_chans}"
        )
    if digits and o.model is None:  # so small an image is told apart by where its strokes are
        torch.nn.init.normal_(model.pos_embed, std=0.5)
    embed = model.patch_embed
    mean, std = o.mean or (data.mean if digits else None), o.std or (data.std if digits else None)
    try:
        embed.set_normalization(_each(mean, data.in_chans), _each(std, data.in_chans))
    except ValueError as error:
        raise UsageError(f"--mean, --std: {str(error).removeprefix('PatchEmbed: ')}") from error
    data.mean, data.std = tuple(embed.mean.tolist()), tuple(embed.std.tolist())
    size = embed.img_size
    if not digits:
        for part in (data.train, data.held_out):
            part.how = dataclasses.replace(part.how, size=size, mean=data.mean, std=data.std)
    config = {
        **_identity(o, name, model, settings),
        "num_classes": len(data.classes),
        "label_names": data.classes,
        "pretrained_cfg": {
            "input_size": [data.in_chans, *size],
            "mean": list(data.mean),
            "std": list(data.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0 if digits else 0.9,
            "crop_mode": "center",
        },
    }
    return data, model.train(), config


def _each(values, in_chans: int):
    """One number stands for all channels."""
    return values * in_chans if values is not None and len(values) == 1 else values


def _identity(o: Options, name: str, model, settings: dict) -> dict:
    """The architecture and all of its arguments that neither the name nor the weights tell."""
    from ..families import family_of

    beside = None if o.weights is None else Path(o.weights) / "config.json"
    before = json.loads(beside.read_text()) if beside is not None and beside.is_file() else {}
    if o.model is None and o.weights is not None:
        name = before.get("architecture", type(model).__name__)
    apart = ("num_classes", "drop_path_rate", "weight_init", "mean", "std")
    told = before.get("model_args", {}) | settings | family_of(model).saved(model)
    return {
        "architecture": name,
        "model_args": {key: value for key, value in told.items() if key not in apart},
    }


def naming_default() -> str:
    from ..arguments import DEFAULT_MODEL

    return DEFAULT_MODEL
