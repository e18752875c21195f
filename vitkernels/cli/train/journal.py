"""What a run tells of itself: a line an epoch, CSV, JSON, curves, TensorBoard."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from ..usage import installed, one_line, whole_file

COLUMNS = (
    "epoch", "steps", "train_loss", "val_loss", "val_accuracy", "lr", "images_per_second",
    "bad_images", "seconds",
)  # fmt: skip


class Journal:
    """rows: one dict for each epoch that has ended."""

    def __init__(self, folder: Path, console, rows: list[dict]):
        self.folder, self.console, self.rows = folder, console, rows
        self.make_board = _summary_writer(console)
        self.board = None

    def add(self, row: dict, epochs: int) -> None:
        self.rows.append(row)
        bad = f", {row['bad_images']} bad images left out" if row["bad_images"] else ""
        self.console.print(
            f"  epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, held out "
            f"{row['val_loss']:.4f} and {row['val_accuracy']:.2%} right, "
            f"{row['images_per_second']:.0f} images/s{bad}"
        )
        if self.make_board is not None:
            self._show(row)

    def _show(self, row: dict) -> None:
        """To TensorBoard, which forgets what an earlier process wrote of this epoch and later."""
        if self.board is None:
            self.board = self.make_board(self.folder / "tensorboard", purge_step=row["epoch"])
        for name in COLUMNS[2:7]:
            self.board.add_scalar(name, row[name], row["epoch"])
        self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
            self.board = None

    def write(self) -> None:
        """All rows anew: after a resumed run no row of a lost epoch stays."""
        with whole_file(self.folder / "log.csv") as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        with whole_file(self.folder / "log.json") as path:
            path.write_text(json.dumps(self.rows, indent=1) + "\n")

    def draw(self) -> None:
        if self.rows:
            with whole_file(self.folder / "curves.png") as path:
                draw_curves(path, self.rows)


def _summary_writer(console):
    """TensorBoard's, where it is installed."""
    if not installed("tensorboard"):
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # of its own requirements
        console.print(f"  no events for TensorBoard, which cannot be imported: {one_line(error)}")
        return None
    return SummaryWriter


def draw_curves(path: Path, rows: list[dict]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    blue, orange = "#1f5fa8", "#d9762b"
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    marker = "o" if len(rows) == 1 else None
    for name, color, label in (
        ("train_loss", blue, "training (augmented)"), ("val_loss", orange, "held out"),
    ):  # fmt: skip
        values = [row[name] for row in rows]
        left.plot(epochs, values, color=color, lw=1.8, marker=marker, label=label)
    left.set(title="Loss", xlabel="epoch", ylim=(0, None))
    left.legend(frameon=False)
    accuracies = [100 * row["val_accuracy"] for row in rows]
    right.plot(epochs, accuracies, color=orange, lw=1.8, marker=marker)
    right.set(title="Held-out accuracy", xlabel="epoch", ylabel="%", ylim=(0, 108))
    best = max(range(len(rows)), key=lambda i: (accuracies[i], -rows[i]["val_loss"]))
    right.plot(epochs[best], accuracies[best], "o", color=orange)
    late = len(rows) > 1 and best > len(rows) // 2  # the words then end at the point
    right.annotate(
        f"best {accuracies[best]:.2f}%", (epochs[best], accuracies[best]), (0, 7),
        ha="right" if late else "left", textcoords="offset points", color=orange,
    )  # fmt: skip
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
