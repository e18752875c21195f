"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yields step(text): one of `total` steps is done, and what to say about it."""
    if not console.is_terminal:
        yield _lines(console, title, total)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, text="")
        yield lambda text="": progress.update(task, advance=1, text=text)


def _lines(console: Console, title: str, total: int) -> Callable[[str], None]:
    done, last = 0, time.monotonic()

    def step(text: str = "") -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"  {title} {done}/{total} {text}", highlight=False)

    return step
