// Small kernels for tests/test_emulator.py, each with a C function that launches it and returns
// null or the error. A `bug` argument takes one necessary thing away: the tests show that the
// emulator notices.
#include "common/dependent_launch.cuh"
#include "common/device.cuh"
#include "exports.h"

namespace vitkernels {
namespace {

VK_DEVICE int linear_thread() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

// ---- Indices: where[k] = (blockIdx, threadIdx) of the k-th thread of the k-th block, x fastest.

__global__ void indices_kernel(int* where) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  int* mine = where + 6 * (block * threads + static_cast<unsigned>(linear_thread()));
  mine[0] = static_cast<int>(blockIdx.x), mine[1] = static_cast<int>(blockIdx.y);
  mine[2] = static_cast<int>(blockIdx.z), mine[3] = static_cast<int>(threadIdx.x);
  mine[4] = static_cast<int>(threadIdx.y), mine[5] = static_cast<int>(threadIdx.z);
}

// ---- Shuffles and votes

__global__ void shuffle_kernel(int kind, int width, int argument, int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int got = 0;
  if (kind == 0) got = __shfl_sync(kAllLanes, lane, argument, width);
  if (kind == 1) got = __shfl_up_sync(kAllLanes, lane, static_cast<unsigned>(argument), width);
  if (kind == 2) got = __shfl_down_sync(kAllLanes, lane, static_cast<unsigned>(argument), width);
  if (kind == 3) got = __shfl_xor_sync(kAllLanes, lane, argument, width);
  out[lane] = got;
}

__global__ void vote_kernel(unsigned mask, unsigned predicates, unsigned* ballot, int* any,
                            int* all) {
  const unsigned lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  ballot[lane] = __ballot_sync(mask, predicates >> lane & 1);
  any[lane] = __any_sync(mask, predicates >> lane & 1);
  all[lane] = __all_sync(mask, predicates >> lane & 1);
}

// The halves of a warp sum over themselves a different number of times, each with its own mask.
__global__ void half_warps_kernel(float* out) {
  const unsigned lane = threadIdx.x, mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  float v = static_cast<float>(lane);
  for (int round = 0; round < (lane < 16 ? 1 : 3); ++round)
    for (int offset = 8; offset > 0; offset /= 2) v += __shfl_xor_sync(mask, v, offset);
  out[lane] = v;
}

__global__ void block_votes_kernel(int threshold, int* out) {
  const int thread = linear_thread();
  const int count = __syncthreads_count(thread < threshold);
  const int any = __syncthreads_or(thread < threshold);
  const int all = __syncthreads_and(thread < threshold);
  out[thread] = count * 4 + any * 2 + all;
}

// ---- Reductions of device.cuh

__global__ void sum_over_lanes_kernel(int lanes, const float* in, float* out) {
  float v[2] = {in[threadIdx.x], -in[threadIdx.x]};
  sum_over_lanes(v, lanes);
  out[threadIdx.x] = v[0];
  out[threadIdx.x + 32] = v[1];
}

// Sums of in + round for four rounds. Bug: one buffer instead of two in turn.
__global__ void sum_over_block_kernel(const float* in, float* out, bool bug) {
  VK_SHARED(float, partial, [2][kWarp]);
  const unsigned thread = threadIdx.x;
  for (int round = 0; round < 4; ++round) {
    float v[1] = {in[thread] + static_cast<float>(round)};
    sum_over_block(v, partial[bug ? 0 : round % 2]);
    out[static_cast<unsigned>(round) * blockDim.x + thread] = v[0];
  }
}

// ---- Barriers

// Reverses the block's elements through shared memory, `rounds` times. Bugs: 1, no barrier before
// reading; 2, none before the next round writes.
__global__ void reverse_kernel(const float* in, float* out, int rounds, int bug) {
  VK_DYNAMIC_SHARED(float, tile);
  const int thread = linear_thread(), n = static_cast<int>(blockDim.x);
  float v = in[thread];
  for (int round = 0; round < rounds; ++round) {
    tile[thread] = v;
    if (bug != 1) __syncthreads();
    v = tile[n - 1 - thread];
    if (bug != 2) __syncthreads();
  }
  out[thread] = v;
}

// Each lane takes its right neighbour's element through shared memory. Bug: no __syncwarp.
__global__ void neighbour_kernel(const float* in, float* out, bool bug) {
  VK_SHARED(float, row, [8][kWarp]);
  const unsigned thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  row[warp][lane] = in[thread];
  if (!bug) __syncwarp();
  out[thread] = row[warp][(lane + 1) % kWarp];
}

// The warp's sum of n < 32 elements. Bugs: 1, lanes past the end leave before the shuffles;
// 2, they load what lies behind the end.
__global__ void tail_kernel(const float* in, int n, float* out, int bug) {
  const int lane = static_cast<int>(threadIdx.x);
  if (bug == 1 && lane >= n) return;
  float v[1] = {bug == 2 || lane < n ? in[lane] : 0.0f};
  sum_over_lanes(v, kWarp);
  if (lane == 0) *out = v[0];
}

// Threads of the upper half leave before the barrier: allowed, exited threads are not waited for.
__global__ void early_exit_kernel(float* out) {
  VK_SHARED(float, tile, [64]);
  const unsigned thread = threadIdx.x;
  if (thread >= blockDim.x / 2) return;
  tile[thread] = static_cast<float>(thread);
  __syncthreads();
  out[thread] = tile[blockDim.x / 2 - 1 - thread];
}

// Half of each warp waits for the other half, which waits for the block.
__global__ void deadlock_kernel(float* out) {
  float v = 1.0f;
  if (threadIdx.x % 32 < 16)
    v = __shfl_xor_sync(kAllLanes, v, 1);
  else
    __syncthreads();
  out[threadIdx.x] = v;
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void own_lane_left_out_kernel() { __syncwarp(0xfffffffeu); }

// ---- A grid that begins before the one before it has ended: from is doubled, then summed

__global__ void leading_kernel(const float* from, float* doubled) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  let_next_grid_begin();
  doubled[i] = 2.0f * from[i];
}

__global__ void dependent_kernel(const float* doubled, int n, int bug, float* sums) {
  if (bug == 0 || (bug == 2 && threadIdx.x == 0)) wait_for_grid_before();
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x))
    sum += doubled[i];
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// ---- Memory

