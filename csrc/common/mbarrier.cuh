// Barriers in shared memory that count arrivals and bytes (sm_90). The emulator's twin is
// csrc/emulator/common/mbarrier.cuh.
//
// A barrier goes through phases 0, 1, 2, ...; a phase is complete when the expected threads have
// arrived and the expected bytes have come. Who waits names the parity of the phase it waits for.
//
// References: [P] PTX ISA, instruction named.
#pragma once

#include "common/platform.cuh"

namespace vitkernels {

struct MBarrier {  // in shared memory
  uint64_t state;
};

// One thread, once; then mbarrier_fence_init and a barrier of the block [P: mbarrier.init].
VK_DEVICE void mbarrier_init(MBarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Shows the thread's new barriers to the async proxy, that is, to TMA
// [P: fence.mbarrier_init].
VK_DEVICE void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// [P: mbarrier.arrive]
VK_DEVICE void mbarrier_arrive(MBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and makes the phase wait for so many bytes more [P: mbarrier.arrive.expect_tx].
VK_DEVICE void mbarrier_arrive_expect(MBarrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Whether the phase of that parity is complete; may wait a while before it says no
// [P: mbarrier.try_wait.parity].
VK_DEVICE bool mbarrier_try_wait(MBarrier* barrier, int parity) {
  uint32_t complete;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
      "}"
      : "=r"(complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
}

// Waits until it is.
VK_DEVICE void mbarrier_wait(MBarrier* barrier, int parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// Gives the memory back; nobody may wait there any more [P: mbarrier.inval].
VK_DEVICE void mbarrier_invalidate(MBarrier* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

}  // namespace vitkernels
