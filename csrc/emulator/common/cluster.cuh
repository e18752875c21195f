// The emulator's twin of csrc/common/cluster.cuh. The blocks of a cluster take turns on one thread
// of the CPU.
//
// References: [P] PTX ISA, instruction named.
#pragma once

#include "common/tma.cuh"

namespace vitkernels {

inline int cluster_rank() { return emulator::cluster_rank(); }

// [P: barrier.cluster]
inline void cluster_sync(VkPlace place = VkPlace::here()) { emulator::meet_cluster(place); }

// [P: mapa, mbarrier.arrive]
inline void mbarrier_arrive_at(MBarrier* barrier, int rank, VkPlace place = VkPlace::here()) {
  const uint32_t offset =
      emulator::shared_offset("mbarrier_arrive_at", &barrier->state, 8, 8, place);
  emulator::async_proxy_of("mbarrier_arrive_at", rank, place)
      .arrive("mbarrier_arrive_at", offset, 0, place);
}

// [P: cp.async.bulk.tensor, .multicast::cluster]
template <int RANK>
void tma_load_multicast(void* to_shared, const TensorMap& map, MBarrier* barrier,
                        const int (&at)[RANK], int blocks, VkPlace place = VkPlace::here()) {
  static_assert(RANK == 2 || RANK == 3, "2 or 3 dimensions");
  emulator::begin_load("tma_load_multicast",
                       emulator::tensor_copy("tma_load_multicast", map, to_shared, at, place),
                       &barrier->state, static_cast<unsigned>(blocks), place);
}

}  // namespace vitkernels