__global__ void static_shared_kernel(int* out) {
  VK_SHARED(int, first, [4]);
  VK_SHARED(unsigned char, second, [3][5]);
  VK_DYNAMIC_SHARED(int, third);
  out[0] = first[3];
  out[1] = second[2][4];
  out[2] = third[0];
  out[3] = reinterpret_cast<uintptr_t>(first) % 16 == 0;
  second[2][4] = 7;  // within bounds
}

__global__ void large_static_kernel() {
  VK_SHARED(float, a, [8192]);
  VK_SHARED(float, b, [8192]);
  a[0] = b[0];
}

__global__ void shared_overflow_kernel(int index, bool dynamic) {
  VK_SHARED(float, fixed, [16]);
  VK_DYNAMIC_SHARED(float, sized);
  (dynamic ? sized : fixed)[index] = 1.0f;
}

__global__ void access_16_kernel(const char* from, char* to) { store_16(to, load_cached_16(from)); }

__global__ void __launch_bounds__(64) bounded_kernel() { check_launch_bounds<64>(); }

// ---- Arithmetic, conversions and random words

__global__ void convert_kernel(const float* in, int64_t n, uint32_t* bf16, uint32_t* f16) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    bf16[i] = pack_bf16(in[2 * i], in[2 * i + 1]);
    f16[i] = pack_f16(in[2 * i], in[2 * i + 1]);
  }
}

__global__ void exp2_kernel(const float* in, int64_t n, float* out) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) out[i] = exp2_approx(in[i]);
}

__global__ void rsqrt_kernel(const float* in, int64_t n, float* out) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) out[i] = rsqrt_approx(in[i]);
}

__global__ void unpack_kernel(const uint16_t* in, int64_t n, DType dtype, float* out, float* one) {
  Columns<true> columns(static_cast<int>(threadIdx.x), 0, 1, static_cast<int>(n));
  for (; columns.holds(0); columns.first += static_cast<int>(blockDim.x) * 8) {
    float v[8];
    to_floats(load_raw(in, dtype, columns), dtype, v);
    store(out, DType::kF32, columns, v);
    for (int j = 0; j < 8; ++j) one[columns[j]] = v[j];
  }
}

__global__ void philox_kernel(uint64_t seed, uint64_t first, int n, uint32_t* out, uint32_t* too) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    out[i] = philox_word(seed, first + static_cast<uint64_t>(i));
    too[i] = philox_word<true>(seed, first + static_cast<uint64_t>(i));
  }
}

// ---- The order of threads between two barriers, as they came

__global__ void order_kernel(int* counter, int* order) {
  __syncthreads();
  const unsigned threads = blockDim.x;
  order[blockIdx.x * threads + static_cast<unsigned>(counter[blockIdx.x]++)] =
      static_cast<int>(threadIdx.x);
}

}  // namespace
}  // namespace vitkernels

