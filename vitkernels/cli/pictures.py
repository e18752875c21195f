"""Draws attention over the image that the model saw."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from .heat import Panel

PAPER, INK, FAINT, RING = "#101218", "#f2f2f2", "#9aa0ac", "#40e0d0"
DIM = 0.45  # of the gray image under the heat
LOW, HIGH = 0.01, 0.995  # the quantiles of a map that are drawn darkest and brightest
SIDE, LEAST = 2.1, 4.2  # inches of a small panel, and of the image itself


def draw(path: Path, pixels: Tensor, panels: list[Panel], model: str, name: str):
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
    for axes, panel in zip(places, panels, strict=False):
        smooth = panel.windows is None
        _panel(axes, glowing(image, panel.heat, "bicubic" if smooth else "nearest"), panel.title)
        _mark(axes, panel, image.shape[-2:])
    for axes in places[n:]:
        axes.set_visible(False)
    figure.savefig(path, dpi=140, facecolor=PAPER)


def _panel(axes, image: Tensor, title: str) -> None:
    axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="lanczos")
    axes.set_axis_off()
    axes.set_title(title, color=FAINT, fontsize=9, loc="left", pad=3)


def _mark(axes, panel: Panel, size: tuple[int, int]) -> None:
    """The borders of the windows, and a ring around the token that looks."""
    (rows, columns), (H, W) = panel.heat.shape, size
    if panel.windows is not None:
        for cut in _borders(panel.windows):
            axes.axhline(cut * H / rows - 0.5, color=INK, lw=0.4, alpha=0.5)
        for cut in _borders(panel.windows.mT):
            axes.axvline(cut * W / columns - 0.5, color=INK, lw=0.4, alpha=0.5)
    if panel.query is not None:
        row, column = panel.query
        at = ((column + 0.5) * W / columns - 0.5, (row + 0.5) * H / rows - 0.5)
        axes.plot(*at, "o", ms=6, mfc="none", mec=RING, mew=1.2)


def _borders(windows: Tensor) -> list[int]:
    """The rows at which another window begins."""
    return [i + 1 for i in (windows[1:] != windows[:-1]).any(1).nonzero().flatten().tolist()]


def glowing(image: Tensor, heat: Tensor, interpolation: str = "bicubic") -> Tensor:
    """The image in dim gray; what is attended to lights up, in the colours of `inferno`."""
    from matplotlib import colormaps

    size = image.shape[-2:]
    low, high = torch.quantile(heat[~heat.isnan()], torch.tensor([LOW, HIGH])).tolist()
    heat = ((heat - low) / max(high - low, 1e-12)).clamp(0, 1).nan_to_num(0)
    heat = F.interpolate(heat[None, None], size=size, mode=interpolation)[0, 0].clamp(0, 1)
    colour = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).float().permute(2, 0, 1)
    gray = DIM * image.mean(0, keepdim=True)
    strength = 0.80 * heat.sqrt()
    return gray * (1 - strength) + colour * strength + 0.35 * image * heat
