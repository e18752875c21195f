// Where 16-byte chunks lie in swizzled shared memory [P: "Swizzling Modes"], for both builds: what
// TMA writes and wgmma reads, and what keeps ldmatrix and cp.async free of bank conflicts.
#pragma once

#include <cstdint>

namespace vitkernels {

// The width of the rows whose chunks change places: that many bytes, eight rows before it repeats.
enum class Swizzle : int { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

// The bytes after which the pattern repeats; a swizzled tile begins at a multiple of it.
constexpr int swizzle_period(Swizzle swizzle) {
  return swizzle == Swizzle::kNone ? 16 : static_cast<int>(swizzle) * 8;
}

// From where a byte would be without swizzling (counted from a multiple of the period) to where it
// is: the chunk's number, bits 4 to 6, is exchanged by exclusive or with bits 7 to 9.
constexpr uint32_t swizzled(Swizzle swizzle, uint32_t offset) {
  const uint32_t chunks = static_cast<uint32_t>(swizzle) / 16;
  return chunks == 0 ? offset : offset ^ ((offset >> 7 & (chunks - 1)) << 4);
}

}  // namespace vitkernels