using namespace vitkernels;

EXPORT indices(int gx, int gy, int gz, int bx, int by, int bz, int* where) {
  return launch(indices_kernel, dim3(gx, gy, gz), dim3(bx, by, bz), 0, where);
}
EXPORT shuffle(int kind, int width, int argument, int* out) {
  return launch(shuffle_kernel, 1, 32, 0, kind, width, argument, out);
}
EXPORT vote(unsigned mask, unsigned predicates, unsigned* ballot, int* any, int* all) {
  return launch(vote_kernel, 1, 32, 0, mask, predicates, ballot, any, all);
}
EXPORT half_warps(float* out) { return launch(half_warps_kernel, 1, 32, 0, out); }
EXPORT block_votes(int threads, int threshold, int* out) {
  return launch(block_votes_kernel, 1, threads, 0, threshold, out);
}
EXPORT lanes_sum(int lanes, const float* in, float* out) {
  return launch(sum_over_lanes_kernel, 1, 32, 0, lanes, in, out);
}
EXPORT block_sum(int threads, const float* in, float* out, int bug) {
  return launch(sum_over_block_kernel, 1, threads, 0, in, out, bug != 0);
}
EXPORT reverse(int threads, const float* in, float* out, int rounds, int bug) {
  return launch(reverse_kernel, 1, threads, threads * sizeof(float), in, out, rounds, bug);
}
EXPORT neighbour(const float* in, float* out, int bug) {
  return launch(neighbour_kernel, 1, 256, 0, in, out, bug != 0);
}
EXPORT tail(const float* in, int n, float* out, int bug) {
  return launch(tail_kernel, 1, 32, 0, in, n, out, bug);
}
EXPORT early_exit(int threads, float* out) { return launch(early_exit_kernel, 1, threads, 0, out); }
EXPORT deadlock(float* out) { return launch(deadlock_kernel, dim3(3, 2), 64, 0, out); }
EXPORT two_barriers() { return launch(two_barriers_kernel, 1, 64, 0); }
EXPORT own_lane_left_out() { return launch(own_lane_left_out_kernel, 1, 32, 0); }
EXPORT static_shared(int* out) { return launch(static_shared_kernel, 1, 1, 64, out); }
EXPORT large_static() { return launch(large_static_kernel, 1, 1, 0); }
EXPORT shared_overflow(int shared_bytes, int index, int dynamic) {
  return launch(shared_overflow_kernel, 1, 1, shared_bytes, index, dynamic != 0);
}
EXPORT access_16(const char* from, char* to) { return launch(access_16_kernel, 1, 1, 0, from, to); }
EXPORT bounded(int grid_y, int threads, int64_t shared_bytes) {
  return launch(bounded_kernel, dim3(1, grid_y), threads, static_cast<size_t>(shared_bytes));
}
EXPORT convert(const float* in, int64_t n, uint32_t* bf16, uint32_t* f16) {
  return launch(convert_kernel, 1, 32, 0, in, n, bf16, f16);
}
EXPORT exponentials(const float* in, int64_t n, float* out) {
  return launch(exp2_kernel, 1, 32, 0, in, n, out);
}
EXPORT inverse_roots(const float* in, int64_t n, float* out) {
  return launch(rsqrt_kernel, 1, 32, 0, in, n, out);
}
EXPORT unpack(const uint16_t* in, int64_t n, int is_bf16, float* out, float* one) {
  const DType dtype = is_bf16 ? DType::kBF16 : DType::kF16;
  return launch(unpack_kernel, 1, 1, 0, in, n, dtype, out, one);
}
EXPORT philox(uint64_t seed, uint64_t first, int n, uint32_t* out, uint32_t* too) {
  return launch(philox_kernel, 1, 32, 0, seed, first, n, out, too);
}
EXPORT order(int blocks, int threads, int os_threads, int* counter, int* out) {
  emulator::settings().threads = os_threads;
  return launch(order_kernel, blocks, threads, 0, counter, out);
}
EXPORT dependent(const float* from, int blocks, int os_threads, int bug, float* doubled,
                 float* sums) {
  emulator::settings().threads = os_threads;
  return guarded([&] {
    emulator::LeadingGrid leading(
        [&] { emulator::launch(leading_kernel, {blocks, 32, 0}, from, doubled); });
    emulator::run_dependent(leading, {3, 64, 0},
                            [&] { dependent_kernel(doubled, 32 * blocks, bug, sums); });
  });
}
