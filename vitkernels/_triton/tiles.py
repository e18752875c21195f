"""Tiles of matrix products: their order, their sizes, and how long sums are split.

Chosen by counting FLOPs, bytes and waves, and by registers and spills
(tests/test_triton_compile.py); not timed on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vitkernels._triton.launch import INTERPRETED, cdiv

BALANCE = 180  # bf16 FLOPs in the time of one byte of memory: H200 790 / 4.3, A100 312 / 1.9
MOST_SPLITS = 16


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of a tile; GROUP rows of tiles go together, so that they share L2."""
    group = tile // (GROUP * tiles_n)
    inside = tile - group * (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    return group * GROUP + inside % height, inside // height


@triton.jit
def split_columns(x, PARTS: tl.constexpr):
    """A tile as PARTS (a power of two) tiles of equal width, from left to right."""
    if PARTS == 1:
        return (x,)
    else:
        left, right = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
        return split_columns(left, PARTS // 2) + split_columns(right, PARTS // 2)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operands of tl.dot: the tensors' dtype, or fp32 in the interpreter, wrong at 16 bits."""
    if INTERPRETED:
        return tl.float32
    same = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return same[dtype]


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    residents: int = 1  # blocks that share a multiprocessor

    def time(self, M: int, N: int, processors: int) -> float:
        """Waves of tiles, each as long as its area or, below 64 FLOPs a byte of L2, its edges.

        2 m n FLOPs meet 2 (m + n) bytes in 16 bits: 128 x 256 has 85, 128 x 128 has 64.
        """
        waves = cdiv(cdiv(M, self.m) * cdiv(N, self.n), processors)
        return waves * max(self.m * self.n, 64 * (self.m + self.n))


def choose_tile(table: Sequence[Tile], M: int, N: int, processors: int) -> Tile:
    """The quickest of the table for an (M, N) product; of equals the first."""
    return min(table, key=lambda tile: tile.time(M, N, processors))


def reduction_splits(tile: Tile, M: int, N: int, K: int, processors: int) -> tuple[int, int]:
    """(splits, steps of tile.k per split) of an (M, N) product over a long K.

    A weight gradient has few tiles and a long sum. Each split costs a write and a read of fp32
    partial sums, 8 bytes an output, and saves idle multiprocessors.
    """
    tiles, steps = cdiv(M, tile.m) * cdiv(N, tile.n), cdiv(K, tile.k)

    def time(splits: int) -> int:
        waves, partials = cdiv(tiles * splits, processors), splits if splits > 1 else 0
        products = waves * processors * cdiv(steps, splits) * 2 * tile.m * tile.n * tile.k
        return products + partials * 8 * M * N * BALANCE

    per_split = cdiv(steps, min(range(1, min(MOST_SPLITS, steps) + 1), key=time))
    return cdiv(steps, per_split), per_split
