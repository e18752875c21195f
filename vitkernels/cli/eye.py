"""The model that `predict` and `attention-map` look through: weights, device, dtype, pixels."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from . import naming
from .arguments import DEFAULT_MODEL, DTYPES
from .images import Preprocessing, read_image
from .recipe import preprocessing
from .usage import UsageError, device_of


@dataclasses.dataclass
class Eye:
    """A model in evaluation mode, and how images become its input."""

    model: nn.Module
    preprocessing: Preprocessing
    device: torch.device

    @staticmethod
    def open(options: argparse.Namespace) -> Eye:
        device = device_of(options.device)
        settings = {} if options.image_size is None else {"img_size": options.image_size}
        if options.weights is None:
            torch.manual_seed(0)
            model = naming.make_model(options.model or DEFAULT_MODEL, **settings)
        else:
            model = naming.load_model(options.model, options.weights, **settings)
        if model.in_chans not in (1, 3):
            raise UsageError(f"the model takes {model.in_chans} channels: images have 1 or 3")
        how = preprocessing(options, model, options.weights)
        model.patch_embed.set_normalization(how.mean, how.std)
        return Eye(model.to(device, DTYPES[options.dtype]).eval(), how, device)

    def read(self, path: Path) -> tuple[Image.Image, Tensor]:
        """The upright image, and the pixels that the model takes."""
        image = read_image(path, self.model.in_chans)
        return image, self.preprocessing.pixels(image)

    def input(self, pixels: list[Tensor]) -> Tensor:
        """A batch of uint8 pixels; the model normalises them itself."""
        return torch.stack(pixels).to(self.device)
