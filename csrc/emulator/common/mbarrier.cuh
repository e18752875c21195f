// The emulator's twin of csrc/common/mbarrier.cuh. What a barrier counts is kept beside its
// address; its eight bytes hold a mark that must stay.
//
// References: [P] PTX ISA, instruction named.
#pragma once

#include "common/platform.cuh"
#include "emulator/async_proxy.h"

namespace vitkernels {

struct MBarrier {
  uint64_t state;
};

// [P: mbarrier.init]
inline void mbarrier_init(MBarrier* barrier, int arrivals, VkPlace place = VkPlace::here()) {
  emulator::async_proxy().init_barrier(&barrier->state, arrivals, place);
}
// [P: fence.mbarrier_init]
inline void mbarrier_fence_init() { emulator::async_proxy().publish_barriers(); }
// [P: mbarrier.arrive]
inline void mbarrier_arrive(MBarrier* barrier, VkPlace place = VkPlace::here()) {
  emulator::async_proxy().arrive("mbarrier_arrive", &barrier->state, 0, place);
}
// [P: mbarrier.arrive.expect_tx]
inline void mbarrier_arrive_expect(MBarrier* barrier, int bytes, VkPlace place = VkPlace::here()) {
  emulator::async_proxy().arrive("mbarrier_arrive_expect", &barrier->state, bytes, place);
}
// [P: mbarrier.try_wait.parity]
inline bool mbarrier_try_wait(MBarrier* barrier, int parity, VkPlace place = VkPlace::here()) {
  return emulator::async_proxy().wait("mbarrier_try_wait", &barrier->state, parity, true, place);
}
inline void mbarrier_wait(MBarrier* barrier, int parity, VkPlace place = VkPlace::here()) {
  emulator::async_proxy().wait("mbarrier_wait", &barrier->state, parity, false, place);
}
// [P: mbarrier.inval]
inline void mbarrier_invalidate(MBarrier* barrier, VkPlace place = VkPlace::here()) {
  emulator::async_proxy().invalidate_barrier(&barrier->state, place);
}

}  // namespace vitkernels
