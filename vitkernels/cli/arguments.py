"""The arguments that commands share. Nothing heavy is imported: every command's --help needs it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from .. import _dispatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DEFAULT_MODEL = "vit_small_patch16_224"
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
# "center": the shorter side to size / crop_pct, then the centre; "squash": both sides; "border":
# the longer side, with a border of the mean colour.
CROP_MODES = ("center", "squash", "border")


def positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text!r}")
    return int(text)


def fraction(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value


def point(text: str) -> tuple[float, float]:
    """ "0.5,0.5" is the middle of the image."""
    values = tuple(_number(part) for part in text.split(","))
    if len(values) != 2 or not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"must be X,Y from 0,0 (upper left) to 1,1 (lower right), got {text!r}"
        )
    return values


def channels(text: str) -> tuple[float, ...]:
    """ "0.5" or "0.485,0.456,0.406"."""
    values = tuple(_number(part) for part in text.split(","))
    if not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(
            f"must be one number, or one for each channel with commas between, got {text!r}"
        )
    return values


def one_or_many(choices: dict):
    """The type of a comma-separated list of names: "float32,bfloat16"."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(
                    f"must be of {', '.join(choices)}, with commas between, got {name!r}"
                )
        return list(dict.fromkeys(names))

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)"
    )


def add_backend(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--backend",
        choices=("auto", *_dispatch.BACKEND_NAMES),
        default="auto",
        help=f"what {what} runs on (default: auto)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="timm's name (default: what the weights look like)"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="checkpoint: .safetensors, .pth, .bin, .npz, or a folder with config.json",
    )
    parser.add_argument(
        "--image-size", type=positive, metavar="N", help="pixels (default: the model's own)"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    add_device(parser)
    add_preprocessing(parser)


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "preprocessing",
        "by default from config.json or preprocessor_config.json beside the weights, else what "
        "timm records for the model, else the usual values of ViT",
    )
    group.add_argument("--mean", type=channels, metavar="M[,M,M]", help="of pixels in [0, 1]")
    group.add_argument("--std", type=channels, metavar="S[,S,S]")
    group.add_argument("--crop-pct", type=fraction, metavar="F", help="share that is kept: 0.9")
    group.add_argument("--crop-mode", choices=CROP_MODES)
    group.add_argument("--interpolation", choices=INTERPOLATIONS)
