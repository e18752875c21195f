// The machine that kernels are written for: CUDA's own names, and the primitives that need PTX.
// This is the GPU's version; its twin for the CPU, line by line, is
// csrc/emulator/common/platform.cuh, which the emulator build finds first in the include path.
// Whatever can be written in terms of these belongs in device.cuh, once for both.
//
// References: [G] CUDA C++ Programming Guide, section named; [P] PTX ISA, instruction named.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define VK_DEVICE __device__ __forceinline__
#define VK_BOTH __host__ __device__ __forceinline__  // of the host and the device

// Shared memory [G: "__shared__"]: VK_SHARED(float, tile, [2][32]) is an array; VK_DYNAMIC_SHARED
// names the rest, which begins on a 128-byte line; VK_SWIZZLED_SHARED the same, where the pattern
// of a swizzle does.
#define VK_SHARED(type, name, extents) __shared__ __align__(16) type name extents
#define VK_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char vk_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(vk_dynamic_shared)
#define VK_SWIZZLED_SHARED(type, name)                                  \
  extern __shared__ __align__(1024) unsigned char vk_swizzled_shared[]; \
  type* name = reinterpret_cast<type*>(vk_swizzled_shared)

namespace vitkernels {

// Indices, __syncthreads, __syncwarp, __shfl_*_sync and __*_sync votes keep CUDA's names in both
// builds [G: "Built-in Variables", "Synchronization Functions", "Warp Shuffle Functions", "Warp
// Vote Functions"].

// The emulator checks what __launch_bounds__ promises [G: "Launch Bounds"]; every kernel that has
// it calls this first.
template <int MAX_THREADS>
VK_DEVICE void check_launch_bounds() {}

// Where in the shared window an address is, as PTX wants it [P: cvta].
VK_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- Barriers of a part of the block [P: barrier.sync, barrier.arrive]

// Waits until `threads`, a multiple of 32, have come to barrier `id`, 1 to 15.
VK_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Is counted there and goes on.
VK_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Bits

VK_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
VK_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }

// ---- Global memory [P: ld, ld.global.nc, st]

// 16 bytes that this kernel does not write and nobody reads again soon: not kept in L1. Address on
// a 16-byte line.
VK_DEVICE uint4 load_streaming_16(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

// 16 bytes that this kernel does not write and that every row reads again: kept in L1. Address on a
// 16-byte line.
VK_DEVICE uint4 load_cached_16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

// Brings the line of the address to L2 [P: prefetch].
VK_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

VK_DEVICE void store_16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// ---- Conversions of pairs, low half first [P: cvt]. Rounding is to nearest even; a NaN becomes
// 0x7fff.

VK_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

VK_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

VK_DEVICE float unpack_f16_low(uint32_t pair) {
  float out;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }"
      : "=f"(out)
      : "r"(pair));
  return out;
}

VK_DEVICE float unpack_f16_high(uint32_t pair) {
  float out;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }"
      : "=f"(out)
      : "r"(pair));
  return out;
}

// ---- Mathematics

// The upper 32 bits of a product [P: mul.hi].
VK_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// 1 / sqrt(x) with a relative error to 2^-22.9 [P: rsqrt.approx].
VK_DEVICE float rsqrt_approx(float x) {
  float out;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// 2^x with a relative error to 2^-22; subnormal arguments and results are 0 [P: ex2.approx.ftz].
VK_DEVICE float exp2_approx(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

}  // namespace vitkernels
