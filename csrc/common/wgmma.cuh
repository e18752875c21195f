// Tensor-core products of a warpgroup, four neighbouring warps of which the first is a multiple of
// four (sm_90a). The emulator's twin is csrc/emulator/common/wgmma.cuh.
//
// A sequence: wgmma_fence, some wgmma, wgmma_commit, wgmma_wait; from the first wgmma to the wait
// the accumulators are not touched. All threads of the warpgroup execute the same sequence.
//
// References: [P] PTX ISA, section or instruction named.
#pragma once

#include "common/wgmma_descriptor.h"
#include "common/wgmma_instructions.cuh"

namespace vitkernels {

// `start` is on a 16-byte line, and in the first row of a swizzle's eight. With Major::kK, rows of
// A (columns of B) lie `swizzle` bytes apart, their k side by side, groups of eight of them
// stride_bytes apart; leading_bytes is not used. With Major::kMN, k's lie `swizzle` bytes apart,
// groups of eight stride_bytes apart; after as many rows as fill the swizzle's width, the next ones
// are leading_bytes further. Without swizzle, eight rows (k's with kMN) of 16 bytes are 128 bytes
// together; with kK, stride_bytes leads to the next eight rows and leading_bytes to the next eight
// k, with kMN stride_bytes to the next eight rows and leading_bytes to the next eight k [P:
// "Strides", "Shared Memory Layout"].
template <Swizzle SWIZZLE>
VK_DEVICE WgmmaOperand wgmma_operand(const void* start, int leading_bytes, int stride_bytes) {
  return wgmma_descriptor(SWIZZLE, shared_address(start), leading_bytes, stride_bytes);
}

// Keeps the compiler from moving what computes or uses these registers across this place.
template <int C>
VK_DEVICE void pin_registers(float (&c)[C]) {
#pragma unroll
  for (int i = 0; i < C; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
VK_DEVICE void pin_registers(FragmentA& a) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a.r[i])::"memory");
}
VK_DEVICE void pin_registers(int& x) { asm volatile("" : "+r"(x)::"memory"); }

// Before the first wgmma, and again whenever accumulators or registers of A were written by
// anything else [P: wgmma.fence]. Other registers than c: pin_registers before.
VK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
template <int C>
VK_DEVICE void wgmma_fence(float (&c)[C]) {
  pin_registers(c);
  wgmma_fence();
}

// c (64 x N, N = 2 C) = a b + (accumulate ? c : 0) with N from 8 to 256 in steps of 8, exact
// products and fp32 sums [P: wgmma.mma_async]. Lane l of warp w holds rows 16 w and on: c[4 j + i]
// is v[i] of FragmentC for columns 8 j and on [P: "Register Fragments and Shared Memory Matrix
// Layouts"].
template <DType TYPE, Major A_MAJOR = Major::kK, Major B_MAJOR = Major::kK, int C>
VK_DEVICE void wgmma(float (&c)[C], WgmmaOperand a, WgmmaOperand b, bool accumulate) {
  static_assert(TYPE == DType::kBF16 || TYPE == DType::kF16, "16-bit operands");
  WgmmaInstruction<2 * C>::template from_shared<TYPE, A_MAJOR, B_MAJOR>(c, a.bits, b.bits,
                                                                        accumulate);
}
// With warp w's rows of A in its registers.
template <DType TYPE, Major B_MAJOR = Major::kK, int C>
VK_DEVICE void wgmma(float (&c)[C], const FragmentA& a, WgmmaOperand b, bool accumulate) {
  static_assert(TYPE == DType::kBF16 || TYPE == DType::kF16, "16-bit operands");
  WgmmaInstruction<2 * C>::template from_registers<TYPE, B_MAJOR>(c, a, b.bits, accumulate);
}

// Makes one group of the products since the last one [P: wgmma.commit_group].
VK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the newest PENDING [P: wgmma.wait_group]. Other registers than c:
// pin_registers after.
template <int PENDING>
VK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int PENDING, int C>
VK_DEVICE void wgmma_wait(float (&c)[C]) {
  wgmma_wait<PENDING>();
  pin_registers(c);
}

// Hands registers from one warpgroup to another [P: setmaxnreg]: all warps of each warpgroup, in a
// kernel whose __launch_bounds__ names blocks per multiprocessor too (else ptxas ignores it). COUNT
// from 24 to 256 in steps of 8; over all warpgroups no more than the block began with.
template <int COUNT>
VK_DEVICE void give_up_registers() {
  static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "24 to 256, a multiple of 8");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
VK_DEVICE void take_registers() {
  static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "24 to 256, a multiple of 8");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

}  // namespace vitkernels
