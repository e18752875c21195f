"""mma.sync, ldmatrix, cp.async and barriers of a part of the block, emulated: layouts against the
PTX manual's tables, a tile product against float64, a planted bug of each kind.

The kernels are in tests/emulator/tile_sm80.cuh; tests/test_emulator_sass.py compiles them by nvcc.
"""

from __future__ import annotations

import pytest
import torch
from emulated import SEEDS, compile_kernels, nan
from native_build import CXX, ROOT
from ptx_tables import LDMATRIX, MMA_A, MMA_B, MMA_C, SWIZZLE

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler: there is nothing to emulate")

HALVES = [torch.bfloat16, torch.float16]
BUGS = {
    "barrier": 1,
    "first wait": 2,
    "last wait": 3,
    "swizzle": 4,
    "load tail": 5,
    "store tail": 6,
}
half = pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "f16"])
layout = pytest.mark.parametrize("swizzled", [0, 1], ids=["padded", "swizzled"])


@pytest.fixture(scope="module")
def library():
    return compile_kernels(ROOT / "tests/emulator/sm80.cpp", "emulator_sm80")


@pytest.fixture
def kernels(library):
    library.set_seed(1)
    return library


def to_lanes(matrix, table, elements):
    """(32, elements): what each lane holds of the matrix."""
    held = torch.empty(32, elements, dtype=matrix.dtype)
    for row, places in zip(matrix, table, strict=True):
        for value, (lane, element) in zip(row, places, strict=True):
            held[lane, element] = value
    return held


def from_lanes(held, table):
    return torch.stack([torch.stack([held[lane, e] for lane, e in row]) for row in table])


# ---- Layouts


@half
def test_mma_has_the_manuals_layout(kernels, dtype):
    a = torch.randint(-9, 10, (16, 16)).to(dtype)
    b = torch.randint(-9, 10, (16, 8)).to(dtype)
    c = torch.randint(-9, 10, (16, 8)).float()
    held = to_lanes(c, MMA_C, 4)
    kernels.mma(HALVES.index(dtype), to_lanes(a, MMA_A, 8), to_lanes(b, MMA_B, 4), held)
    assert torch.equal(from_lanes(held, MMA_C), a.float() @ b.float() + c)


