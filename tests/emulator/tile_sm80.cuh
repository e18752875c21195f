// Kernels on the sm_80 primitives of csrc/common/, for tests/test_emulator_sm80.py: run by the
// emulator, compiled by nvcc. A Bug takes one necessary thing away.
#pragma once

#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/swizzle.cuh"

namespace vitkernels {

enum class Bug { kNone, kBarrier, kFirstWait, kLastWait, kSwizzle, kLoadTail, kStoreTail };

// One mma: registers in, registers out, a lane's side by side.
template <DType TYPE>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = static_cast<int>(threadIdx.x);
  FragmentA fa;
  FragmentB fb;
  FragmentC fc;
  for (int i = 0; i < 4; ++i) fa.r[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) fb.r[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) fc.v[i] = c[4 * lane + i];
  mma_m16n8k16<TYPE>(fc, fa, fb);
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = fc.v[i];
}

// N matrices of 8 x 8 from `in`, whose rows lie 24 bytes too far apart; registers out.
template <int N, bool TRANSPOSED>
__global__ void load_matrices_kernel(const uint16_t* in, uint32_t* out) {
  VK_SHARED(uint16_t, rows, [32][16]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) rows[lane][8 + i] = in[8 * lane + i];
  __syncwarp();
  uint32_t r[N];
  if (TRANSPOSED)
    load_matrices_transposed(r, &rows[lane][8]);
  else
    load_matrices(r, &rows[lane][8]);
  for (int i = 0; i < N; ++i) out[N * lane + i] = r[i];
}

// A matrix of 8 x 8 in registers, a word a lane.
__global__ void transpose_matrix_kernel(const uint32_t* in, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = transpose_matrix(in[lane]);
}

// c = a b^T with a (rows, 64), b (columns, 64) of TYPE, of whose 64 k the first `depth` count, and
// c (rows, columns) fp32; rows, columns and depth at most 64. Four warps, 16 rows each; k comes in
// two halves, the second under way while the first is multiplied. Rows in shared memory are 128
// bytes, swizzled, or 144 bytes apart.
template <DType TYPE, bool SWIZZLED, Bug BUG = Bug::kNone>
__global__ void __launch_bounds__(128) product_kernel(const uint16_t* a, const uint16_t* b,
                                                      float* c, int rows, int columns, int depth) {
  check_launch_bounds<128>();
  constexpr int kPitch = SWIZZLED ? 128 : 144, kTile = 64 * kPitch;
  VK_SWIZZLED_SHARED(char, tiles);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const auto chunk_at = [&](int tile, int row, int chunk, Swizzle swizzle) {
    const auto offset = static_cast<uint32_t>(tile * kTile + row * kPitch + chunk * 16);
    return tiles + (SWIZZLED ? swizzled(swizzle, offset) : offset);
  };
  const auto load = [&](int tile, const uint16_t* from, int row, int end, int chunk) {
    const int left = BUG == Bug::kLoadTail ? 8 : min(max(depth - chunk * 8, 0), 8);
    const bool inside = row < end;
    copy_async<16>(chunk_at(tile, row, chunk, Swizzle::k128),
                   from + (inside ? row : 0) * 64 + chunk * 8, inside ? 2 * left : 0);
  };

#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load(0, a, thread / 4 + 32 * i, rows, half * 4 + thread % 4);
      load(1, b, thread / 4 + 32 * i, columns, half * 4 + thread % 4);
    }
    commit_copies();
  }

  FragmentC sums[8] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 0 && BUG != Bug::kFirstWait) wait_copies<1>();
    if (half == 1 && BUG != Bug::kLastWait) wait_copies<0>();
    if (BUG != Bug::kBarrier) __syncthreads();
#pragma unroll
    for (int step = 2 * half; step < 2 * half + 2; ++step) {
      constexpr Swizzle kRead = BUG == Bug::kSwizzle ? Swizzle::kNone : Swizzle::k128;
      FragmentA fa;
      load_matrices(fa.r, chunk_at(0, warp * 16 + lane % 16, step * 2 + lane / 16, kRead));
#pragma unroll
      for (int n = 0; n < 8; n += 2) {  // matrices: columns n (k low, k high), then n + 1
        uint32_t r[4];
        const int row = n * 8 + lane / 16 * 8 + lane % 8;
        load_matrices(r, chunk_at(1, row, step * 2 + lane / 8 % 2, kRead));
        mma_m16n8k16<TYPE>(sums[n], fa, FragmentB{{r[0], r[1]}});
        mma_m16n8k16<TYPE>(sums[n + 1], fa, FragmentB{{r[2], r[3]}});
      }
    }
  }
  if (BUG == Bug::kLastWait) wait_copies<0>();

#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + fragment_c_row(lane, i);
      const int column = n * 8 + fragment_c_column(lane, i);
      if ((BUG == Bug::kStoreTail || row < rows) && column < columns)
        c[row * columns + column] = sums[n].v[i];
    }
}

// Copies of BYTES whose first source_bytes[i] count. Bugs: kLastWait, read before the wait.
template <int BYTES, Bug BUG = Bug::kNone>
__global__ void copy_async_kernel(const char* from, const int* source_bytes, char* to) {
  VK_SHARED(char, shared, [32 * BYTES]);
  const int at = static_cast<int>(threadIdx.x) * BYTES;
  copy_async<BYTES>(shared + at, from + at, source_bytes[threadIdx.x]);
  commit_copies();
  if (BUG == Bug::kNone) wait_copies<0>();
  for (int i = 0; i < BYTES; ++i) to[at + i] = shared[at + i];
  if (BUG != Bug::kNone) wait_copies<0>();
}

// Two pairs of warps: of each, the first writes a row, the second reads it, `rounds` times, by two
// barriers of the pair's own; the writer does not wait for the first. Bugs: kBarrier, the reader
// does not wait; kLastWait, the writer does not wait for the reader before the next round.
template <Bug BUG>
__global__ void __launch_bounds__(128) pairs_kernel(int rounds, int* out) {
  check_launch_bounds<128>();
  VK_SHARED(int, row, [2][32]);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int pair = warp / 2, full = 1 + 2 * pair, empty = 2 + 2 * pair;
  for (int round = 0; round < rounds; ++round) {
    if (warp % 2 == 0) {
      if (round > 0 && BUG != Bug::kLastWait) barrier_sync(empty, 64);
      row[pair][lane] = 1000 * pair + 100 * round + lane;
      barrier_arrive(full, 64);
    } else {
      if (BUG != Bug::kBarrier) barrier_sync(full, 64);
      out[(pair * rounds + round) * 32 + lane] = row[pair][31 - lane];
      if (round + 1 < rounds && BUG != Bug::kLastWait) barrier_arrive(empty, 64);
    }
  }
}

}  // namespace vitkernels
