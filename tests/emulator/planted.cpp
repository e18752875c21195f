// Kernels for tests/test_emulator_sanitizers.py: each is right, or has one planted bug that only a
// sanitizer of the host build sees. The comments `race` and `bounds` mark the lines that it must
// name.
#include <memory>

#include "common/device.cuh"
#include "common/mbarrier.cuh"
#include "common/mma.cuh"
#include "exports.h"

namespace vitkernels {
namespace {

enum Meeting { kNone, kBlock, kNamed, kMBarrier, kWarp };

// 64 threads; the second warp reads what the first has written. The scheduler alone could not tell:
// a thread that has not run yet is no error where the value is not used.
__global__ void handover_kernel(int meeting, int* out) {
  VK_SHARED(int, tile, [32]);
  VK_SHARED(MBarrier, barriers, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) mbarrier_init(&barriers[0], 64);
  __syncthreads();
  if (thread < 32) tile[thread] = thread;  // race
  if (meeting == kBlock) __syncthreads();
  if (meeting == kNamed) barrier_sync(3, 64);
  if (meeting == kWarp) __syncwarp();  // orders one warp, not two
  if (meeting == kMBarrier) {
    mbarrier_arrive(&barriers[0]);
    mbarrier_wait(&barriers[0], 0);
  }
  if (thread >= 32) out[thread - 32] = tile[63 - thread];  // race
}

// A tile read by ldmatrix, then written again for the next turn: the barrier in between protects
// the reader, and no value is wrong without it when the reader is fast.
__global__ void reuse_kernel(bool barrier, uint32_t* out) {
  VK_SHARED(uint16_t, tile, [8][8]);
  const int thread = static_cast<int>(threadIdx.x);
  for (int turn = 0; turn < 2; ++turn) {
    if (thread >= 32) tile[thread / 4 - 8][thread % 4] = static_cast<uint16_t>(turn);  // race
    __syncthreads();
    if (thread < 32) {
      uint32_t fragment[1];
      load_matrices(fragment, tile[thread % 8]);
      out[thread] = fragment[0];
    }
    if (barrier) __syncthreads();
  }
}

// Two blocks, which nothing orders: each writes its own element, or both the same.
__global__ void blocks_kernel(bool apart, int* out) {
  if (threadIdx.x == 0) out[apart ? blockIdx.x : 0] = static_cast<int>(blockIdx.x);  // race
}

__global__ void bounds_kernel(int past, const int* in, int* out) {
  VK_SHARED(int, tile, [32]);
  const int thread = static_cast<int>(threadIdx.x);
  tile[thread] = in[thread];
  __syncthreads();
  if (past == 1) tile[thread + 1] = 0;     // bounds
  if (past == 2) out[thread + 1] = 0;      // bounds
  if (past == 3) out[0] = in[thread + 1];  // bounds
  out[thread] = tile[31 - thread];
}

}  // namespace
}  // namespace vitkernels

using namespace vitkernels;

EXPORT handover(int meeting) {
  int out[32];
  return launch(handover_kernel, 1, 64, 0, meeting, &out[0]);
}
EXPORT reuse(int barrier) {
  uint32_t out[32];
  return launch(reuse_kernel, 1, 64, 0, barrier != 0, &out[0]);
}
EXPORT blocks(int apart) {
  int out[2];
  return launch(blocks_kernel, 2, 32, 0, apart != 0, &out[0]);
}
EXPORT bounds(int past) {
  const std::unique_ptr<int[]> in(new int[32]()), out(new int[32]);
  return launch(bounds_kernel, 1, 32, 0, past, in.get(), out.get());
}
