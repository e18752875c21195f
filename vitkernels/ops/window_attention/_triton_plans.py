"""Launch settings of the Triton window attention: tiles of a window, and windows of a program.

Chosen by registers and spills on sm_90 (tests/test_triton_compile.py), not timed on a GPU yet.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from vitkernels._triton import INTERPRETED, cdiv, power_of_two

WHOLE_WINDOW = 64  # tokens whose scores are one tile
MOST_WINDOWS = 4  # of one program forward, where the machine stays full
MOST_SPLITS = 64  # partial sums of a tile of the bias gradient of a large window


class Plan(NamedTuple):
    block: int  # tokens of this side, queries or keys, in a tile
    main: int  # tokens of the other side that the loop takes
    block_loop: int
    tail: int  # tile of the rest of the other side
    dim: int  # channels of a head, padded
    num_warps: int
    num_stages: int

    @property
    def width(self) -> int:
        """Tokens of the other side, padded."""
        return self.main + self.tail

    def blocks(self, N: int) -> int:
        return cdiv(N, self.block)

    def holds(self, N: int) -> bool:
        """Whether the scores of a window are one tile."""
        return self.main == 0 and self.block >= N


def _cover(N: int, block: int, block_loop: int, dim: int, num_warps: int, num_stages: int) -> Plan:
    main = (N - 1) // block_loop * block_loop
    tail = max(16, power_of_two(N - main))
    return Plan(block, main, block_loop, tail, dim, num_warps, num_stages)


def _whole(N: int, dim: int, num_warps: int | None = None, num_stages: int = 2) -> Plan:
    """One tile holds the window: 16 of its rows to a warp."""
    tile = max(16, power_of_two(N))
    return _cover(N, tile, tile, dim, num_warps or tile // 16, num_stages)


def forward_plan(N: int, D: int, dtype: torch.dtype) -> Plan:
    """Queries are this side, keys the other."""
    dim = max(16, power_of_two(D))
    if dtype == torch.float32 and not INTERPRETED:  # products by FMA, all in registers
        return _cover(N, min(32, max(16, power_of_two(N))), 32, dim, 8, 1)
    if N <= WHOLE_WINDOW:
        return _whole(N, dim)
    return _cover(N, 64, 64, dim, 4, 2)


def backward_plan(N: int, D: int, dtype: torch.dtype) -> Plan:
    """Queries or keys are this side. One pass where a tile holds the window (`one_pass`)."""
    dim = max(16, power_of_two(D))
    if dtype == torch.float32 and not INTERPRETED:
        return _cover(N, min(32, max(16, power_of_two(N))), 16, dim, 8, 1)
    if N <= WHOLE_WINDOW and dim <= 64:
        return _whole(N, dim)
    return _cover(N, 64, 64, dim, 4, 2)


def one_pass(plan: Plan, N: int) -> bool:
    """Whether dq, dk, dv and the gradient of the bias come from one kernel."""
    return plan.holds(N) and plan.dim <= 64


def windows_per_program(windows: int, heads: int, processors: int, backward: bool) -> int:
    """Forward a few, whose loads overlap; backward all that leave three programs to each
    multiprocessor, because a program ends by writing its sum of bias gradients."""
    if backward:
        return cdiv(windows, max(1, min(windows, 3 * processors // heads)))
    return max(1, min(MOST_WINDOWS, windows * heads // (4 * processors)))


def programs_of_a_head(
    batch: int, rows: int, columns: int, shift: tuple[int, int], per_program: int
) -> int:
    """Windows without a seam, of the last column, of the last row and in the corner go apart."""
    seam_rows, seam_columns = int(shift[0] > 0), int(shift[1] > 0)
    areas = itertools.product((rows - seam_rows, seam_rows), (columns - seam_columns, seam_columns))
    return sum(cdiv(batch * height * width, per_program) for height, width in areas)


def dbias_splits(tiles: int, windows: int, processors: int) -> int:
    """How many programs share the sum over windows of one tile, to fill the machine."""
    return max(1, min(windows, MOST_SPLITS, cdiv(4 * processors, tiles)))
