"""Window sizes of the stages of Swin: as given, and when the image size changes."""

from __future__ import annotations

from collections.abc import Callable

from .._checks import describe, fail

Pair = tuple[int, int]


def stage_windows(owner: str, window_size, stages: int) -> tuple[Pair, ...]:
    """(height, width) of each stage's window, from an int, a pair, or one of them for each stage.

    Two ints are (height, width), also in a model of two stages.
    """
    spec = window_size
    if not isinstance(spec, (tuple, list)) or (
        len(spec) == 2 and not isinstance(spec[0], (tuple, list))
    ):
        spec = (spec,) * stages
    windows = tuple(tuple(w) if isinstance(w, (tuple, list)) else (w, w) for w in spec)
    if len(windows) != stages or not all(len(w) == 2 and _positive(*w) for w in windows):
        expected = f"a positive integer, a pair, or one of them for each of {stages} stages"
        fail(owner, "window_size", expected, describe(window_size))
    return windows


def check_square(owner: str, windows: tuple[Pair, ...], window_clamp: str) -> None:
    if window_clamp == "min" and any(height != width for height, width in windows):
        fail(owner, "window_size", "square with window_clamp='min'", windows)


def scaled_windows(
    owner: str, stages: int, window_size, window_ratio, window_clamp: str
) -> Callable:
    """The function (grid, old windows, old grid) -> windows; what is wrong is told before it.

    window_clamp="min" knows square windows only: what is not given scales with the shorter side.
    """
    if window_size is not None:
        windows = stage_windows(owner, window_size, stages)
        check_square(owner, windows, window_clamp)
        return lambda grid, old, old_grid: windows
    if window_ratio is None:
        sizes = _same_share
    else:
        sizes = _by_ratio(owner, stages, window_ratio)
    if window_clamp != "min":
        return sizes
    return lambda *where: tuple((min(window),) * 2 for window in sizes(*where))


def _same_share(grid: Pair, old: tuple[Pair, ...], old_grid: Pair) -> tuple[Pair, ...]:
    return tuple(_in_proportion(window, grid, old_grid) for window in old)


def _by_ratio(owner: str, stages: int, window_ratio) -> Callable:
    ratios = window_ratio if isinstance(window_ratio, (tuple, list)) else (window_ratio,) * stages
    if len(ratios) != stages or not _positive(*ratios):
        expected = f"a positive integer, or one for each of {stages} stages"
        fail(owner, "window_ratio", expected, describe(window_ratio))
    return lambda grid, old, old_grid: tuple(
        tuple(max(1, side // ratio) for side in grid) for ratio in ratios
    )


def _in_proportion(window: Pair, grid: Pair, old_grid: Pair) -> Pair:
    return tuple(
        max(1, w * side // old) for w, side, old in zip(window, grid, old_grid, strict=True)
    )


def _positive(*values) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)
