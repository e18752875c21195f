"""The emulator itself: each primitive against its definition; a planted bug of each kind is caught.

The kernels are in tests/emulator/kernels.cpp; no torch header and no CUDA header is involved.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from emulated import SEEDS, compile_kernels, nan
from native_build import CXX, ROOT

from vitkernels.ops._random import philox_word

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler: there is nothing to emulate")

KERNELS = ROOT / "tests" / "emulator" / "kernels.cpp"


@pytest.fixture(scope="module", params=["assembly", "ucontext"])
def library(request):
    """The kernels, with either way to switch between fibers."""
    flags = ["-DVK_EMULATOR_UCONTEXT"] if request.param == "ucontext" else []
    return compile_kernels(KERNELS, f"emulator_{request.param}", *flags)


@pytest.fixture
def kernels(library):
    library.set_seed(1)
    return library


# ---- Indices, warps, votes


def test_indices_in_three_dimensions(kernels):
    grid, block = (3, 2, 4), (5, 3, 2)
    where = torch.full((24 * 30, 6), -1, dtype=torch.int32)
    kernels.indices(*grid, *block, where)
    expected = [
        (bx, by, bz, x, y, z)
        for bz in range(4) for by in range(2) for bx in range(3)
        for z in range(2) for y in range(3) for x in range(5)
    ]  # fmt: skip
    assert where.tolist() == [list(e) for e in expected]


def shuffle_source(kind, lane, argument, width):
    """PTX ISA, shfl.sync, with CUDA's c operand for `width`: the pseudo-code, line by line."""
    bval = argument & 31
    segment = (32 - width) & 31
    cval = 0 if kind == "up" else 31
    max_lane = (lane & segment) | (cval & ~segment & 31)
    min_lane = lane & segment
    if kind == "up":
        source, valid = lane - bval, lane - bval >= max_lane
    elif kind == "down":
        source, valid = lane + bval, lane + bval <= max_lane
    elif kind == "xor":
        source, valid = lane ^ bval, (lane ^ bval) <= max_lane
    else:
        source = min_lane | (bval & ~segment & 31)
        valid = source <= max_lane
    return source if valid else lane


@pytest.mark.parametrize("kind", ["idx", "up", "down", "xor"])
def test_shuffles(kernels, kind):
    out = torch.empty(32, dtype=torch.int32)
    for width in (2, 4, 8, 16, 32):
        for argument in range(32):
            kernels.shuffle(["idx", "up", "down", "xor"].index(kind), width, argument, out)
            expected = [shuffle_source(kind, lane, argument, width) for lane in range(32)]
            assert out.tolist() == expected, (width, argument)


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x80000001, 0x00F0F000, 1 << 17])
def test_votes(kernels, mask):
    for predicates in (0, 0xFFFFFFFF, 0x12345678, mask):
        ballot, any_, all_ = (torch.full((32,), -1, dtype=torch.int32) for _ in range(3))
        kernels.vote(ctypes.c_uint(mask), ctypes.c_uint(predicates), ballot, any_, all_)
        voted = mask & predicates
        for lane in range(32):
            if mask >> lane & 1:
                assert ballot[lane].item() & 0xFFFFFFFF == voted
                assert (any_[lane].item(), all_[lane].item()) == (voted != 0, voted == mask)
            else:
                assert ballot[lane].item() == -1


def test_parts_of_a_warp_go_their_own_ways(kernels):
    out = nan(32)
    kernels.half_warps(out)
    low, high = sum(range(16)), sum(range(16, 32)) * 16 * 16
    assert out.tolist() == [low] * 16 + [high] * 16


