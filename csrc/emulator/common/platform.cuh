// The CPU's version of csrc/common/platform.cuh: the same names, in the same order, with the same
// results.
//
// References: [G] CUDA C++ Programming Guide, section named; [P] PTX ISA, instruction named.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/emulator.h"

// CUDA's qualifiers mean nothing here. Launch bounds are checked by check_launch_bounds.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define VK_DEVICE inline
#define VK_BOTH inline

#define VK_SHARED(type, name, extents)                             \
  auto& name = ::vitkernels::emulator::shared_array<type extents>( \
      [] {}, ::vitkernels::emulator::Place::here())
#define VK_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::vitkernels::emulator::dynamic_shared())
#define VK_SWIZZLED_SHARED(type, name) VK_DYNAMIC_SHARED(type, name)

using dim3 = vitkernels::emulator::Index3;
#define threadIdx (::vitkernels::emulator::running->thread_index)
#define blockIdx (::vitkernels::emulator::block_index())
#define blockDim (::vitkernels::emulator::block_dim())
#define gridDim (::vitkernels::emulator::grid_dim())

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }  // [CUDA Math API: "Integer Functions"]
inline int max(int a, int b) { return a < b ? b : a; }

using VkPlace = vitkernels::emulator::Place;  // where a call is, for messages

// [G: "Synchronization Functions"; P: bar.sync, barrier.red, bar.warp.sync]
inline void __syncthreads(VkPlace place = VkPlace::here()) {
  vitkernels::emulator::meet_block("__syncthreads", false, place);
}
inline int __syncthreads_count(int predicate, VkPlace place = VkPlace::here()) {
  return vitkernels::emulator::meet_block("__syncthreads_count", predicate != 0, place);
}
inline int __syncthreads_or(int predicate, VkPlace place = VkPlace::here()) {
  return vitkernels::emulator::meet_block("__syncthreads_or", predicate != 0, place) != 0;
}
inline int __syncthreads_and(int predicate, VkPlace place = VkPlace::here()) {
  return vitkernels::emulator::meet_block("__syncthreads_and", predicate == 0, place) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, VkPlace place = VkPlace::here()) {
  vitkernels::emulator::meet_warp("__syncwarp", mask, nullptr, nullptr, place);
}

// [G: "Warp Shuffle Functions"; P: shfl.sync]. A lane that is outside the mask or has exited gives
// 0xFF bytes: on the GPU its value is undefined.
namespace vitkernels::emulator {
template <class T>
struct Shuffle {
  T value;
  int source;  // lane
  T result;

  static void finish(void* const* records) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* mine = static_cast<Shuffle*>(records[lane]);
      if (mine == nullptr) continue;
      if (const auto* from = static_cast<const Shuffle*>(records[mine->source]))
        mine->result = from->value;
      else
        std::memset(&mine->result, 0xFF, sizeof(T));
    }
  }
};

