// Blocks of a cluster (sm_90): neighbours along x that run at the same time, on multiprocessors
// close to each other, and reach each other's shared memory. The emulator's twin is
// csrc/emulator/common/cluster.cuh.
//
// A block's barriers are initialized, and shown by mbarrier_fence_init, before the cluster meets,
// and nobody touches them before. A block stays until nobody reaches into its shared memory any
// more: a kernel ends with cluster_sync, or another proof.
//
// References: [P] PTX ISA, instruction named.
#pragma once

#include "common/tma.cuh"

namespace vitkernels {

// Of this block in its cluster, which Device::launch_cluster made.
VK_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits until all threads of the cluster that have not exited are here; what they wrote to shared
// memory before can be read after [P: barrier.cluster].
VK_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Arrives at the barrier that lies where `barrier` does in block `rank` of the cluster, which may
// be this one. It says that reads are over, and shows nobody what was written: a release at cluster
// scope would be a fence of the whole GPU at every stage [P: mapa, mbarrier.arrive].
VK_DEVICE void mbarrier_arrive_at(MBarrier* barrier, int rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// tma_load to the same place in each block of the cluster whose bit is set; each block's own
// barrier, where `barrier` lies in this one, gets the bytes [P: cp.async.bulk.tensor,
// .multicast::cluster].
template <int RANK>
VK_DEVICE void tma_load_multicast(void* to_shared, const TensorMap& map, MBarrier* barrier,
                                  const int (&at)[RANK], int blocks) {
  static_assert(RANK == 2 || RANK == 3, "2 or 3 dimensions");
  const uint32_t to = shared_address(to_shared), by = shared_address(barrier);
  const auto mask = static_cast<uint16_t>(blocks);
  if constexpr (RANK == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(&map), "r"(by), "r"(at[0]), "r"(at[1]), "h"(mask)
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(&map), "r"(by), "r"(at[0]), "r"(at[1]), "r"(at[2]), "h"(mask)
        : "memory");
}

}  // namespace vitkernels