@pytest.mark.parametrize("threads", [1, 31, 64, 100, 1024])
def test_barriers_that_count(kernels, threads):
    for threshold in {0, 1, threads // 2, threads}:
        out = torch.empty(threads, dtype=torch.int32)
        kernels.block_votes(threads, threshold, out)
        expected = threshold * 4 + (threshold > 0) * 2 + (threshold == threads)
        assert out.eq(expected).all()


# ---- Reductions


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
def test_sum_over_lanes(kernels, lanes):
    values = torch.randint(-100, 100, (32,)).float()
    out = nan(64)
    kernels.lanes_sum(lanes, values, out)
    expected = values.view(-1, lanes).sum(1, keepdim=True).expand(-1, lanes).reshape(-1)
    assert torch.equal(out[:32], expected) and torch.equal(out[32:], -expected)


@pytest.mark.parametrize("threads", [32, 96, 256, 1024])
def test_sum_over_block(kernels, threads):
    values = torch.randint(-100, 100, (threads,)).float()
    for seed in SEEDS:
        kernels.set_seed(seed)
        out = nan(4 * threads)
        kernels.block_sum(threads, values, out, 0)
        sums = [(values + r).sum().item() for r in range(4)]
        assert out.view(4, threads).tolist() == [[s] * threads for s in sums]


def test_one_buffer_for_two_block_sums_is_caught(kernels):
    values = torch.randint(-100, 100, (256,)).float()
    right, wrong = nan(1024), 0
    kernels.block_sum(256, values, right, 0)
    for seed in SEEDS:
        kernels.set_seed(seed)
        out = nan(1024)
        kernels.block_sum(256, values, out, 1)
        wrong += not torch.equal(out, right)
    assert wrong == len(SEEDS)


# ---- Planted bugs: barriers, tails


@pytest.mark.parametrize("threads", [2, 33, 128, 1000])
def test_reverse_through_shared_memory(kernels, threads):
    values, out = torch.randn(threads), nan(threads)
    kernels.reverse(threads, values, out, 3, 0)
    assert torch.equal(out, values.flip(0))


@pytest.mark.parametrize("bug", [1, 2])
def test_missing_barrier_is_caught(kernels, bug):
    values = torch.randn(128)
    for seed in SEEDS:
        kernels.set_seed(seed)
        out = nan(128)
        kernels.reverse(128, values, out, 2, bug)
        assert not torch.equal(out, values), f"bug {bug} went unnoticed with seed {seed}"
        if bug == 1:  # never-written shared memory is NaN
            assert out.isnan().any()


def test_missing_syncwarp_is_caught(kernels):
    values, out = torch.randn(256), nan(256)
    kernels.neighbour(values, out, 0)
    assert torch.equal(out, values.view(8, 32).roll(-1, 1).reshape(-1))
    for seed in SEEDS:
        kernels.set_seed(seed)
        kernels.neighbour(values, out, 1)
        assert out.isnan().any()


@pytest.mark.parametrize("bug", [1, 2])
def test_missing_tail_predicate_is_caught(kernels, bug):
    values = torch.cat([torch.ones(20), nan(12)])
    out = nan(1)
    kernels.tail(values, 20, out, 0)
    assert out.item() == 20
    kernels.tail(values, 20, out, bug)
    assert out.isnan().all()


def test_exited_threads_are_not_waited_for(kernels):
    out = nan(32)
    kernels.early_exit(64, out)
    assert out.tolist() == list(range(31, -1, -1))


def test_deadlock_says_who_waits_where(kernels):
    source = KERNELS.read_text().splitlines()
    begin = next(i for i, line in enumerate(source) if "void deadlock_kernel" in line)
    shuffle = next(i for i in range(begin, len(source)) if "__shfl" in source[i]) + 1
    barrier = next(i for i in range(begin, len(source)) if "__syncthreads" in source[i]) + 1
    kernels.set_seed(77)
    with pytest.raises(RuntimeError) as error:
        kernels.deadlock(nan(64))
    message = str(error.value)
    assert re.search(r"deadlock, block \([012],[01],0\) of grid \(3,2,1\), seed 77", message)
    where = r"with mask 0xffffffff at \S*kernels\.cpp:"
    assert re.search(rf"threads 0-15,32-47 wait in __shfl_xor_sync {where}{shuffle}\b", message)
    where = r"at \S*kernels\.cpp:"
    assert re.search(rf"threads 16-31,48-63 wait in __syncthreads {where}{barrier}\b", message)


def test_two_different_barriers_are_an_error(kernels):
    with pytest.raises(RuntimeError, match="other threads of the block are at the barrier of"):
        kernels.two_barriers()


def test_mask_must_hold_the_calling_lane(kernels):
    with pytest.raises(RuntimeError, match=r"leaves out the calling lane\n  thread \(0,0,0\)"):
        kernels.own_lane_left_out()


# ---- Memory and limits


def test_shared_memory_starts_as_all_ones(kernels):
    out = torch.zeros(4, dtype=torch.int32)
    for _ in range(2):  # a block leaves nothing to the next
        kernels.static_shared(out)
        assert out.tolist() == [-1, 255, -1, 1]


@pytest.mark.parametrize("dynamic", [0, 1])
def test_write_past_the_end_of_shared_memory(kernels, dynamic):
    kernels.shared_overflow(64, 15, dynamic)
    for index in (16, 20):
        with pytest.raises(RuntimeError, match=r"past the end of (dynamic|static) shared memory"):
            kernels.shared_overflow(64, index, dynamic)


def test_too_much_shared_memory_is_refused(kernels):
    kernels.bounded(1, 64, ctypes.c_int64(232448))
    with pytest.raises(RuntimeError, match=r"232449 bytes of dynamic shared .*limit is 232448"):
        kernels.bounded(1, 64, ctypes.c_int64(232449))
    with pytest.raises(RuntimeError, match="65536 bytes of static shared memory"):
        kernels.large_static()
    with pytest.raises(RuntimeError, match="static and dynamic shared memory"):
        kernels.shared_overflow(232448, 0, 0)


@pytest.mark.parametrize("grid_y,threads", [(1, 0), (1, 1025), (0, 32), (65536, 32)])
def test_impossible_launches_are_refused(kernels, grid_y, threads):
    with pytest.raises(RuntimeError, match="cannot launch with"):
        kernels.bounded(grid_y, threads, ctypes.c_int64(0))


def test_launch_bounds_are_checked(kernels):
    kernels.bounded(1, 64, ctypes.c_int64(0))
    with pytest.raises(RuntimeError, match="96 threads a block; __launch_bounds__ promises at m"):
        kernels.bounded(1, 96, ctypes.c_int64(0))


def test_misaligned_16_byte_access_is_caught(kernels):
    source, target = torch.arange(16.0), torch.zeros(16)
    kernels.access_16(source[4:8], target[8:12])
    assert target[8:12].tolist() == [4, 5, 6, 7]
    with pytest.raises(RuntimeError, match="16-byte access off its 16-byte line"):
        kernels.access_16(source[1:5], target[8:12])


# ---- Conversions and random words


def as_int16(words):
    return torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], 1).reshape(-1).to(torch.int16)


