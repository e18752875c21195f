"""The second stage of every deterministic reduction: partial sums added in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton.launch import cdiv, on_device


@triton.jit(do_not_specialize=["parts"])
def _sum_partials_kernel(
    partial_ptr, out_ptr, parts, size, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr
):
    """out = the sum of partial_ptr (parts, size) over the parts. Grid: (ceil(size / BLOCK),)."""
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        offset = part.to(tl.int64)[:, None] * size + here[None, :]
        mask = (part < parts)[:, None] & (here < size)[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    tl.store(out_ptr + here, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=here < size)


def sum_partials(partial: torch.Tensor, out: torch.Tensor) -> None:
    """out = partial.sum(0), rounded once; both contiguous, partial fp32 (parts, *out.shape)."""
    parts, size = partial.shape[0], out.numel()
    # Many parts of a vector: a program per 32 columns. Few parts of a matrix: long runs of it.
    block_p, block = (32, 32) if parts > 16 else (1, 1024)
    with on_device(out):
        _sum_partials_kernel[(cdiv(size, block),)](
            partial, out, parts, size, BLOCK_P=block_p, BLOCK=block, num_warps=4
        )
