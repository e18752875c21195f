"""What the tests of the command line share: a tiny checkpoint, pictures, a run in this process."""

import argparse
import json

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from vitkernels import FusedSwin, FusedViT, cli

CLASSES = 7
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
# Maps of 8 x 8 and 4 x 4: four windows, shifted in every second block, then one.
TINY_SWIN = {
    "img_size": 32, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4,
}  # fmt: skip


def tiny_model(**settings) -> FusedViT:
    """Evaluating; every parameter random, so that each one matters."""
    torch.manual_seed(4)
    return _stirred(FusedViT(**{**TINY, "num_classes": CLASSES, **settings}).eval())


def tiny_swin(**settings) -> FusedSwin:
    torch.manual_seed(4)
    return _stirred(FusedSwin(**{**TINY_SWIN, "num_classes": CLASSES, **settings}).eval())


def _stirred(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save_tiny(folder, name="tiny.pth", **settings):
    """(path, model) of a checkpoint in a folder."""
    model = tiny_model(**settings)
    torch.save(model.state_dict(), folder / name)
    return folder / name, model


def save_tiny_swin(folder, name="tiny.pth", **settings):
    model = tiny_swin(**settings)
    torch.save(model.state_dict(), folder / name)
    return folder / name, model


def photograph(name="china") -> Image.Image:
    """One of scikit-learn's two, 640 x 427."""
    names = ("china", "flower")
    return Image.fromarray(load_sample_images().images[names.index(name)])


def save_photograph(folder, name="china"):
    path = folder / f"{name}.jpg"
    photograph(name).save(path, quality=95)
    return path


def gradient(width=48, height=40, mode="RGB") -> Image.Image:
    """A smooth picture of any size, cheap to make."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 128 + 0 * x]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)


def run(capsys, *arguments) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `vitkernels ARGUMENTS`."""
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def predict_json(capsys, *arguments) -> list[dict]:
    status, out, err = run(capsys, "predict", *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def drawing(**options) -> argparse.Namespace:
    """Arguments of attention-map, for what draws its panels."""
    usual = {"rollout": False, "block": None, "stage": None, "head": "mean", "query": None}
    return argparse.Namespace(**{**usual, **options})
