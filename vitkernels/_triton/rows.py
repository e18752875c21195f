"""What kernels over the rows of a (rows, C) problem share: parameters in, partial sums out."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_columns(ptr, col, C, default: tl.constexpr):
    """A (C,) parameter as a (1, columns) tile in fp32, or what stands for None."""
    if ptr is None:
        return default
    else:
        return tl.load(ptr + col, mask=col < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_partial(ptr, total, program, col, C):
    """The sum of a (rows, columns) tile over its rows, as row `program` of (programs, C)."""
    if ptr is not None:
        tl.store(ptr + program.to(tl.int64) * C + col, tl.sum(total, 0), mask=col < C)
