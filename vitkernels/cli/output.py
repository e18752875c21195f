"""What the commands print: tables and lines that are the same with and without a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDEST = 160  # columns of a table where there is no terminal to ask


def console(stderr: bool = False) -> Console:
    out = Console(highlight=False, soft_wrap=True, stderr=stderr, markup=False)
    return out if out.is_terminal else Console(
        highlight=False, soft_wrap=True, stderr=stderr, markup=False, width=WIDEST
    )  # fmt: skip


def table(*headings: str, left: int = 1, title: str | None = None) -> Table:
    """The first `left` columns are words, the others numbers, to the right."""
    made = Table(
        box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, show_edge=False
    )
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i < left else "right", overflow="fold")
    return made
