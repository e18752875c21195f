// Pairs of blocks (clusters of two, sm_90) that multiply by the same operand at the same time: each
// loads half of it for both, so that L2 gives it once. Or a block alone, which loads both halves.
//
// Both go through the same stages. A stage is full when all its bytes are there, the other block's
// half too, and empty when the warps of both have read it. The kernel begins and ends with
// cluster_sync.
#pragma once

#include "common/cluster.cuh"

namespace vitkernels {

struct Pair {
  int blocks, rank;  // 1 or 2; of this one

  VK_DEVICE bool loads(int half) const { return blocks == 1 || half == rank; }
  VK_DEVICE int all() const { return (1 << blocks) - 1; }  // of tma_load_multicast
  // All lanes of a warp that has read a stage; 1 arrival at each block's barrier.
  VK_DEVICE void release(MBarrier* empty) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < blocks) mbarrier_arrive_at(empty, lane);
  }
};

}  // namespace vitkernels
