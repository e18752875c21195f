// What attention_sm90_backward.cu is made of: products of a warpgroup's 64 rows, scores in swizzled
// shared memory, gradients on their way out.
//
// Tiles of q, k, v and dout are rows of DEPTH 16-bit elements, zero beyond the head dim and beyond
// the last token, as TMA brings them. Scores (P, then dS) are panels of 64 keys, rows of 128
// bytes; a last panel of 16 keys has rows of 32. All are swizzled as wide as a row.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/attention_cuda.h"
#include "attention/attention_plan_sm90_backward.h"
#include "common/device.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

namespace vitkernels::attention::sm90_backward {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kWarpgroup = 128;
constexpr uint32_t kMasked = 0x8000;  // the sign of a probability in 16 bits: masked by the bias

VK_DEVICE float load_float(const float* from) { return *from; }
VK_DEVICE float load_float(const BF16* from) { return bits_to_float(uint32_t{from->bits} << 16); }
VK_DEVICE float load_float(const F16* from) { return unpack_f16_low(from->bits); }

VK_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

VK_DEVICE bool is_finite(float x) { return x - x == 0.0f; }

// ---- Products of a warpgroup

template <int DEPTH>
constexpr Swizzle kSwizzle = static_cast<Swizzle>(2 * DEPTH);

// c = a b^T: 64 rows of `a` against the first 2 C of `b`.
template <DType TYPE, int DEPTH, int C>
VK_DEVICE void multiply_rows(float (&c)[C], const char* a, const char* b) {
  const WgmmaOperand rows = wgmma_operand<kSwizzle<DEPTH>>(a, 16, 16 * DEPTH);
  const WgmmaOperand columns = wgmma_operand<kSwizzle<DEPTH>>(b, 16, 16 * DEPTH);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < DEPTH / 16; ++step)
    wgmma<TYPE>(c, advanced(rows, 32 * step), advanced(columns, 32 * step), step > 0);
  wgmma_commit();
  wgmma_wait<0>(c);
}

// c = a b with the 64 rows of `a` in registers, 16 columns a fragment.
template <DType TYPE, int DEPTH, int STEPS>
VK_DEVICE void multiply_registers(float (&c)[DEPTH / 2], FragmentA (&a)[STEPS], const char* b) {
  const WgmmaOperand rows = wgmma_operand<kSwizzle<DEPTH>>(b, 0, 16 * DEPTH);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) pin_registers(a[step]);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
    wgmma<TYPE, Major::kMN>(c, a[step], advanced(rows, step * 32 * DEPTH), step > 0);
  wgmma_commit();
  wgmma_wait<0>(c);
}

// c = a^T b with the columns of a panel of scores as rows, over 16 * STEPS queries. Of a narrow
// panel, 16 rows; the others repeat them.
template <DType TYPE, int DEPTH, int STEPS, Swizzle PANEL>
VK_DEVICE void multiply_panel(float (&c)[DEPTH / 2], const char* panel, const char* b) {
  constexpr int kRowBytes = static_cast<int>(PANEL);
  const WgmmaOperand columns = wgmma_operand<PANEL>(panel, 0, 8 * kRowBytes);
  const WgmmaOperand rows = wgmma_operand<kSwizzle<DEPTH>>(b, 0, 16 * DEPTH);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
    wgmma<TYPE, Major::kMN, Major::kMN>(c, advanced(columns, step * 16 * kRowBytes),
                                        advanced(rows, step * 32 * DEPTH), step > 0);
  wgmma_commit();
  wgmma_wait<0>(c);
}

// ---- Scores

// Where the thread's pairs of a tile lie in the score buffer: in row `row` and, as half 1, eight
// rows below. NARROW: the panel of 16 columns, if there is one.
template <int ROWS, int NARROW>
struct ScorePlace {
  char* scores;
  uint32_t first, narrow;  // the pair in the first eight columns of a panel

  VK_DEVICE ScorePlace(char* buffer, int row) : scores(buffer) {
    const int lane = static_cast<int>(threadIdx.x) % 4 * 4;
    first = swizzled(Swizzle::k128, static_cast<uint32_t>(row * 128 + lane));
    narrow = swizzled(Swizzle::k32, static_cast<uint32_t>(row * 32 + lane));
  }
  // In columns 8 n and on.
  VK_DEVICE uint32_t* at(int n, int half) const {
    char* const panel = scores + n / 8 * ROWS * 128;
    const uint32_t chunk = static_cast<uint32_t>(n % 8 * 16);
    return reinterpret_cast<uint32_t*>(n / 8 == NARROW ? panel + (narrow ^ chunk) + half * 256
                                                       : panel + (first ^ chunk) + half * 1024);
  }
};

