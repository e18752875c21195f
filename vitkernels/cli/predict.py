"""`vitkernels predict`: the most probable classes of images, from a local checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from .arguments import add_model, positive
from .usage import UsageError, need, threads


def configure(commands) -> None:
    parser = commands.add_parser(
        "predict",
        help="classify images with a local checkpoint",
        description="Classify images with a local checkpoint. Images are turned upright by their "
        "EXIF, laid on white where they are transparent, and resized and cropped as timm's "
        "evaluation does it.",
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="files or folders")
    add_model(parser)
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the classes: text lines or JSON; by default those of config.json "
        "beside the weights",
    )
    parser.add_argument("--topk", type=positive, default=5, metavar="K")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="images at a time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    need("predict", "cli", "numpy", "PIL", "rich")
    from .eye import Eye
    from .images import find_images
    from .labels import labels_beside, read_labels
    from .output import console
    from .progress import bar

    if options.weights is None:
        raise UsageError("predict needs --weights FILE: a model with random weights only guesses")
    paths = find_images(options.images)
    with threads(options.threads):
        eye = Eye.open(options)
        if eye.model.num_classes < 1:
            raise UsageError(f"--weights: {options.weights} has no classifier: name another file")
        if options.labels is not None:
            labels = read_labels(options.labels, eye.model.num_classes)
        else:
            labels = labels_beside(options.weights, eye.model.num_classes)
        found = []
        with bar(console(stderr=True), "images", len(paths)) as step:
            for start in range(0, len(paths), options.batch):
                found += _classify(eye, paths[start : start + options.batch], labels, options, step)
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print(found, eye)
    return 0


def _classify(eye, paths: list[Path], labels, options, step) -> list[dict]:
    images, pixels = zip(*map(eye.read, paths), strict=True)
    with torch.inference_mode():
        probabilities = eye.model(eye.input(list(pixels))).float().softmax(-1).cpu()
    if not probabilities.isfinite().all():
        raise UsageError(
            f"the model's outputs for {paths[0]} are not numbers: check the weights, or --dtype "
            "float32"
        )
    top = probabilities.topk(min(options.topk, probabilities.shape[-1]))
    for path in paths:
        step(path.name)
    return [
        {
            "image": str(path),
            "width": image.width,
            "height": image.height,
            "predictions": [
                {"class": i, "label": labels[i] if labels else f"class {i}", "probability": p}
                for i, p in zip(classes, values, strict=True)
            ],
        }
        for path, image, classes, values in zip(
            paths, images, top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]


def _print(found: list[dict], eye) -> None:
    from .output import console, table

    made = table("image", "label", "class", "probability", left=2)
    for entry in found:
        for i, row in enumerate(entry["predictions"]):
            made.add_row(
                "" if i else entry["image"], row["label"], str(row["class"]),
                f"{row['probability']:.2%}", end_section=row is entry["predictions"][-1],
            )  # fmt: skip
    out = console()
    out.print(made)
    out.print(eye.preprocessing.describe())
