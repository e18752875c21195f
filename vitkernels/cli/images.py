"""From image files to the uint8 pixels that a model takes, as timm's evaluation transform does."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .usage import UsageError, check_input_file, one_line

SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the model sees it, and where that was read."""

    size: tuple[int, int]  # (height, width) of what the model takes
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    crop_pct: float = 0.9
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    source: str = "by default"

    def describe(self) -> str:
        mean, std = (", ".join(f"{v:g}" for v in dict.fromkeys(t)) for t in (self.mean, self.std))
        return (
            f"{self.size[0]}x{self.size[1]} pixels, {self.crop_mode} crop {self.crop_pct:g}, "
            f"{self.interpolation}, mean {mean}, std {std}: {self.source}"
        )

    def pixels(self, image: Image.Image) -> Tensor:
        """(channels, height, width), uint8."""
        cut = self.cut(image)
        array = np.array(cut)  # a copy: torch wants to be able to write
        return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())

    def cut(self, image: Image.Image) -> Image.Image:
        """Resized and cropped to `size`."""
        H, W = self.size
        scaled = [math.floor(side / self.crop_pct) for side in self.size]
        width, height = image.size
        if self.crop_mode == "squash":
            height, width = scaled
        elif self.crop_mode == "center" and H == W:
            short, long = sorted((width, height))
            long = int(scaled[0] * long / short)
            width, height = (scaled[0], long) if width <= height else (long, scaled[0])
        else:
            choose = max if self.crop_mode == "border" else min
            ratio = choose(height / scaled[0], width / scaled[1])
            width, height = round(width / ratio), round(height / ratio)
        if (width, height) != image.size:
            method = Image.Resampling[self.interpolation.upper()]
            image = image.resize((max(width, 1), max(height, 1)), method)
        return _centre(image, W, H, self._border(image))

    def _border(self, image: Image.Image):
        """The mean colour where the image has to be padded on purpose, else black."""
        if self.crop_mode != "border":
            return 0
        fill = tuple(round(255 * m) for m in _each(self.mean, len(image.getbands())))
        return fill[0] if len(fill) == 1 else fill


def _each(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values


def _centre(image: Image.Image, width: int, height: int, fill) -> Image.Image:
    """The centre of the image, padded where it is smaller than asked."""
    wide, high = image.size
    if wide < width or high < height:
        left, top = max(width - wide, 0) // 2, max(height - high, 0) // 2
        padded = Image.new(image.mode, (max(wide, width), max(high, height)), fill)
        padded.paste(image, (left, top))
        image = padded
        wide, high = image.size
    left, top = round((wide - width) / 2), round((high - height) / 2)
    return image.crop((left, top, left + width, top + height))


# --- files ----------------------------------------------------------------------------------------


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files named, and those under the folders named, in order."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UsageError(f"IMAGE: the folder {path} holds no image ({' '.join(SUFFIXES)})")
            found += inside
        else:
            found.append(check_input_file(path, "IMAGE"))
    return found


def read_image(path: Path, in_chans: int = 3) -> Image.Image:
    """Upright as its EXIF says, RGB (or gray for one channel), 8 bits, on white where it is
    transparent; of an animation the first picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an image above 89 megapixels is no attack yet
            with Image.open(path) as file:
                file.load()
                image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError:
        what = "is not an image that Pillow can read: name a JPEG, PNG, ..."
        raise UsageError(f"{path} {what}") from None
    except Image.DecompressionBombError:
        what = "has too many pixels to be decoded safely: make it smaller first"
        raise UsageError(f"{path} {what}") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        what = f"is damaged or incomplete ({one_line(error)}): fetch it again"
        raise UsageError(f"{path} {what}") from error
    return _on_white(_eight_bits(image, path)).convert("L" if in_chans == 1 else "RGB")


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Gray of 16 or 32 bits, which convert() would clip instead of scale."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and 255 < high <= 65535 and low >= 0):
        values = values / 257
    elif image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif not (low >= 0 and high <= 255):
        raise UsageError(
            f"{path} holds gray values from {low:g} to {high:g}, whose range is not known: "
            "convert it to 8 bits first"
        )
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """Transparency over white; an opaque image as it is."""
    if not (image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info):
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image)
