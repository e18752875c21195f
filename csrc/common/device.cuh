// What kernels of several operators share, written once for the GPU and the emulator on top of
// platform.cuh: loading, storing and converting eight elements at a time, reductions over a warp
// and a block, dropout's keep mask.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/platform.cuh"

namespace vitkernels {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Eight elements of one row

// Eight elements as they lie in memory: fp32 in w[0..7], 16-bit ones in w[0..3], two to a word, low
// half first. Loading and converting are apart so that a thread can have many loads under way
// before it waits for the first.
struct Raw8 {
  uint32_t w[8];
};

VK_DEVICE bool is_wide(DType dtype) { return dtype == DType::kF32; }

VK_DEVICE const char* element(const void* data, int64_t index, DType dtype) {
  return static_cast<const char*>(data) + (index << (is_wide(dtype) ? 2 : 1));
}
VK_DEVICE char* element(void* data, int64_t index, DType dtype) {
  return static_cast<char*>(data) + (index << (is_wide(dtype) ? 2 : 1));
}

// Which eight columns of a row a thread holds as its chunk i: neighbours, for 16-byte accesses, or
// every step-th one.
template <bool VEC>
struct Columns {
  int first, step, end;  // end is the row's length
  int before;            // columns of earlier chunks: often a constant, so addresses add it last
  bool whole = false;    // known to be inside the row, with VEC

  VK_DEVICE Columns(int chunk, int rank, int size, int length)
      : first(VEC ? (chunk * size + rank) * 8 : chunk * 8 * size + rank),
        step(VEC ? 1 : size),
        end(length),
        before(chunk * size * 8) {}
  VK_DEVICE int operator[](int j) const { return first + j * step; }
  // VEC promises a length that is a multiple of 8.
  VK_DEVICE bool holds(int j) const { return VEC ? whole || first < end : first + j * step < end; }
  // The address of the first.
  VK_DEVICE const char* in(const void* row, DType dtype) const {
    return element(static_cast<const void*>(element(row, first - before, dtype)), before, dtype);
  }
  VK_DEVICE char* in(void* row, DType dtype) const {
    return element(static_cast<void*>(element(row, first - before, dtype)), before, dtype);
  }
};

// Elements outside the row are 0.
template <bool VEC, bool CACHED = false>
VK_DEVICE Raw8 load_raw(const void* row, DType dtype, const Columns<VEC>& columns) {
  Raw8 raw = {};
  if constexpr (VEC) {
    if (columns.holds(0)) {
      const char* p = columns.in(row, dtype);
      const uint4 a = CACHED ? load_cached_16(p) : load_streaming_16(p);
      raw.w[0] = a.x, raw.w[1] = a.y, raw.w[2] = a.z, raw.w[3] = a.w;
      if (is_wide(dtype)) {
        const uint4 b = CACHED ? load_cached_16(p + 16) : load_streaming_16(p + 16);
        raw.w[4] = b.x, raw.w[5] = b.y, raw.w[6] = b.z, raw.w[7] = b.w;
      }
    }
  } else if (is_wide(dtype)) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (columns.holds(j)) raw.w[j] = static_cast<const uint32_t*>(row)[columns[j]];
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (columns.holds(j))
        raw.w[j / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(row)[columns[j]])
                        << (j % 2 * 16);
  }
  return raw;
}

// Asks for the elements of `columns` in L2, so that a load of them soon after waits less. One
// thread a 128-byte line.
template <bool VEC>
VK_DEVICE void prefetch(const void* row, DType dtype, const Columns<VEC>& columns) {
  const char* p = columns.in(row, dtype);
  if (columns.holds(0) && reinterpret_cast<uintptr_t>(p) % 128 < (is_wide(dtype) ? 32 : 16))
    prefetch_l2(p);
}

VK_DEVICE void to_floats(const Raw8& raw, DType dtype, float (&v)[8]) {
  if (is_wide(dtype)) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = bits_to_float(raw.w[j]);
  } else if (dtype == DType::kBF16) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      v[j] = bits_to_float(raw.w[j / 2] << 16);
      v[j + 1] = bits_to_float(raw.w[j / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      v[j] = unpack_f16_low(raw.w[j / 2]);
      v[j + 1] = unpack_f16_high(raw.w[j / 2]);
    }
  }
}

// Rounds to dtype, to nearest even.
VK_DEVICE Raw8 to_raw(const float (&v)[8], DType dtype) {
  Raw8 raw = {};
  if (is_wide(dtype)) {
#pragma unroll
    for (int j = 0; j < 8; ++j) raw.w[j] = float_to_bits(v[j]);
  } else if (dtype == DType::kBF16) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) raw.w[j / 2] = pack_bf16(v[j], v[j + 1]);
  } else {
#pragma unroll
    for (int j = 0; j < 8; j += 2) raw.w[j / 2] = pack_f16(v[j], v[j + 1]);
  }
  return raw;
}

