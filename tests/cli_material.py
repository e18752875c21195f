"""What the tests of the command line share: a tiny checkpoint, pictures, a run in this process."""

import json

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from vitkernels import FusedViT, cli

CLASSES = 7
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}


def tiny_model(**settings) -> FusedViT:
    """Evaluating; every parameter random, so that each one matters."""
    torch.manual_seed(4)
    model = FusedViT(**{**TINY, "num_classes": CLASSES, **settings}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save_tiny(folder, name="tiny.pth", **settings):
    """(path, model) of a checkpoint in a folder."""
    model = tiny_model(**settings)
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