// Makes s (q k^T) logits in units of log2: times `by`, plus the bias of the rows that begin at
// `first`, whose columns lie side by side or are one.
template <class T, int C>
VK_DEVICE void add_bias(float (&s)[C], float by, const BiasView& bias, const int64_t (&first)[2],
                        int Nk) {
  const int pair = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* row = static_cast<const T*>(bias.data) + first[half];
    if (bias.column == 0) {
      const float value = load_float(row) * kLog2e;
#pragma unroll
      for (int n = 0; n < C / 4; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          s[4 * n + 2 * half + i] = fmaf(s[4 * n + 2 * half + i], by, value);
    } else {
      row += pair;
#pragma unroll
      for (int n = 0; n < C / 4; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[4 * n + 2 * half + i];
          const float value = n * 8 + pair + i < Nk ? load_float(row + n * 8 + i) : 0.0f;
          x = fmaf(x, by, value * kLog2e);
        }
    }
  }
}

// Zeros in the thread's rows past the end, of which few warps have any.
template <int C, int ROWS, int NARROW>
VK_DEVICE void clear_padding(const ScorePlace<ROWS, NARROW>& place, int rows_inside) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (8 * half < rows_inside) continue;
#pragma unroll
    for (int n = 0; n < C / 4; ++n) *place.at(n, half) = 0;
  }
}

// What is taken from the logits of the thread's two rows: lse (of the head, natural) in units of
// log2, 0 where all keys are masked.
struct Centers {
  float of[2];
};

VK_DEVICE Centers centers_of(const float* lse, int row, int Nq) {
  Centers centers;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float given = row + 8 * half < Nq ? lse[row + 8 * half] : 0.0f;
    centers.of[half] = given == -INFINITY ? 0.0f : given * kLog2e;
  }
  return centers;
}

// s (q k^T) becomes P = 2^(s - lse), which is stored, rounded; 0 in rows and columns past the end.
template <DType TYPE, bool BIAS, int ROWS, int NARROW, int C>
VK_DEVICE void store_probabilities(float (&s)[C], const Args& a,
                                   const ScorePlace<ROWS, NARROW>& place, int b, int h, int row,
                                   const Centers& centers) {
  const float by = a.scale * kLog2e;
  const int pair = static_cast<int>(threadIdx.x) % 4 * 2;
  if constexpr (BIAS) {
    const int64_t head = b * a.bias.batch + h * a.bias.head;
    const int64_t first[2] = {head + (row < a.Nq ? row : 0) * a.bias.row,
                              head + (row + 8 < a.Nq ? row + 8 : 0) * a.bias.row};
    VK_SWITCH_FLOAT(a.bias.dtype, add_bias<scalar_t>(s, by, a.bias, first, a.Nk))
  }
#pragma unroll
  for (int n = 0; n < C / 4; ++n) {
    uint32_t word[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* x = &s[4 * n + 2 * half];
      uint32_t masked = 0;
      if constexpr (BIAS) {
        if (x[0] == -INFINITY) masked = kMasked;
        if (x[1] == -INFINITY) masked |= kMasked << 16;
        x[0] -= centers.of[half], x[1] -= centers.of[half];
      } else {
        x[0] = fmaf(x[0], by, -centers.of[half]), x[1] = fmaf(x[1], by, -centers.of[half]);
      }
      word[half] = pack<TYPE>(exp2_approx(x[0]), exp2_approx(x[1])) | masked;
    }
    if (8 * n + 8 > a.Nk) {
      const int columns = a.Nk - 8 * n - pair;  // how many of the pair are inside
      const uint32_t kept = columns >= 2 ? 0xffffffffu : columns == 1 ? 0xffffu : 0;
      word[0] &= kept, word[1] &= kept;
    }
    *place.at(n, 0) = word[0], *place.at(n, 1) = word[1];
  }
  clear_padding<C>(place, a.Nq - row);
}

