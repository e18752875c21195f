"""Boxes of tensors copied by TMA, emulated: swizzles against the PTX manual's tables, edges,
stores, and what goes wrong without a fence or a wait.

The kernels are in tests/emulator/tile_sm90.cuh.
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from emulated import SEEDS, compile_kernels, nan
from native_build import CXX, ROOT
from ptx_tables import SWIZZLE

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler: there is nothing to emulate")

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def library():
    return compile_kernels(ROOT / "tests/emulator/sm90.cpp", "emulator_sm90")


@pytest.fixture
def kernels(library):
    library.set_seed(1)
    return library


def unswizzled(seen, width):
    """The 16-byte chunks in order, by the manual's table."""
    lines, table = seen.view(-1, 8, 16), SWIZZLE[width]
    order = [[table[i % len(table)].index(str(c)) for c in range(8)] for i in range(len(lines))]
    return torch.stack([line[o] for line, o in zip(lines, order, strict=True)]).reshape(-1)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["f32", "bf16"])
def test_copies_of_boxes(kernels, rank, width, dtype):
    """From, and to, the inside of a tensor and beyond each of its edges."""
    sizes = [40, 9, 5, 4, 3][:rank]
    box = [(width or 48) // dtype.itemsize, 8, 4, 2, 2][:rank]
    pitch = [48, *sizes[1:]]  # rows on 16-byte lines
    source = torch.randn(pitch[::-1]).to(dtype)
    index = torch.arange(source.numel()).view(source.shape)
    strides = [index.stride(rank - 1 - d) for d in range(rank)]
    c_int64s = lambda values: (ctypes.c_int64 * rank)(*values)  # noqa: E731
    c_ints = lambda values: (ctypes.c_int * rank)(*values)  # noqa: E731
    for from_, to in [([0] * rank, [0] * rank), ([-5, -1, 2, 1, -1], [7, 3, -1, 3, 2])]:
        from_, to = from_[:rank], to[:rank]
        target = torch.full_like(source, -7)
        seen = torch.zeros(torch.Size(box).numel() * dtype.itemsize, dtype=torch.uint8)
        arguments = (c_int64s(sizes), c_int64s(strides), c_ints(box), c_ints(from_), c_ints(to))
        kind = 0 if dtype is torch.float32 else 1
        kernels.copy_tensor(rank, kind, width, *arguments, source, target, seen)

        expected, moved = torch.zeros(box[::-1]).to(dtype), torch.full_like(source, -7)
        for at in itertools.product(*(range(extent) for extent in box)):
            inside = [0 <= f + i < s for f, i, s in zip(from_, at, sizes, strict=True)]
            if all(inside):
                here = tuple(f + i for f, i in zip(from_, at, strict=True))[::-1]
                expected[at[::-1]] = source[here]
            if all(0 <= t + i < s for t, i, s in zip(to, at, sizes, strict=True)):
                moved[tuple(t + i for t, i in zip(to, at, strict=True))[::-1]] = expected[at[::-1]]
        lines = unswizzled(seen, width) if width else seen
        assert torch.equal(lines.view(dtype), expected.reshape(-1))
        assert torch.equal(target, moved)


def test_stores_of_a_box(kernels):
    values = torch.randn(32, 32)
    for seed in SEEDS:
        kernels.set_seed(seed)
        first, second = nan(32, 32), nan(32, 32)
        kernels.store(0, values, first, second)
        assert torch.equal(first, 2 * values) and torch.equal(second, 2 * values + 1)


@pytest.mark.parametrize(
    "bug,message",  # kProxyFence, kBarrier, kStoreWait of tile_sm90.cuh
    [
        (3, "tma_store reads shared memory that ordinary stores have written"),
        (1, "tma_store had read it|ordinary stores"),
        (7, "shared memory was written before a tma_store had read it"),
    ],
)
def test_missing_step_before_a_store_is_caught(kernels, bug, message):
    for seed in SEEDS:
        kernels.set_seed(seed)
        first, values = nan(32, 32), torch.randn(32, 32)
        try:
            kernels.store(bug, values, first, nan(32, 32))
            assert bug == 1 and first.isnan().any(), f"unnoticed with seed {seed}"
        except RuntimeError as error:
            assert any(part in str(error) for part in message.split("|"))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"sizes": (0, 8)}, "dimension 0 has size 0"),
        ({"strides": (2, 48)}, "dimension 0 must have stride 1"),
        ({"strides": (1, 41)}, "dimension 1 has a stride of 82 bytes"),
        ({"box": (64, 257)}, "dimension 1 of the box is 257"),
        ({"box": (4, 8)}, "a row of the box must be a multiple of 16 bytes"),
        ({"box": (32, 8)}, "as wide as the swizzle, 128 bytes, not 64"),
        ({"offset": 1}, "begin on a 16-byte line"),
    ],
)
def test_impossible_tensor_maps_are_refused(kernels, change, message):
    asked = {"sizes": (40, 8), "strides": (1, 48), "box": (64, 8), "offset": 0, **change}
    data = torch.zeros(1024, dtype=BF16)[asked["offset"] :]
    longs = [(ctypes.c_int64 * 2)(*asked[name]) for name in ("sizes", "strides")]
    box, zero = (ctypes.c_int * 2)(*asked["box"]), (ctypes.c_int * 2)(0, 0)
    with pytest.raises(RuntimeError, match=message):
        kernels.copy_tensor(2, 1, 128, *longs, box, zero, zero, data, data, data)
