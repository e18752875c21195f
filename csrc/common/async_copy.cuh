// Copies from global to shared memory that a thread begins and waits for later (sm_80). The
// emulator's twin is csrc/emulator/common/async_copy.cuh.
//
// The bytes are there for the thread that copied them once it has waited; for others, after a
// barrier that follows its wait.
//
// References: [P] PTX ISA, instruction named.
#pragma once

#include "common/platform.cuh"

namespace vitkernels {

// Begins to copy BYTES = 4, 8 or 16 [P: cp.async]; both addresses are multiples of BYTES. 16 bytes
// go past L1.
template <int BYTES>
VK_DEVICE void copy_async(void* to_shared, const void* from_global) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "4, 8 or 16 bytes");
  const uint32_t to = shared_address(to_shared);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from_global)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from_global), "n"(BYTES)
                 : "memory");
}

// The same, of the first `source_bytes` only; zeros follow them. With 0, nothing is read.
template <int BYTES>
VK_DEVICE void copy_async(void* to_shared, const void* from_global, int source_bytes) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "4, 8 or 16 bytes");
  const uint32_t to = shared_address(to_shared);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from_global),
                 "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from_global),
                 "n"(BYTES), "r"(source_bytes)
                 : "memory");
}

// Makes one group of the copies that the thread has begun since the last one [P:
// cp.async.commit_group].
VK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all of the thread's groups but the newest PENDING are there [P: cp.async.wait_group].
template <int PENDING>
VK_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace vitkernels
