// How wgmma is told where an operand lies in shared memory [P: "Matrix Descriptor"], for both
// builds.
#pragma once

#include <cstdint>

#include "common/swizzle.cuh"

namespace vitkernels {

// An operand of 16 k in shared memory.
struct WgmmaOperand {
  uint64_t bits;
};

// Addresses and strides in bytes, multiples of 16. The base offset is 0: the operand begins in the
// first of the swizzle's eight rows.
constexpr WgmmaOperand wgmma_descriptor(Swizzle swizzle, uint32_t start, int leading, int stride) {
  const uint64_t mode = swizzle == Swizzle::k128  ? 1
                        : swizzle == Swizzle::k64 ? 2
                        : swizzle == Swizzle::k32 ? 3
                                                  : 0;
  return {mode << 62 | static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 |
          static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 | (start >> 4 & 0x3fff)};
}

// The operand that begins so many bytes later, all of them in the shared memory of the block.
constexpr WgmmaOperand advanced(WgmmaOperand operand, int bytes) {
  return {operand.bits + static_cast<uint64_t>(bytes >> 4)};
}

}  // namespace vitkernels
