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
  uint32_t threshold;  // keep where the word is >= threshold = round(p * 2^32)
  float scale;         // 1 / (1 - p)
  bool active;
};

// out[i] = keep(index + i) ? scale : 0, for a run of consecutive flat indices.
VK_INLINE void dropout_factors(const Dropout& dropout, uint64_t index, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = philox_word(dropout.seed, index + static_cast<uint64_t>(i)) >= dropout.threshold
                 ? dropout.scale
                 : 0.0f;
}

}  // namespace
}  // namespace vitkernels