@half
def test_mma_accumulates_in_fp32(kernels, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = torch.randn(16, 8) * 100
    held = to_lanes(c, MMA_C, 4)
    kernels.mma(HALVES.index(dtype), to_lanes(a, MMA_A, 8), to_lanes(b, MMA_B, 4), held)
    truth = a.double() @ b.double() + c.double()
    bound = 17 * 2.0**-24 * (a.double().abs() @ b.double().abs() + c.double().abs())
    assert ((from_lanes(held, MMA_C).double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix_has_the_manuals_layout(kernels, n, transposed):
    matrices = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
    out = torch.full((32, n, 2), -1, dtype=torch.int16)
    kernels.ldmatrix(n, transposed, matrices, out)
    for i in range(n):
        expected = matrices[i].T if transposed else matrices[i]
        assert torch.equal(from_lanes(out[:, i], LDMATRIX), expected)


def test_movmatrix_transposes(kernels):
    matrix = torch.arange(64, dtype=torch.int16).view(8, 8)
    out = torch.full((32, 2), -1, dtype=torch.int16)
    kernels.movmatrix(to_lanes(matrix, LDMATRIX, 2), out)
    assert torch.equal(from_lanes(out, LDMATRIX), matrix.T)


@pytest.mark.parametrize("width", SWIZZLE)
def test_swizzles_are_the_manuals(kernels, width):
    out = torch.empty(256, dtype=torch.int32)
    kernels.swizzle_offsets(width, 256, out)
    lines = SWIZZLE[width]
    for chunk, offset in enumerate(out.tolist()):
        line, place = divmod(offset, 128)
        assert line == chunk // 8 and place % 16 == 0
        assert int(lines[line % len(lines)][place // 16]) == chunk % 8


# ---- Asynchronous copies


@pytest.mark.parametrize("bytes_", [4, 8, 16])
def test_copies_fill_with_zeros(kernels, bytes_):
    source = torch.randint(-128, 128, (32, bytes_), dtype=torch.int8)
    counts = torch.arange(32, dtype=torch.int32) % (bytes_ + 1)
    out = torch.full((32, bytes_), 99, dtype=torch.int8)
    kernels.copies(bytes_, 0, source, counts, out)
    assert torch.equal(out, torch.where(torch.arange(bytes_) < counts[:, None], source, 0))


@pytest.mark.parametrize("bytes_", [4, 8, 16])
def test_copy_without_a_wait_reads_poison(kernels, bytes_):
    source = torch.randint(0, 100, (32, bytes_), dtype=torch.int8)
    out = torch.zeros(32, bytes_, dtype=torch.int8)
    kernels.copies(bytes_, 1, source, torch.full((32,), bytes_, dtype=torch.int32), out)
    assert out.eq(-1).all()


# ---- Barriers of a part of the block


def test_pairs_of_warps_meet_at_their_own_barriers(kernels):
    expected = torch.tensor(
        [[[1000 * p + 100 * r + 31 - i for i in range(32)] for r in range(5)] for p in range(2)]
    )
    for seed in SEEDS:
        kernels.set_seed(seed)
        out = torch.full((2, 5, 32), -7, dtype=torch.int32)
        kernels.pairs(0, 5, out)
        assert torch.equal(out.long(), expected)


@pytest.mark.parametrize("bug", [1, 2])
def test_missing_barrier_of_a_pair_is_caught(kernels, bug):
    right = torch.empty(2, 5, 32, dtype=torch.int32)
    kernels.pairs(0, 5, right)
    caught = 0
    for seed in SEEDS:
        kernels.set_seed(seed)
        out = torch.full((2, 5, 32), -7, dtype=torch.int32)
        try:
            kernels.pairs(bug, 5, out)
            caught += not torch.equal(out, right)
        except RuntimeError as error:  # arrivals of two rounds can meet at one barrier
            assert "deadlock" in str(error)
            caught += 1
    assert caught == len(SEEDS)


# ---- A tile product


def tile_product(kernels, dtype, swizzled, bug=None, rows=64, columns=64, depth=64):
    """(product, truth, bound); what lies beyond depth is NaN, beyond the product -7 must stay."""
    a, b = torch.randn(rows, 64).to(dtype), torch.randn(columns, 64).to(dtype)
    a[:, depth:] = b[:, depth:] = torch.nan
    out = torch.cat([nan(rows * columns), torch.full((64 * 64,), -7.0)])
    arguments = (a, b, out, rows, columns, depth)
    kernels.product(HALVES.index(dtype), swizzled, BUGS.get(bug, 0), *arguments)
    assert out[rows * columns :].eq(-7).all(), "written beyond the end"
    a, b = a[:, :depth].double(), b[:, :depth].double()
    bound = 64 * 2.0**-24 * (a.abs() @ b.abs().T)
    return out[: rows * columns].view(rows, columns).double(), a @ b.T, bound


@half
@layout
@pytest.mark.parametrize(
    "rows,columns,depth", [(64, 64, 64), (49, 64, 64), (64, 50, 40), (1, 7, 3)]
)
def test_tile_product(kernels, dtype, swizzled, rows, columns, depth):
    for seed in (1, 2, 3):
        kernels.set_seed(seed)
        shape = {"rows": rows, "columns": columns, "depth": depth}
        out, truth, bound = tile_product(kernels, dtype, swizzled, **shape)
        assert ((out - truth).abs() <= bound).all()


@layout
@pytest.mark.parametrize("bug", ["barrier", "first wait", "last wait"])
def test_missing_wait_of_a_tile_product_is_caught(kernels, swizzled, bug):
    for seed in SEEDS:
        kernels.set_seed(seed)
        out, _, _ = tile_product(kernels, torch.bfloat16, swizzled, bug)
        assert out.isnan().any(), f"went unnoticed with seed {seed}"


def test_wrong_swizzle_is_caught(kernels):
    out, truth, bound = tile_product(kernels, torch.bfloat16, 1, "swizzle")
    assert ((out - truth).abs() <= bound).float().mean() < 0.5  # NaN among the rest


@layout
def test_lost_tail_predicates_are_caught(kernels, swizzled):
    shape = {"rows": 49, "columns": 49, "depth": 33}
    out, _, _ = tile_product(kernels, torch.bfloat16, swizzled, "load tail", **shape)
    assert out.isnan().all()
    with pytest.raises(AssertionError, match="written beyond the end"):
        tile_product(kernels, torch.bfloat16, swizzled, "store tail", **shape)


# ---- Misuse


@pytest.mark.parametrize("threads", [32, 16])
def test_products_need_the_whole_warp(kernels, threads):
    with pytest.raises(RuntimeError, match=r"mma_m16n8k16 needs all 32 lanes(.|\n)*sm80\.cpp:"):
        kernels.early_exit_mma(threads)


MISUSE = [
    "load_matrices of what is not, or not all, in shared memory",
    "load_matrices of shared memory off its 16-byte line",
    "copy_async of shared memory off its 16-byte line",
    "copy_async from an address off its 8-byte line",
    "copy_async of what is not, or not all, in shared memory",
    r"copy_async<4> of 5 bytes",
    "copy_async of what is not, or not all, in shared memory",
    "ends with copies .cp.async. that it has not waited for",
    "barrier_sync of barrier 0; 1 to 15",
    "barrier_sync of 48 threads; a multiple of 32",
    r"deadlock(.|\n)*threads 0-31 wait in barrier_sync of barrier 3 for 64 threads",
    "barrier_sync of (32|64) threads, but barrier 3 is one of (32|64) at",
]


@pytest.mark.parametrize("kind", range(len(MISUSE)))
def test_misuse_is_refused(kernels, kind):
    with pytest.raises(RuntimeError, match=rf"(?s){MISUSE[kind]}.*sm80\.cpp:"):
        kernels.misplaced(kind, torch.zeros(64, dtype=torch.int8))
