"""The keep mask of dropout, the same bits on every backend: Philox4x32-10 of seed and index."""

from __future__ import annotations

import triton
import triton.language as tl


def dropout_scalars(p: float) -> tuple[int, float]:
    """(threshold as the bits of an int32, 1 / (1 - p)): what a kernel with dropout takes."""
    threshold = min(round(p * 2**32), 2**32 - 1)
    scale = 0.0 if p >= 1.0 else 1.0 / (1.0 - p)
    return threshold - 2**32 if threshold >= 2**31 else threshold, scale


@triton.jit
def keep_mask(seed, index, threshold):
    """True where the element of this flat logical index (int64) is kept."""
    word, _, _, _ = tl.randint4x(seed, index)
    return word.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32, bitcast=True)
