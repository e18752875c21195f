"""Launch settings of the Triton attention: how sizes are split into tiles, and which tiles.

Chosen by registers and spills on sm_90 (tests/test_triton_compile.py), not timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitkernels._triton import INTERPRETED, cdiv, power_of_two

WHOLE_ROW = 272  # keys whose scores fit in registers at once, 64 queries to four warps


def split_dims(D: int) -> tuple[int, ...]:
    """Powers of two from 16 that cover D channels: one, or two where that wastes less."""
    whole = max(16, power_of_two(D))
    half = whole // 2
    rest = D - half
    if half < 32 or rest > half // 2:
        return (whole,)
    return (half, max(16, power_of_two(rest)))


def split_columns(n: int, largest: int = 128, parts: int = 3) -> tuple[int, ...]:
    """Powers of two from 16 that cover n keys, at most `parts` of them below `largest`."""
    columns = [largest] * (n // largest)
    rest = n % largest
    for left in range(parts, 0, -1):
        if rest <= 0:
            break
        power = max(16, power_of_two(rest))
        if left > 1 and power > 16 and rest <= power - power // 4:
            power //= 2
        columns.append(power)
        rest -= power
    return tuple(columns)


class ForwardPlan(NamedTuple):
    main: int  # keys taken by the loop
    parts: tuple[int, ...]  # the rest of the row
    dims: tuple[int, ...]
    block: int  # queries
    block_loop: int
    num_warps: int
    num_stages: int

    def useful(self, Nq: int, Nk: int) -> float:
        """The fraction of the score tile that is not padding."""
        return Nq * Nk / (cdiv(Nq, self.block) * self.block * (self.main + sum(self.parts)))


def forward_plan(Nk: int, D: int, dtype: torch.dtype, plain: bool = True) -> ForwardPlan:
    """plain: no bias, mask or dropout, which cost registers beside the scores of a whole row."""
    dims = split_dims(D)
    if dtype == torch.float32 and not INTERPRETED:  # products by FMA, all in registers
        block, block_loop, num_warps, num_stages = 64 if plain else 32, 32, 8, 1
    elif sum(dims) <= 64 and plain and Nk <= WHOLE_ROW:
        return ForwardPlan(0, split_columns(Nk), dims, 64, 128, 4, 1)
    elif sum(dims) <= 64:
        block, block_loop, num_warps, num_stages = (128, 128, 8, 3) if plain else (64, 64, 4, 2)
    elif sum(dims) <= 128:
        block, block_loop, num_warps, num_stages = 128, 64, 8, 2
    else:
        block, block_loop, num_warps, num_stages = 64, 32, 8, 2
    main = (Nk - 1) // block_loop * block_loop
    return ForwardPlan(
        main, split_columns(Nk - main, block_loop), dims, block, block_loop, num_warps, num_stages
    )


class BackwardPlan(NamedTuple):
    main: int  # rows of the other side taken by the loop
    parts: tuple[int, ...]  # the rest
    dims: tuple[int, ...]
    block: int  # rows of this side
    block_loop: int
    num_warps: int
    num_stages: int


def backward_plan(
    rows: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    *,
    resident: bool = False,
    narrow: bool = False,
    tensor_memory: bool = False,
) -> BackwardPlan:
    """Tiles for dq (rows = Nq, N = Nk) and for dk and dv (rows = Nk, N = Nq).

    resident: the other side may stay in shared memory. narrow: dropout or a mask costs registers,
    and so does the lack of wgmma before sm_90 (4 KB of spills with a bias). tensor_memory: from
    sm_100 on products are kept in its 512 columns, and Triton refuses what needs more.
    """
    dims = split_dims(D)
    width = sum(dims)
    odd = cdiv(rows, 64) in (1, 3, 5)
    if dtype == torch.float32 and not INTERPRETED:  # products by FMA
        block, block_loop, num_warps, num_stages = 32, 32, 8, 1
    elif resident and width <= 64 and N <= WHOLE_ROW and not (tensor_memory and len(dims) > 1):
        return BackwardPlan(0, split_columns(N, 64), dims, 64, 64, 4, 1)
    elif width <= 64 and odd:  # blocks of 128 rows would be padded by 64
        block, block_loop, num_warps, num_stages = 64, 32, 4, 2
    elif width <= 64:
        long_rest = (N - 1) % 64 >= 32  # a rest of 64 beside the loop spills 104 bytes
        block, block_loop, num_warps, num_stages = 128, 32 if narrow or long_rest else 64, 8, 2
    elif tensor_memory:
        block, block_loop, num_warps, num_stages = (
            (64, 32, 4, 1) if width <= 128 else (32, 32, 8, 1)
        )
    elif width <= 128:
        block, block_loop, num_warps, num_stages = 64 if width == 96 else 128, 32, 8, 2
    else:
        block, block_loop, num_warps, num_stages = 64, 16, 8, 1
    main = (N - 1) // block_loop * block_loop
    parts = split_columns(N - main, block_loop)
    return BackwardPlan(main, parts, dims, block, block_loop, num_warps, num_stages)


def blocks_of_a_head(plan: ForwardPlan | BackwardPlan, rows: int, B: int, H: int, processors: int):
    """(groups, blocks_per_program): how many programs share the blocks of one head.

    One program walks over all of them, holding the other side in shared memory, unless that leaves
    multiprocessors idle. With a loop there is nothing to hold.
    """
    blocks = cdiv(rows, plan.block)
    fill = max(1, 2 * processors // max(1, B * H))
    blocks_per_program = 1 if plan.main else cdiv(blocks, min(blocks, fill))
    return cdiv(blocks, blocks_per_program), blocks_per_program


def dbias_splits(tiles: int, items: int, processors: int) -> int:
    """How many programs, at most 16, share the sum of one tile of the bias to fill the machine."""
    return max(1, min(items, 16, cdiv(4 * processors, max(1, tiles))))
