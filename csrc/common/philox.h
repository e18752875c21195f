// Dropout's keep mask on the CPU: Philox4x32-10 (Salmon et al., 2011), the same bits as
// reference.py and Triton.
#pragma once

#include <cstdint>

#include "common/cpu_vec.h"

namespace vitkernels {
namespace {

// The first output word for key = seed and counter = (index low, index high, 0, 0).
VK_INLINE uint32_t philox_word(uint64_t seed, uint64_t index) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = 0,
           c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u,
                   b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
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
  uint64_t seed;
  uint64_t threshold;  // keep where the word is >= threshold = round(p * 2^32)
  float scale;         // 1 / (1 - p)
};

#if defined(__AVX2__)
// Eight (or four) words at a time in 64-bit lanes: vpmuludq reads the low halves, so the high
// halves may hold anything.
typedef uint64_t WVec __attribute__((vector_size(kVec * 4), may_alias));

VK_INLINE WVec multiply_low(WVec a, uint64_t b) {
  const WVec factor = b - WVec{};
#if defined(__AVX512F__)
  return reinterpret_cast<WVec>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(factor)));
#else
  return reinterpret_cast<WVec>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(factor)));
#endif
}

VK_INLINE WVec philox_words(uint64_t seed, WVec index) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  WVec c0 = index, c1 = index >> 32, c2 = {}, c3 = {};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const WVec a = multiply_low(c0, 0xD2511F53u), b = multiply_low(c2, 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ static_cast<uint64_t>(k0);
    c1 = b;
    c2 = (a >> 32) ^ c3 ^ static_cast<uint64_t>(k1);
    c3 = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0 & 0xFFFFFFFFu;
}
#endif

// out[i] = keep(index + i) ? scale : 0, for a run of consecutive flat indices.
VK_INLINE void dropout_factors(const Dropout& dropout, uint64_t index, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__AVX2__)
  constexpr int kWords = kVec / 2;
  typedef float HalfVec __attribute__((vector_size(kWords * 4), may_alias));
  typedef int32_t HalfMask __attribute__((vector_size(kWords * 4), may_alias));
  WVec lanes = {};
  for (int l = 0; l < kWords; ++l) lanes[l] = static_cast<uint64_t>(l);
  for (; i + kWords <= n; i += kWords) {
    const WVec words = philox_words(dropout.seed, lanes + (index + static_cast<uint64_t>(i)));
    const HalfMask keep = __builtin_convertvector(words >= dropout.threshold, HalfMask);
    const HalfVec factors =
        reinterpret_cast<HalfVec>(keep & reinterpret_cast<HalfMask>(dropout.scale - HalfVec{}));
    std::memcpy(out + i, &factors, sizeof factors);
  }
#endif
  for (; i < n; ++i)
    out[i] = philox_word(dropout.seed, index + static_cast<uint64_t>(i)) >= dropout.threshold
                 ? dropout.scale
                 : 0.0f;
}

}  // namespace
}  // namespace vitkernels
