"""mbarrier and wgmma, emulated: layouts against the PTX manual's tables, tile products against
float64, a planted bug of each kind.

The kernels are in tests/emulator/tile_sm90.cuh; tests/test_emulator_sass.py compiles them by nvcc,
tests/test_emulator_tma.py copies boxes of tensors.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from emulated import SEEDS, compile_kernels, nan
from native_build import CXX, ROOT
from ptx_tables import (
    MMA_A,
    MMA_C,
    SWIZZLE,
    WGMMA_CANONICAL,
    WGMMA_DESCRIPTOR,
    WGMMA_SWIZZLE_MODES,
)

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler: there is nothing to emulate")

BF16, F16 = torch.bfloat16, torch.float16
BUGS = {  # enum Bug of tile_sm90.cuh
    "none": 0,
    "barrier": 1,
    "load wait": 2,
    "proxy fence": 3,
    "product fence": 4,
    "product wait": 5,
    "swizzle": 6,
    "empty wait": 8,
    "init fence": 9,
    "store tail": 10,
    "early fence": 11,
}
# dtype, N, swizzle, A's and B's fastest index, where A comes from: kProducts of sm90.cpp.
PRODUCTS = [
    (BF16, 64, 128, "k", "k", "tma"),
    (F16, 64, 128, "k", "k", "tma"),
    (BF16, 64, 64, "k", "k", "tma"),
    (BF16, 64, 32, "k", "k", "tma"),
    (BF16, 64, 0, "k", "k", "tma"),
    (BF16, 64, 128, "mn", "mn", "tma"),
    (F16, 64, 64, "mn", "mn", "tma"),
    (BF16, 64, 32, "k", "mn", "tma"),
    (BF16, 64, 0, "mn", "mn", "tma"),
    (BF16, 8, 128, "k", "k", "tma"),
    (BF16, 136, 64, "k", "mn", "registers"),
    (F16, 256, 128, "k", "k", "registers"),
    (BF16, 64, 128, "k", "k", "stores"),
    (BF16, 24, 32, "mn", "k", "tma"),
    (BF16, 200, 0, "k", "mn", "registers"),
]


@pytest.fixture(scope="module")
def library():
    return compile_kernels(ROOT / "tests/emulator/sm90.cpp", "emulator_sm90")


@pytest.fixture
def kernels(library):
    library.set_seed(1)
    return library


# ---- Layouts


def chunks_in_k(matrix):
    """(n, 16) as wgmma reads it without swizzle: eight k of all rows, then the next eight."""
    return torch.stack([matrix[:, :8], matrix[:, 8:]]).contiguous()


def accumulators(sums):
    """(64, N) from the threads' registers: mma's tile, by warps and eight columns."""
    held = sums.view(4, 32, -1, 4)
    return torch.cat([
        torch.cat([
            torch.stack([torch.stack([held[warp, lane, j, e] for lane, e in row]) for row in MMA_C])
            for j in range(held.shape[2])
        ], 1)
        for warp in range(4)
    ])  # fmt: skip


def test_registers_of_wgmma_have_the_manuals_layout(kernels):
    a, b = torch.randint(-9, 10, (64, 16)).to(BF16), torch.randint(-9, 10, (16, 16)).to(BF16)
    held, sums = torch.empty(4, 32, 8, dtype=BF16), nan(128, 8)
    for row in range(64):
        for value, (lane, element) in zip(a[row], MMA_A[row % 16], strict=True):
            held[row // 16, lane, element] = value
    kernels.raw_product(0, 0, held, a, 0, 0, 0, chunks_in_k(b), sums)
    assert torch.equal(accumulators(sums), a.float() @ b.float().T)


@pytest.mark.parametrize("width", WGMMA_SWIZZLE_MODES)
@pytest.mark.parametrize("start", [0, 1024, 232448 - 1024])
def test_descriptors_have_the_manuals_fields(kernels, width, start):
    bits = torch.zeros(1, dtype=torch.int64)
    kernels.descriptor(width, start, 4096, 262128, 96, bits)
    word = bits.item() & (1 << 64) - 1
    fields = {
        name: word >> first & (1 << last - first + 1) - 1
        for name, (first, last) in WGMMA_DESCRIPTOR.items()
    }
    assert fields == {
        "start": (start + 96) // 16,
        "leading": 256,
        "stride": 16383,
        "base offset": 0,
        "swizzle": WGMMA_SWIZZLE_MODES[width],
    }
    used = sum((1 << last - first + 1) - 1 << first for first, last in WGMMA_DESCRIPTOR.values())
    assert word & ~used == 0


@pytest.mark.parametrize("gaps", [0, 1])
@pytest.mark.parametrize("major,width", WGMMA_CANONICAL)
def test_operands_of_wgmma_have_the_manuals_layout(kernels, major, width, gaps):
    """A is laid out by the manual's shapes and strides and its table of the swizzle."""
    (rows, ks), (row_strides, k_strides) = WGMMA_CANONICAL[major, width]
    chunks = max(width // 16, 1)
    period = 8 * chunks * (1 + gaps)  # 16-byte chunks of eight rows (k's)
    if major == "k":
        leading, stride = (8 * period, period) if width == 0 else (1, period)
    elif width == 0:
        leading, stride = period, 2 * period
    else:
        leading, stride = 2 * period, period
    known = {"LBO": leading, "SBO": stride, "X": 0}
    at = lambda i, shape, strides: (  # noqa: E731
        i % shape[0] * known.get(strides[0], strides[0]) + i // shape[0] * known[strides[1]]
    )
    a = torch.randint(-99, 100, (64, 16)).to(BF16)
    memory = torch.full((16384, 8), torch.nan, dtype=BF16)
    used = 0
    for i, j in (
        itertools.product(range(64), range(2))
        if major == "k"
        else itertools.product(range(8), range(16))
    ):
        if major == "k":
            chunk = at(i, rows, row_strides) + j * known.get(k_strides, k_strides)
            values = a[i, 8 * j : 8 * j + 8]
        else:
            chunk = at(i, rows, row_strides) + at(j, ks, k_strides)
            values = a[8 * i : 8 * i + 8, j]
        line, place = divmod(chunk, 8)
        place = SWIZZLE[width][line % len(SWIZZLE[width])].index(str(place))
        memory[line * 8 + place] = values
        used = max(used, line * 8 + 8)
    identity, sums = torch.eye(16).to(BF16), nan(128, 8)
    kernels.raw_product(
        width, int(major == "mn"), None, memory, used * 16, leading * 16, stride * 16,
        chunks_in_k(identity), sums,
    )  # fmt: skip
    assert torch.equal(accumulators(sums), a.float())


# ---- Tile products


def stored(matrix, major):
    """As the kernel reads it: (mn, 64), or (64, mn) with rows a multiple of 16 bytes."""
    if major == "k":
        return matrix.contiguous()
    mn = matrix.shape[0]
    padded = torch.full((64, (mn + 7) // 8 * 8), torch.nan, dtype=matrix.dtype)
    padded[:, :mn] = matrix.T
    return padded


def tile_product(call, dtype, rows=64, columns=64, majors=("k", "k")):
    """(product, truth, bound); what lies beyond the product must stay."""
    a, b = torch.randn(rows, 64).to(dtype), torch.randn(columns, 64).to(dtype)
    out = torch.cat([nan(rows * columns), torch.full((64 * 64,), -7.0)])
    call(stored(a, majors[0]), stored(b, majors[1]), out, rows, columns)
    assert out[rows * columns :].eq(-7).all(), "written beyond the end"
    a, b = a.double(), b.double()
    bound = 64 * 2.0**-24 * (a.abs() @ b.abs().T)
    return out[: rows * columns].view(rows, columns).double(), a @ b.T, bound


@pytest.mark.parametrize(
    "index", range(len(PRODUCTS)), ids=lambda i: "-".join(map(str, PRODUCTS[i]))
)
def test_tile_product(kernels, index):
    dtype, n, _, *majors, _ = PRODUCTS[index]
    for seed, rows, columns in ((1, 64, n), (2, 49, n - 3), (3, 1, 5)):
        kernels.set_seed(seed)
        out, truth, bound = tile_product(
            lambda *arguments: kernels.product(index, *arguments), dtype, rows, columns, majors
        )
        assert ((out - truth).abs() <= bound).all()


def wrong_product(kernels, bug, **shape):
    return tile_product(lambda *a: kernels.wrong_product(BUGS[bug], *a), BF16, **shape)


def test_missing_load_wait_is_caught(kernels):
    for seed in SEEDS:
        kernels.set_seed(seed)
        try:
            assert wrong_product(kernels, "load wait")[0].isnan().all()
        except RuntimeError as error:
            assert "operand changed before its wgmma_wait" in str(error)


def test_missing_product_wait_is_caught(kernels):
    for seed in SEEDS:
        kernels.set_seed(seed)
        assert wrong_product(kernels, "product wait")[0].isnan().all()


@pytest.mark.parametrize(
    "bug,message",
    [
        ("proxy fence", "operand A of wgmma reads shared memory that ordinary stores have written"),
        ("early fence", "operand A of wgmma reads shared memory that ordinary stores have written"),
        ("product fence", "wgmma without wgmma_fence"),
        ("init fence", "mbarrier that mbarrier_fence_init has not shown"),
    ],
)
def test_missing_fence_is_caught(kernels, bug, message):
    for seed in SEEDS:
        kernels.set_seed(seed)
        with pytest.raises(RuntimeError, match=rf"(?s){message}.*tile_sm90\.cuh:"):
            wrong_product(kernels, bug)


def test_missing_barrier_is_caught(kernels):
    """Threads wait at an mbarrier not yet initialized, or multiply what is not yet written."""
    for seed in SEEDS:
        kernels.set_seed(seed)
        try:
            assert wrong_product(kernels, "barrier")[0].isnan().any()
        except RuntimeError as error:
            assert any(
                part in str(error)
                for part in ("not initialized", "changed before its", "ordinary stores")
            )


def test_wrong_swizzle_is_caught(kernels):
    out, truth, bound = wrong_product(kernels, "swizzle")
    assert ((out - truth).abs() <= bound).float().mean() < 0.5


def test_lost_tail_predicate_is_caught(kernels):
    with pytest.raises(AssertionError, match="written beyond the end"):
        wrong_product(kernels, "store tail", rows=49)


# ---- A producer and a consumer


def pipeline(kernels, bug="none", depth=320):
    a, b, out = torch.randn(64, depth).bfloat16(), torch.randn(64, depth).bfloat16(), nan(64, 64)
    kernels.pipeline(BUGS[bug], a, b, out, depth)
    a, b = a.double(), b.double()
    return out.double(), a @ b.T, depth * 2.0**-24 * (a.abs() @ b.abs().T)


@pytest.mark.parametrize("depth", [64, 128, 320])
def test_pipeline(kernels, depth):
    for seed in SEEDS:
        kernels.set_seed(seed)
        out, truth, bound = pipeline(kernels, depth=depth)
        assert ((out - truth).abs() <= bound).all()


@pytest.mark.parametrize(
    "bug,messages",
    [
        ("load wait", ["operand changed before", "more than the 1 arrivals"]),
        ("product wait", ["operand changed before", "wgmma without wgmma_fence"]),
        ("empty wait", ["operand changed before", "more than the 1 arrivals"]),
    ],
)
def test_missing_wait_of_the_pipeline_is_caught(kernels, bug, messages):
    for seed in SEEDS:
        kernels.set_seed(seed)
        try:
            out, truth, bound = pipeline(kernels, bug)
            caught = not ((out - truth).abs() <= bound).all()
        except RuntimeError as error:
            caught = any(message in str(error) for message in messages)
            assert caught, error
        assert caught, f"went unnoticed with seed {seed}"


# ---- Misuse

MISUSE = {
    0: "mbarrier_wait of an mbarrier that is not initialized",
    1: "mbarrier_init of an mbarrier that is in use",
    2: "mbarrier_init of what is not, or not all, in shared memory",
    3: "mbarrier_arrive of an mbarrier whose memory was overwritten",
    4: r"deadlock.*mbarrier_wait for phase 0 of the mbarrier at byte \d+ .1 arrivals and 0 bytes",
    5: "deadlock.*mbarrier_try_wait for phase 0",
    6: "more than the 1 arrivals that this phase expects",
    7: "1048576 bytes expected in one phase",
    8: "tma_load of shared memory off its 1024-byte line",
    9: "tma_load of what is not, or not all, in shared memory",
    10: "tma_load with 3 coordinates of a tensor of 2 dimensions",
    11: "the block ends with a TMA load that nobody waited for",
    12: "mbarrier_invalidate of an mbarrier that a TMA load of",
    13: "ends with TMA stores that it has not waited for",
    14: "deadlock.*for phase 1",
    17: "shared memory was written while a TMA load to it was under way",
    15: "mbarrier_arrive of an mbarrier that is not initialized",
    16: "deadlock.*for phase 0",
    20: "the warps of a warpgroup go different ways",
    21: "accumulators were written between wgmma and its wgmma_wait",
    22: "shared memory of a wgmma operand changed before its wgmma_wait",
    23: "operand A of wgmma of what is not, or not all, in shared memory",
    24: "begins inside the swizzle's period",
    25: "ends with wgmma operations that it has not waited for",
    26: "end after different numbers of wgmma operations",
    27: "the lanes of a warp give wgmma different operands",
    29: "wgmma_operand with strides of 16 and 1000 bytes",
    30: "end after different numbers of wgmma operations",
    31: "wgmma without wgmma_fence",
}


@pytest.mark.parametrize("kind", MISUSE)
def test_misuse_is_refused(kernels, kind):
    with pytest.raises(RuntimeError, match=rf"(?s){MISUSE[kind]}"):
        kernels.misuse(kind, 128, torch.zeros(64, 64, dtype=BF16))


def test_wgmma_needs_a_warpgroup(kernels):
    with pytest.raises(RuntimeError, match="wgmma_fence needs the four warps of a warpgroup"):
        kernels.misuse(28, 96, torch.zeros(64, 64, dtype=BF16))