def test_conversions_round_like_torch(kernels):
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64).to(torch.int32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    exact = [halves.view(dtype).float() for dtype in (torch.float16, torch.bfloat16)]
    # Between two neighbours, and just to both sides of that: where rounding decides.
    ties = [(e + e.nextafter(torch.tensor(torch.inf))) / 2 for e in exact]
    middles = [(e[:-1].double() + e[1:].double()).div(2).float() for e in exact]
    near = [m.nextafter(torch.tensor(s * torch.inf)) for m in middles for s in (-1, 1)]
    values = torch.cat([bits.view(torch.float32), *exact, *ties, *middles, *near])
    values = torch.cat([values, values[: len(values) % 2]])
    words = [torch.empty(len(values) // 2, dtype=torch.int32) for _ in range(2)]
    kernels.convert(values, ctypes.c_int64(len(values) // 2), *words)
    number = ~values.isnan()
    for word, dtype in zip(words, (torch.bfloat16, torch.float16), strict=True):
        ours, theirs = as_int16(word), values.to(dtype).view(torch.int16)
        assert torch.equal(ours[number], theirs[number])
        assert (ours[~number] == 0x7FFF).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_widens_exactly(kernels, dtype):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    stored, seen = torch.empty(2**16), torch.empty(2**16)
    bf16 = int(dtype is torch.bfloat16)
    kernels.unpack(halves, ctypes.c_int64(2**16), bf16, stored, seen)
    for out in (stored, seen):
        assert torch.equal(out.isnan(), halves.isnan())
        assert torch.equal(out.nan_to_num(3.0), halves.float().nan_to_num(3.0))


def test_exp2_errs_as_much_as_it_may(kernels):
    """PTX ISA, ex2: relative error to 2^-22; .ftz: subnormal arguments and results are 0."""
    whole = torch.arange(-126.0, 128.0)
    values = torch.cat([torch.linspace(-126, 127.9, 4096), whole])
    out = torch.empty(len(values))
    kernels.exponentials(values, ctypes.c_int64(len(values)), out)
    error = out.double() / values.double().exp2() - 1
    assert 2**-22.1 < error.max() < 2**-21.4 and 2**-22.1 < -error.min() < 2**-21.4
    assert torch.equal(out[-len(whole) :], whole.exp2())
    special = torch.tensor([-126.5, -torch.inf, torch.inf, torch.nan, 128.0, 1e-40])
    out = torch.empty(len(special))
    kernels.exponentials(special, ctypes.c_int64(len(special)), out)
    assert out.tolist()[:3] == [0.0, 0.0, torch.inf] and out[3].isnan()
    assert out[4] == torch.inf and abs(out[5] - 1) < 2**-21.4


def test_rsqrt_errs_as_much_as_it_may(kernels):
    """PTX ISA, rsqrt.approx: relative error to 2^-22.9."""
    values = torch.cat([torch.logspace(-38, 38, 4096), torch.tensor([1e-42, torch.inf, -1.0])])
    out = torch.empty(len(values))
    kernels.inverse_roots(values, ctypes.c_int64(len(values)), out)
    error = (out.double() * values.double().sqrt() - 1)[:-3]
    assert 2**-23.1 < error.max() < 2**-22.3 and 2**-23.1 < -error.min() < 2**-22.3
    assert abs(out[-3] / 1e-42**-0.5 - 1) < 1e-3 and out[-2] == 0 and out[-1].isnan()


@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("first", [0, 2**32 - 100, 2**40])
def test_philox_words_are_the_references(kernels, seed, first):
    ways = torch.empty(2, 256, dtype=torch.int32)
    kernels.philox(ctypes.c_uint64(seed), ctypes.c_uint64(first), 256, *ways)
    expected = philox_word(torch.tensor([seed]), torch.arange(first, first + 256))
    for out in ways:
        assert torch.equal(out.long() & 0xFFFFFFFF, expected)


# ---- The order of threads


def order(kernels, seed, blocks=3, os_threads=1):
    kernels.set_seed(seed)
    counter = torch.zeros(blocks, dtype=torch.int32)
    out = torch.full((blocks, 64), -1, dtype=torch.int32)
    kernels.order(blocks, 64, os_threads, counter, out)
    assert torch.equal(out.sort(1).values, torch.arange(64).expand(blocks, -1))
    return out.tolist()


def test_order_is_a_permutation_that_the_seed_repeats(kernels):
    first = order(kernels, 5)
    assert kernels.seed() == 5
    order(kernels, 6)
    assert order(kernels, 5) == first, "the same seed after other launches"
    assert order(kernels, 6) != first
    assert len({tuple(o) for o in first}) == 3, "blocks of one launch differ"
    assert order(kernels, 5, os_threads=4) == first, "on several OS threads"
    rotations = [[(start + i) % 64 for i in range(64)] for start in range(64)]
    assert all(o not in rotations for o in first)


# ---- A grid that begins before the one before it has ended


@pytest.mark.parametrize("os_threads", [1, 3])
def test_a_dependent_grid_waits_for_the_one_before(kernels, os_threads):
    values, blocks = torch.arange(160, dtype=torch.float32), 5
    for seed in SEEDS:
        kernels.set_seed(seed)
        doubled, sums = nan(160), nan(3, 64)
        kernels.dependent(values, blocks, os_threads, 0, doubled, sums)
        assert torch.equal(doubled, 2 * values)
        rest = torch.zeros(192).index_copy_(0, torch.arange(160), doubled)
        assert torch.equal(sums, rest.view(3, 64).sum(0).expand(3, 64))


def test_a_dependent_grid_that_does_not_wait(kernels):
    """Nobody waits: an error. One thread of a block does: what the others read is not there yet."""
    values = torch.arange(160, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="without waiting for the grid before it"):
        kernels.dependent(values, 5, 1, 1, nan(160), nan(3, 64))
    sums = nan(3, 64)
    kernels.dependent(values, 5, 1, 2, nan(160), sums)
    assert sums.isnan().any()
