// The emulator's twin of csrc/common/async_copy.cuh: a copy is performed when its thread waits for
// it; until then its target is 0xFF.
//
// References: [P] PTX ISA, instruction named.
#pragma once

#include "common/platform.cuh"

namespace vitkernels {

// [P: cp.async]
template <int BYTES>
void copy_async(void* to_shared, const void* from_global, int source_bytes,
                VkPlace place = VkPlace::here()) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "4, 8 or 16 bytes");
  emulator::shared_offset("copy_async", to_shared, BYTES, BYTES, place);
  if (source_bytes < 0 || source_bytes > BYTES)
    emulator::fail(
        "copy_async<" + std::to_string(BYTES) + "> of " + std::to_string(source_bytes) + " bytes",
        place);
  if (reinterpret_cast<uintptr_t>(from_global) % BYTES != 0)
    emulator::fail("copy_async from an address off its " + std::to_string(BYTES) + "-byte line",
                   place);
  std::memset(to_shared, 0xFF, BYTES);
  emulator::running->copies.add([to_shared, from_global, source_bytes] {
    char bytes[BYTES] = {};
    if (source_bytes > 0) std::memcpy(bytes, from_global, static_cast<size_t>(source_bytes));
    std::memcpy(to_shared, bytes, BYTES);
  });
  emulator::running->place = place;  // what an end of the thread without a wait is reported at
}
template <int BYTES>
void copy_async(void* to_shared, const void* from_global, VkPlace place = VkPlace::here()) {
  copy_async<BYTES>(to_shared, from_global, BYTES, place);
}

// [P: cp.async.commit_group]
inline void commit_copies() { emulator::running->copies.commit(); }

// [P: cp.async.wait_group]
template <int PENDING>
void wait_copies() {
  emulator::running->copies.wait(PENDING);
}

}  // namespace vitkernels
