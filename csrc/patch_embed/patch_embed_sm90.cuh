// What the sm_90 kernels of patch_embed share: the roles of a block's warpgroups and the ring of
// stages between them.
#pragma once

#include "common/pair.cuh"
#include "common/wgmma.cuh"
#include "patch_embed/patch_embed_gather.cuh"

namespace vitkernels::patch_embed::sm90 {

constexpr int kConsumerWarps = 8, kConsumers = kConsumerWarps * kWarp;  // they multiply
constexpr int kGatherers = kThreads - kConsumers;                       // the last warpgroup
// 128 * (2 * 200 + 104) of 65,536 registers.
constexpr int kConsumerRegisters = 200, kGathererRegisters = 104;

// A stage is empty when the warps that multiply have done so, those of both blocks of a pair.
struct Ring {
  MBarrier *full, *empty;
  Pair pair;
  int slot = 0, phase = 0;

  // The block's barriers, before either block of a pair goes on.
  VK_DEVICE void begin(int arrivals_until_full) const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(full + i, arrivals_until_full);
        mbarrier_init(empty + i, kConsumerWarps * pair.blocks);
      }
      mbarrier_fence_init();
    }
    cluster_sync();
  }
  VK_DEVICE void advance() {
    if (++slot == kStages) slot = 0, phase ^= 1;
  }
  VK_DEVICE void wait_full() const { mbarrier_wait(full + slot, phase); }
  VK_DEVICE void wait_empty() const { mbarrier_wait(empty + slot, phase ^ 1); }  // at once at first
};

}  // namespace vitkernels::patch_embed::sm90