template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, Place place) {
  Shuffle<T> record{value, source, value};
  meet_warp(what, mask, &record, &Shuffle<T>::finish, place);
  return record.result;
}
inline int lane() { return running->id % 32; }
}  // namespace vitkernels::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, VkPlace place = VkPlace::here()) {
  const int lane = vitkernels::emulator::lane();
  return vitkernels::emulator::shuffle("__shfl_sync", mask, value,
                                       (lane & ~(width - 1)) + (source & (width - 1)), place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 VkPlace place = VkPlace::here()) {
  const int lane = vitkernels::emulator::lane(), rank = lane & (width - 1);
  delta &= 31;
  const int from = static_cast<unsigned>(rank) >= delta ? lane - static_cast<int>(delta) : lane;
  return vitkernels::emulator::shuffle("__shfl_up_sync", mask, value, from, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   VkPlace place = VkPlace::here()) {
  const int lane = vitkernels::emulator::lane(), rank = lane & (width - 1);
  delta &= 31;
  const int from =
      rank + delta < static_cast<unsigned>(width) ? lane + static_cast<int>(delta) : lane;
  return vitkernels::emulator::shuffle("__shfl_down_sync", mask, value, from, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  VkPlace place = VkPlace::here()) {
  // A source in a later group of `width` lanes is out of range; one in an earlier group is not.
  const int lane = vitkernels::emulator::lane(), source = (lane ^ lane_mask) & 31;
  const int from = source < (lane & ~(width - 1)) + width ? source : lane;
  return vitkernels::emulator::shuffle("__shfl_xor_sync", mask, value, from, place);
}

// [G: "Warp Vote Functions"; P: vote.sync]
namespace vitkernels::emulator {
struct Vote {
  bool predicate;
  unsigned ballot;
  unsigned voters;

  static void finish(void* const* records) {
    unsigned ballot = 0, voters = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (const auto* vote = static_cast<const Vote*>(records[lane])) {
        voters |= 1u << lane;
        ballot |= static_cast<unsigned>(vote->predicate) << lane;
      }
    for (int lane = 0; lane < 32; ++lane)
      if (auto* vote = static_cast<Vote*>(records[lane])) {
        vote->ballot = ballot;
        vote->voters = voters;
      }
  }
};
inline Vote vote(const char* what, unsigned mask, bool predicate, Place place) {
  Vote record{predicate, 0, 0};
  meet_warp(what, mask, &record, &Vote::finish, place);
  return record;
}
}  // namespace vitkernels::emulator

inline unsigned __ballot_sync(unsigned mask, int predicate, VkPlace place = VkPlace::here()) {
  return vitkernels::emulator::vote("__ballot_sync", mask, predicate != 0, place).ballot;
}
inline int __any_sync(unsigned mask, int predicate, VkPlace place = VkPlace::here()) {
  return vitkernels::emulator::vote("__any_sync", mask, predicate != 0, place).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, VkPlace place = VkPlace::here()) {
  const auto result = vitkernels::emulator::vote("__all_sync", mask, predicate != 0, place);
  return result.ballot == result.voters;
}

namespace vitkernels {

template <int MAX_THREADS>
void check_launch_bounds(VkPlace place = VkPlace::here()) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  if (threads > MAX_THREADS)
    emulator::fail("launched with " + std::to_string(threads) +
                       " threads a block; __launch_bounds__ promises at most " +
                       std::to_string(MAX_THREADS),
                   place);
}

inline uint32_t shared_address(const void* p, VkPlace place = VkPlace::here()) {
  return emulator::shared_offset("shared_address", p, 1, 1, place);
}

// ---- Barriers of a part of the block [P: barrier.sync, barrier.arrive]

inline void barrier_sync(int id, int threads, VkPlace place = VkPlace::here()) {
  emulator::meet_part("barrier_sync", id, threads, true, place);
}
inline void barrier_arrive(int id, int threads, VkPlace place = VkPlace::here()) {
  emulator::meet_part("barrier_arrive", id, threads, false, place);
}

// ---- Bits

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// ---- Global memory [P: ld, ld.global.nc, st]: the GPU faults on an address off its 16-byte line.

namespace emulator {
inline void check_alignment(const void* p, Place place) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
    fail("a 16-byte access off its 16-byte line", place);
}
}  // namespace emulator

inline uint4 load_streaming_16(const void* p, VkPlace place = VkPlace::here()) {
  emulator::check_alignment(p, place);
  uint4 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline uint4 load_cached_16(const void* p, VkPlace place = VkPlace::here()) {
  return load_streaming_16(p, place);
}
inline void prefetch_l2(const void*) {}
inline void store_16(void* p, uint4 v, VkPlace place = VkPlace::here()) {
  emulator::check_alignment(p, place);
  std::memcpy(p, &v, 16);
}

// ---- Conversions [P: cvt]

namespace emulator {

inline uint32_t to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (std::isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t to_f16(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000,
                 magnitude = bits & 0x7fffffff;
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
    // Adding 0.5 puts the unit of the last place at 2^-24, so the addition rounds as the conversion
    // must.
    return sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
  }
  return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

inline float from_f16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float tiny = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -tiny : tiny;
}

}  // namespace emulator

inline uint32_t pack_bf16(float low, float high) {
  return emulator::to_bf16(low) | emulator::to_bf16(high) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return emulator::to_f16(low) | emulator::to_f16(high) << 16;
}
inline float unpack_f16_low(uint32_t pair) { return emulator::from_f16(pair & 0xffff); }
inline float unpack_f16_high(uint32_t pair) { return emulator::from_f16(pair >> 16); }

// ---- Mathematics

inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}

// Approximations are as wrong as they may be, up or down by the argument's last bit.
inline float rsqrt_approx(float x) {
  const bool up = (float_to_bits(x) & 1) != 0;
  const double exact = 1.0 / std::sqrt(static_cast<double>(x));
  return static_cast<float>(up ? exact * (1.0 + 0x1.12p-23) : exact * (1.0 - 0x1.12p-23));
}

// [P: ex2.approx.ftz]
inline float exp2_approx(float x) {
  const bool up = (float_to_bits(x) & 1) != 0;
  const float exact = std::exp2(std::fabs(x) < 0x1p-126f ? 0.0f : x);
  if (exact < 0x1p-126f) return 0.0f;
  return x == std::floor(x) ? exact : exact * (up ? 1.0f + 0x1p-22f : 1.0f - 0x1p-22f);
}

}  // namespace vitkernels
