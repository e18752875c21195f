"""`vitkernels attention-map`: where a ViT looks, over the image."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from .arguments import DEFAULT_MODEL, add_model
from .usage import UsageError, check_output_file, need, threads, whole_file

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def configure(commands) -> None:
    parser = commands.add_parser(
        "attention-map",
        help="show where a model looks in an image",
        description="What the class token attends to (without one: what all patches attend to), "
        "over the image; by default every block, as the mean over its heads.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--block", type=int, metavar="N", help="one block: 0 is the first, -1 last")
    parser.add_argument(
        "--head", type=_head, default="mean", metavar="N|mean|all", help="all: of one block"
    )
    parser.add_argument(
        "--rollout", action="store_true", help="through all blocks (Abnar and Zuidema 2020)"
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
    from .usage import check_input_file

    if options.rollout and (options.block is not None or options.head != "mean"):
        raise UsageError("--rollout is over all blocks and heads: leave out --block and --head")
    check_input_file(options.image, "IMAGE")
    check_output_file(options.out, "--out", FORMATS)
    if options.out.exists() and options.out.samefile(options.image):
        raise UsageError(f"--out: {options.out} is the image itself: name another file")
    with threads(options.threads):
        eye = Eye.open(options)
        _check_numbers(options, eye.model)
        image, pixels = eye.read(options.image)
        panels = heat_panels(eye.model, eye.input([pixels]), options)
    name = options.model or (DEFAULT_MODEL if options.weights is None else "ViT")
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


def _check_numbers(options, model) -> None:
    depth, heads = len(model.blocks), model.blocks[0].attn.num_heads
    if options.block is not None and not -depth <= options.block < depth:
        raise UsageError(f"--block: the model has the blocks 0 to {depth - 1}, got {options.block}")
    if isinstance(options.head, int) and options.head >= heads:
        raise UsageError(f"--head: the model has the heads 0 to {heads - 1}, got {options.head}")


@torch.no_grad()
def heat_panels(model, x: Tensor, options) -> list[tuple[str, Tensor]]:
    """(title, heat of each patch in the grid) of every picture to draw."""
    from ..models import attention_rollout

    grid = model.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
    P = model.num_prefix_tokens

    def on_grid(rows: Tensor) -> Tensor:
        """(queries, N) to (grid): the class token's row, or the mean over the patches' rows."""
        row = rows[0] if model.has_class_token else rows.mean(0)
        return row[P:].float().cpu().reshape(grid)

    if options.rollout:
        full = model.attention_maps(x)
        return [("rollout through all blocks", on_grid(attention_rollout(full)[0]))]
    maps = model.attention_maps(x, [0] if model.has_class_token else None)
    depth = len(maps)
    block = options.block if options.block is not None or options.head != "all" else depth - 1
    chosen = range(depth) if block is None else [block % depth]
    if options.head == "all":
        return [(f"block {chosen[0]}, head {h}", on_grid(m)) for h, m in enumerate(maps[block][0])]
    if options.head == "mean":
        return [(f"block {i}", on_grid(maps[i][0].mean(0))) for i in chosen]
    return [(f"block {i}, head {options.head}", on_grid(maps[i][0, options.head])) for i in chosen]
