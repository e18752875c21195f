"""The demo's pictures: curves, and attention over digits and a photograph."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from ...models import attention_rollout
from .agreement import Agreement
from .digits import MEAN, STD, Digits, Training

BLUE, ORANGE, GREEN, GRAY = "#1f5fa8", "#d9762b", "#3b8a4a", "#777777"
DIGITS_SHOWN = (0, 2, 3, 5, 8)
SMALLEST = 1e-8  # below the spacing of fp32 losses: equal ones are drawn here
PHOTO_SIDE = 64  # pixels that the digits model sees: 32 x 32 patches


def draw_curves(path: Path, training: Training, agreement: Agreement, per_epoch: int) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    epochs = torch.arange(1, len(training.losses) + 1) / per_epoch
    left.plot(epochs, training.losses, color=BLUE, alpha=0.2, lw=0.7)
    left.plot(epochs, _smooth(training.losses), color=BLUE, lw=1.8)
    left.set(title="Training on handwritten digits", xlabel="epoch", ylabel="loss", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    left.yaxis.label.set_color(BLUE)
    held_out = left.twinx()
    held_out.plot(range(1, len(training.accuracies) + 1), training.accuracies, color=ORANGE, lw=1.8)
    held_out.set(ylabel="held-out accuracy", ylim=(0, 1.08))
    held_out.yaxis.label.set_color(ORANGE)
    held_out.annotate(
        f"{training.accuracies[-1]:.1%}", (len(training.accuracies), training.accuracies[-1]),
        (0, 6), ha="right", textcoords="offset points", color=ORANGE,
    )  # fmt: skip
    mark = training.checkpoint["step"] / per_epoch
    left.axvline(mark, color=GRAY, lw=1, ls=":")
    left.annotate(
        "checkpoint ", (mark, 0.03), xycoords=left.get_xaxis_transform(), color=GRAY, fontsize=8,
        rotation=90, ha="right",
    )  # fmt: skip

    steps = range(1, len(agreement.fused) + 1)
    middle.plot(steps, agreement.float64, color=GRAY, lw=5, alpha=0.35, label="reference float64")
    middle.plot(steps, agreement.reference, color=ORANGE, lw=2.4, label="reference fp32")
    middle.plot(steps, agreement.fused, color=BLUE, lw=1.2, ls="--", label="fused fp32")
    middle.set(title="From the checkpoint, three ways", xlabel="step", ylabel="loss")
    middle.legend(frameon=False)

    for curve, color, label in (
        (_gap(agreement.fused, agreement.reference), BLUE, "fused vs reference"),
        (_gap(agreement.reference, agreement.float64), ORANGE, "reference vs float64"),
    ):
        right.plot(steps, curve, color=color, lw=1.6, label=label)
    right.axhline(agreement.allowed, color=GRAY, ls="--", lw=1.2, label="allowed")
    right.set(title="Difference of the losses", xlabel="step", ylabel="|difference|", yscale="log")
    right.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.94))
    for axes in (left, middle, right):
        axes.spines["top"].set_visible(False)
    figure.savefig(path, dpi=110)


def _smooth(values: list[float], window: int = 25) -> Tensor:
    padded = F.pad(torch.tensor(values)[None], (window - 1, 0), mode="replicate")
    return padded.unfold(1, window, 1).mean(-1)[0]


def _gap(a: list[float], b: list[float]) -> Tensor:
    return (
        (torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64))
        .abs()
        .clamp_min(SMALLEST)
    )


# --- attention ------------------------------------------------------------------------------------


def draw_attention(
    paths: tuple[Path, Path], digits_model, digits: Digits, photo: Tensor, vit, vit_name: str
) -> None:
    """Two files, last block and rollout, over the same pictures.

    Above: held-out digits. Below: the photograph through the digits model and through the ViT of
    the timing table. What is shown is how much all patches look at each one.
    """
    device = next(digits_model.parameters()).device
    first = [(digits.test_y == digit).nonzero()[0].item() for digit in DIGITS_SHOWN]
    shown = digits.test_x[first]
    small = F.interpolate(
        photo[None], size=(PHOTO_SIDE, PHOTO_SIDE), mode="bilinear", antialias=True
    )
    gray = (small.mean(1, keepdim=True) - MEAN) / STD
    digits_model.eval()
    maps_of = {
        "digits": digits_model.attention_maps(shown),
        "photo_small": digits_model.attention_maps(gray.to(device)),
        "photo_vit": vit.attention_maps(((photo - 0.5) / 0.5)[None].to(device)),
    }
    for path, title, received in (
        (paths[0], "Attention in the last block (mean over heads)", lambda maps: maps[-1].mean(1)),
        (
            paths[1],
            "Attention rollout through all blocks (Abnar & Zuidema 2020)",
            attention_rollout,
        ),
    ):
        heat = {name: received(maps).cpu() for name, maps in maps_of.items()}
        figure = Figure(figsize=(11, 6), layout="constrained")
        figure.suptitle(title)
        above, below = figure.subfigures(2, 1, height_ratios=(1, 2.6))
        above.suptitle("Held-out digits, the FusedViT trained in this run", fontsize=9)
        for i, (a, b) in enumerate(above.subplots(1, 2 * len(shown)).reshape(-1, 2)):
            image = (shown[i, 0].cpu() * STD + MEAN).clamp(0, 1).expand(3, 8, 8)
            _show(a, image)
            _overlay(b, image, heat["digits"][i].mean(0).reshape(4, 4), interpolation="nearest")
        original, trained, random = below.subplots(1, 3)
        _show(original, photo, "A photograph (scikit-learn's china.jpg)")
        side = PHOTO_SIDE // 2
        trained_heat = heat["photo_small"][0].mean(0).reshape(side, side)
        _overlay(
            trained,
            photo,
            trained_heat,
            "The same model (has seen digits only)",
        )
        random_heat = heat["photo_vit"][0, 0, 1:].reshape(vit.patch_embed.grid_size)
        _overlay(random, photo, random_heat, f"{vit_name}, RANDOM weights")
        figure.savefig(path, dpi=110)


def _show(axes, image: Tensor, title: str = "") -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)


def _overlay(axes, image: Tensor, heat: Tensor, title: str = "", interpolation="bilinear") -> None:
    """The image in gray, darkened, under the heat from its 2nd to its 98th percentile."""
    H, W = image.shape[-2:]
    low, high = torch.quantile(heat, torch.tensor([0.02, 0.98])).tolist()
    _show(axes, 0.6 * image.mean(0, keepdim=True).expand(3, H, W), title)
    axes.imshow(
        heat.numpy(), cmap="inferno", alpha=0.65, vmin=low, vmax=max(high, low + 1e-12),
        extent=(-0.5, W - 0.5, H - 0.5, -0.5), interpolation=interpolation,
    )  # fmt: skip