// dp (dout v^T) and the stored P give dS = P (dP - rowsum(P dP)), rounded, which takes P's place
// and is A of dQ = dS K as well (there, rows past the end do not matter). With `partial`, the
// thread's elements of it are put or added there.
template <DType TYPE, bool BIAS, int ROWS, int NARROW, int C, int STEPS>
VK_DEVICE void differentiate(FragmentA (&ds)[STEPS], float (&dp)[C],
                             const ScorePlace<ROWS, NARROW>& place, int rows_inside,
                             float4* partial, bool adds) {
  float delta[2], rest[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int n = 0; n < C / 4; ++n) {
      const float2 p = unpack<TYPE>(*place.at(n, half));
      sum += p.x + p.y;
      dot = fmaf(p.x, dp[4 * n + 2 * half], fmaf(p.y, dp[4 * n + 2 * half + 1], dot));
    }
    sum = quad_sum(sum);
    delta[half] = dot = quad_sum(dot);
    if (!(sum > 0.0f && is_finite(sum))) continue;
    // Of P as it was rounded: dS sums to 0 over a row, and a row that is nearly one-hot keeps its
    // small terms.
    const float inverse = 1.0f / sum;
    delta[half] = dot * inverse;
    if constexpr (BIAS) {  // in two numbers, so that its rounding does not lean to one side in
                           // dbias
      rest[half] = fmaf(-delta[half], sum, dot) * inverse;
      if (!is_finite(rest[half])) rest[half] = 0.0f;
    }
  }
  if (BIAS) pin_registers(dp);  // so that P is loaded again, not kept
#pragma unroll
  for (int n = 0; n < C / 4; ++n) {
    float value[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = *place.at(n, half);
      const float2 p = unpack<TYPE>(word);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = value[2 * half + i];
        x = dp[4 * n + 2 * half + i] - delta[half];
        if (BIAS) x -= rest[half];
        x *= i == 0 ? p.x : p.y;
        if (BIAS && (word & kMasked << 16 * i)) x = 0.0f;  // whatever dP is
      }
      ds[n / 2].r[n % 2 * 2 + half] = pack<TYPE>(value[2 * half], value[2 * half + 1]);
    }
    *place.at(n, 0) = ds[n / 2].r[n % 2 * 2], *place.at(n, 1) = ds[n / 2].r[n % 2 * 2 + 1];
    if constexpr (BIAS) {
      if (partial == nullptr) continue;
      float4 old = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (adds) old = partial[n * kWarpgroup];
      partial[n * kWarpgroup] =
          make_float4(old.x + value[0], old.y + value[1], old.z + value[2], old.w + value[3]);
    }
  }
  clear_padding<C>(place, rows_inside);
  if constexpr (C / 4 < 2 * STEPS) ds[STEPS - 1].r[2] = ds[STEPS - 1].r[3] = 0;
}

// ---- Gradients

VK_DEVICE void exchange(uint32_t& first, uint32_t& second, int lane_bit) {
  const bool upper = (static_cast<int>(threadIdx.x) & lane_bit) != 0;
  const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? first : second, lane_bit);
  if (upper)
    first = got;
  else
    second = got;
}

// Stores the warpgroup's 64 rows times `by`, which begin with row `first`, from `from` on where the
// head has `rows`. The four lanes of a row trade words, so that each stores chunks of 16 bytes.
template <DType TYPE, int DEPTH>
VK_DEVICE void store_rows(const float (&c)[DEPTH / 2], float by, const Args& a, const HeadView& to,
                          int b, int h, int first, int from, int rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  auto* const head = static_cast<uint16_t*>(to.data) + b * to.batch + h * to.head;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + static_cast<int>(threadIdx.x) / kWarp % 4 * 16 + lane / 4 + 8 * half;
#pragma unroll
    for (int n = 0; n < DEPTH / 8; n += 4) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        w[j] = pack<TYPE>(c[4 * (n + j) + 2 * half] * by, c[4 * (n + j) + 2 * half + 1] * by);
      exchange(w[0], w[1], 1), exchange(w[2], w[3], 1);
      exchange(w[0], w[2], 2), exchange(w[1], w[3], 2);
      const int column = (n + lane % 4) * 8;
      if (row >= from && row < rows && column < a.D)
        store_16(head + row * to.row + column, make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
}

}  // namespace vitkernels::attention::sm90_backward
