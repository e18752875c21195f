"""Dropout's random numbers: drawn by the public function, the same bits on every backend."""

from __future__ import annotations

import math

import torch

from .. import _sharding

_LOW = 0xFFFFFFFF


def draw_seed(like: torch.Tensor) -> torch.Tensor:
    """A fresh int64 seed of shape (1,) from torch's generator: torch.manual_seed governs it."""
    return _sharding.beside(torch.randint(0, 2**62, (1,), device=like.device), like)


def philox_word(seed: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """First word of Philox4x32-10 in int64 arithmetic, key = seed, counter = index.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = index & _LOW, (index >> 32) & _LOW
    c2 = c3 = torch.zeros_like(index)
    for _ in range(10):
        a, b = (
            c0 * 0xD2511F53,
            c2 * 0xCD9E8D57,
        )  # 64-bit products; int64 wraps, the bits are those of uint64
        c0, c1, c2, c3 = (
            ((b >> 32) & _LOW) ^ c1 ^ k0,
            b & _LOW,
            ((a >> 32) & _LOW) ^ c3 ^ k1,
            a & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0


def keep_mask(seed: torch.Tensor, shape: tuple[int, ...], dropout_p: float) -> torch.Tensor:
    """Boolean mask of `shape`: True where dropout keeps the element of that flat index."""
    index = torch.arange(math.prod(shape), device=seed.device, dtype=torch.int64)
    return (philox_word(seed, index) >= round(dropout_p * 2**32)).reshape(shape)
