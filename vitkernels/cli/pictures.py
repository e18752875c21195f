"""Draws attention over the image that the model saw."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

PAPER, INK, FAINT = "#101218", "#f2f2f2", "#9aa0ac"
DIM = 0.45  # of the gray image under the heat
LOW, HIGH = 0.01, 0.995  # the quantiles of a map that are drawn darkest and brightest
SIDE, LEAST = 2.1, 4.2  # inches of a small panel, and of the image itself


def draw(path: Path, pixels: Tensor, panels: list[tuple[str, Tensor]], model: str, name: str):
    """The image on the left, its maps on the right: one large, or a grid of small ones."""
    image = pixels.expand(3, -1, -1).float() / 255
    n = len(panels)
    columns = math.ceil(math.sqrt(n * 4 / 3)) if n > 1 else 1
    rows = math.ceil(n / columns)
    large = max(rows * SIDE, LEAST)
    shape = image.shape[-1] / image.shape[-2]
    side = large / rows
    figure = Figure(
        figsize=((large + columns * side) * shape + 0.7, large + 0.85),
        facecolor=PAPER,
        layout="constrained",
    )
    figure.suptitle(f"{name}   ·   {model}", color=INK, fontsize=11, x=0.012, ha="left")
    left, right = figure.subfigures(1, 2, width_ratios=(large, columns * side), facecolor=PAPER)
    _panel(left.subplots(), image, "what the model sees")
    places = right.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, heat) in zip(places, panels, strict=False):
        _panel(axes, glowing(image, heat), title)
    for axes in places[n:]:
        axes.set_visible(False)
    figure.savefig(path, dpi=140, facecolor=PAPER)


def _panel(axes, image: Tensor, title: str) -> None:
    axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="lanczos")
    axes.set_axis_off()
    axes.set_title(title, color=FAINT, fontsize=9, loc="left", pad=3)


def glowing(image: Tensor, heat: Tensor) -> Tensor:
    """The image in dim gray; what is attended to lights up, in the colours of `inferno`."""
    from matplotlib import colormaps

    size = image.shape[-2:]
    low, high = torch.quantile(heat.flatten(), torch.tensor([LOW, HIGH])).tolist()
    heat = ((heat - low) / max(high - low, 1e-12)).clamp(0, 1)
    heat = F.interpolate(heat[None, None], size=size, mode="bicubic")[0, 0].clamp(0, 1)
    colour = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).float().permute(2, 0, 1)
    gray = DIM * image.mean(0, keepdim=True)
    strength = 0.80 * heat.sqrt()
    return gray * (1 - strength) + colour * strength + 0.35 * image * heat
