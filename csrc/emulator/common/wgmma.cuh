// The emulator's twin of csrc/common/wgmma.cuh. Operands are read when a product is issued, and
// must be the same still when its warp waits for it: only then is it computed. Until then the
// accumulators are 0xFF.
//
// References: [P] PTX ISA, section or instruction named.
#pragma once

#include "common/dtype.h"
#include "common/fragment.cuh"
#include "common/mma.cuh"
#include "common/wgmma_descriptor.h"
#include "emulator/wgmma.h"

namespace vitkernels {

// [P: "Matrix Descriptor"]
template <Swizzle SWIZZLE>
WgmmaOperand wgmma_operand(const void* start, int leading_bytes, int stride_bytes,
                           VkPlace place = VkPlace::here()) {
  const auto fits = [](int bytes) { return bytes >= 0 && bytes % 16 == 0 && bytes < 1 << 18; };
  if (!fits(leading_bytes) || !fits(stride_bytes))
    emulator::fail("wgmma_operand with strides of " + std::to_string(leading_bytes) + " and " +
                       std::to_string(stride_bytes) + " bytes",
                   place);
  const uint32_t address = emulator::shared_offset("wgmma_operand", start, 16, 16, place);
  return wgmma_descriptor(SWIZZLE, address, leading_bytes, stride_bytes);
}

template <int C>
void pin_registers(float (&)[C]) {}
inline void pin_registers(FragmentA&) {}
inline void pin_registers(int&) {}

// [P: wgmma.fence]
inline void wgmma_fence(VkPlace place = VkPlace::here()) { emulator::wgmma_fence(place); }
template <int C>
void wgmma_fence(float (&)[C], VkPlace place = VkPlace::here()) {
  emulator::wgmma_fence(place);
}

// [P: wgmma.mma_async]
template <DType TYPE, Major A_MAJOR = Major::kK, Major B_MAJOR = Major::kK, int C>
void wgmma(float (&c)[C], WgmmaOperand a, WgmmaOperand b, bool accumulate,
           VkPlace place = VkPlace::here()) {
  static_assert(TYPE == DType::kBF16 || TYPE == DType::kF16, "16-bit operands");
  static_assert(C % 4 == 0 && C <= 128, "N from 8 to 256, a multiple of 8");
  emulator::wgmma({TYPE, 2 * C, nullptr, a, A_MAJOR, b, B_MAJOR, accumulate, c}, place);
}
template <DType TYPE, Major B_MAJOR = Major::kK, int C>
void wgmma(float (&c)[C], const FragmentA& a, WgmmaOperand b, bool accumulate,
           VkPlace place = VkPlace::here()) {
  static_assert(TYPE == DType::kBF16 || TYPE == DType::kF16, "16-bit operands");
  static_assert(C % 4 == 0 && C <= 128, "N from 8 to 256, a multiple of 8");
  emulator::wgmma({TYPE, 2 * C, &a, {}, Major::kK, b, B_MAJOR, accumulate, c}, place);
}

// [P: wgmma.commit_group]
inline void wgmma_commit(VkPlace place = VkPlace::here()) { emulator::wgmma_commit(place); }

// [P: wgmma.wait_group]
template <int PENDING>
void wgmma_wait(VkPlace place = VkPlace::here()) {
  emulator::wgmma_wait(PENDING, place);
}
template <int PENDING, int C>
void wgmma_wait(float (&)[C], VkPlace place = VkPlace::here()) {
  emulator::wgmma_wait(PENDING, place);
}

// [P: setmaxnreg]
template <int COUNT>
void give_up_registers(VkPlace place = VkPlace::here()) {
  static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "24 to 256, a multiple of 8");
  emulator::set_registers("give_up_registers", COUNT, place);
}
template <int COUNT>
void take_registers(VkPlace place = VkPlace::here()) {
  static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "24 to 256, a multiple of 8");
  emulator::set_registers("take_registers", COUNT, place);
}

}  // namespace vitkernels
