// Kernels whose blocks work in clusters, with the bugs that a test plants.
#pragma once

#include "common/cluster.cuh"

namespace vitkernels {

enum class ClusterBug { kNone, kBegin, kEnd, kOwnStage, kInitFence };

// Every block of a cluster gets the same boxes of 64 x 64 bf16, `steps` of them, through two
// stages: each block loads its part of every box for all. out (blocks, steps, 64, 64) in fp32,
// ranks (blocks). 32 threads read, one loads.
template <ClusterBug BUG = ClusterBug::kNone>
__global__ void __launch_bounds__(64, 1) share_kernel(const __grid_constant__ TensorMap map,
                                                      float* out, int* ranks, int size, int steps) {
  check_launch_bounds<64>();
  constexpr int kBox = 64 * 64;
  VK_SWIZZLED_SHARED(uint16_t, stages);
  VK_SHARED(MBarrier, full, [2]);
  VK_SHARED(MBarrier, empty, [2]);
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int rank = cluster_rank();
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(full + i, 1), mbarrier_init(empty + i, size);
    if (BUG != ClusterBug::kInitFence) mbarrier_fence_init();
    ranks[block] = rank;
  }
  if (BUG == ClusterBug::kBegin)
    __syncthreads();
  else
    cluster_sync();
  if (thread == 32)
    for (int i = 0; i < steps; ++i) {
      const int slot = i % 2, rows = 64 / size;
      if (i >= 2) mbarrier_wait(empty + slot, (i / 2 + 1) % 2);
      mbarrier_arrive_expect(full + slot, 2 * kBox);
      tma_load_multicast(stages + slot * kBox + rank * rows * 64, map, full + slot,
                         {0, (block / size * steps + i) * 64 + rank * rows}, (1 << size) - 1);
    }
  if (thread < 32)
    for (int i = 0; i < steps; ++i) {
      const int slot = i % 2;
      mbarrier_wait(full + slot, i / 2 % 2);
      for (int j = thread; j < kBox; j += 32)
        out[(block * steps + i) * kBox + j] =
            bits_to_float(static_cast<uint32_t>(stages[slot * kBox + j]) << 16);
      __syncwarp();
      if (thread < size)
        mbarrier_arrive_at(empty + slot, BUG == ClusterBug::kOwnStage ? rank : thread);
    }
  if (BUG != ClusterBug::kEnd) cluster_sync();
}

}  // namespace vitkernels