// Stores, rounded, the elements that are inside the row.
template <bool VEC>
VK_DEVICE void store(void* row, DType dtype, const Columns<VEC>& columns, const float (&v)[8]) {
  const Raw8 raw = to_raw(v, dtype);
  if constexpr (VEC) {
    if (!columns.holds(0)) return;
    char* p = columns.in(row, dtype);
    store_16(p, make_uint4(raw.w[0], raw.w[1], raw.w[2], raw.w[3]));
    if (is_wide(dtype)) store_16(p + 16, make_uint4(raw.w[4], raw.w[5], raw.w[6], raw.w[7]));
  } else if (is_wide(dtype)) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (columns.holds(j)) static_cast<uint32_t*>(row)[columns[j]] = raw.w[j];
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (columns.holds(j))
        static_cast<uint16_t*>(row)[columns[j]] =
            static_cast<uint16_t>(raw.w[j / 2] >> (j % 2 * 16));
  }
}

// ---- One element, and pairs of 16-bit ones, low half first

VK_DEVICE float load_scalar(const void* data, DType dtype, int64_t index) {
  if (is_wide(dtype)) return static_cast<const float*>(data)[index];
  const uint32_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kBF16 ? bits_to_float(bits << 16) : unpack_f16_low(bits);
}

VK_DEVICE void store_scalar(void* data, DType dtype, int64_t index, float value) {
  if (is_wide(dtype))
    static_cast<float*>(data)[index] = value;
  else
    static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(
        dtype == DType::kBF16 ? pack_bf16(value, 0.0f) : pack_f16(value, 0.0f));
}

// What store_scalar would keep of it.
VK_DEVICE float rounded(float value, DType dtype) {
  if (is_wide(dtype)) return value;
  return dtype == DType::kBF16 ? bits_to_float(pack_bf16(value, 0.0f) << 16)
                               : unpack_f16_low(pack_f16(value, 0.0f));
}

template <DType TYPE>
VK_DEVICE uint32_t pack(float low, float high) {
  return TYPE == DType::kBF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

template <DType TYPE>
VK_DEVICE float2 unpack(uint32_t pair) {
  if (TYPE == DType::kBF16)
    return make_float2(bits_to_float(pair << 16), bits_to_float(pair & 0xffff0000u));
  return make_float2(unpack_f16_low(pair), unpack_f16_high(pair));
}

// ---- Reductions. Their order is fixed, so the same inputs give the same bits.

// Each of the N sums over the group of `lanes` (a power of two) neighbouring lanes; all lanes of
// the warp must call it.
template <int N>
VK_DEVICE void sum_over_lanes(float (&v)[N], int lanes) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    if (offset < lanes) {
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] += __shfl_xor_sync(kAllLanes, v[n], offset);
    }
}

// Each of the N sums over the block, whose size is a multiple of a warp's. `partial` is shared, N x
// 32 floats; a later call may use the same memory only with another block-wide barrier between them
// (two buffers in turn do).
template <int N>
VK_DEVICE void sum_over_block(float (&v)[N], float* partial) {
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
  sum_over_lanes(v, kWarp);
  if (thread % kWarp == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) partial[n * kWarp + thread / kWarp] = v[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    v[n] = 0.0f;
    for (int warp = 0; warp < warps; ++warp) v[n] += partial[n * kWarp + warp];
  }
}

// ---- Indices

// a / b for a >= 0, b > 0, in 32 bits where they suffice: a 64-bit division is a hundred
// instructions.
VK_DEVICE int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// ---- Dropout

// The first output word of Philox4x32-10 (Salmon et al., SC 2011) for key = seed, counter = (index
// low, high, 0, 0): the same bits as reference.py, the CPU kernels and Triton. HALVES asks for the
// halves of each product apart: nvcc then adds no zeros to the upper ones, 40 instructions a word
// instead of 58, but attention's kernels, short of registers, would spill.
template <bool HALVES = false>
VK_DEVICE uint32_t philox_word(uint64_t seed, uint64_t index) {
  const auto product = [](uint32_t a, uint32_t b) {
    return HALVES ? uint64_t{multiply_high(a, b)} << 32 | a * b : uint64_t{a} * b;
  };
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = 0,
           c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = product(c0, 0xD2511F53u), b = product(c2, 0xCD9E8D57u);
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

struct Dropout {
  const int64_t* seed = nullptr;  // null: no dropout
  uint64_t threshold = 0;  // an element is kept when its word is >= threshold = round(p * 2^32)
  float scale = 1.0f;      // 1 / (1 - p)
};

VK_DEVICE bool keeps(const Dropout& dropout, uint64_t seed, uint64_t index) {
  return philox_word(seed, index) >= dropout.threshold;
}

}  // namespace vitkernels
