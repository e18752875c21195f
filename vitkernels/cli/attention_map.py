"""`vitkernels attention-map`: where a model looks, over the image."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .arguments import DEFAULT_MODEL, add_model, point
from .usage import UsageError, check_output_file, need, threads, whole_file

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def configure(commands) -> None:
    parser = commands.add_parser(
        "attention-map",
        help="show where a model looks in an image",
        description="Of a ViT, what the class token attends to (without one: what all patches "
        "attend to). Of a Swin, the attention that each token receives from the tokens of its "
        "window, every window at its place in the image. By default of every block, as the mean "
        "over its heads.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--block", type=int, metavar="N", help="one block: 0 is the first, -1 last")
    parser.add_argument("--stage", type=int, metavar="N", help="the blocks of one stage of a Swin")
    parser.add_argument(
        "--head", type=_head, default="mean", metavar="N|mean|all", help="all: of one block"
    )
    parser.add_argument(
        "--rollout", action="store_true", help="through all blocks (Abnar and Zuidema 2020)"
    )
    parser.add_argument(
        "--query",
        type=point,
        metavar="X,Y",
        help="what the token at this point attends to; shares of width and height: 0.5,0.5",
    )
    add_model(parser)
    parser.set_defaults(run=run)


def _head(text: str):
    if text in ("mean", "all"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a head's number, mean or all, got {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    need("attention-map", "cli", "numpy", "PIL", "matplotlib")
    from .eye import Eye
    from .families import family_of
    from .heat import check_numbers, panels_of
    from .usage import check_input_file

    if options.block is not None and options.stage is not None:
        raise UsageError("--stage is of all its blocks: name it or --block")
    if options.rollout and (options.block is not None or options.head != "mean"):
        raise UsageError("--rollout is over all blocks and heads: leave out --block and --head")
    check_input_file(options.image, "IMAGE")
    check_output_file(options.out, "--out", FORMATS)
    if options.out.exists() and options.out.samefile(options.image):
        raise UsageError(f"--out: {options.out} is the image itself: name another file")
    with threads(options.threads):
        eye = Eye.open(options)
        check_numbers(eye.model, options)
        image, pixels = eye.read(options.image)
        panels = panels_of(eye.model, eye.input([pixels]), options)
    what = DEFAULT_MODEL if options.weights is None else family_of(eye.model).title
    name = options.model or what
    weights = options.weights.name if options.weights else "RANDOM weights"
    if options.weights is None:
        print(
            "vitkernels: no --weights FILE: this is where a model with random weights looks",
            file=sys.stderr,
        )
    from .pictures import draw

    with whole_file(options.out) as building:
        draw(building, pixels, panels, f"{name}, {weights}", options.image.name)
    maps = "1 map" if len(panels) == 1 else f"{len(panels)} maps"
    print(f"{options.out}: {maps} of {eye.preprocessing.describe()}")
    return 0
