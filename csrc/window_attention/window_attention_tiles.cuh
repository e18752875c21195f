// What the tensor-core kernels of window_attention share (sm_80, sm_90): where the tokens of a
// window lie, rows of one head in swizzled shared memory, softmax and its gradient in the fragments
// of a warp's 16 rows, cosines.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device.cuh"
#include "common/fragment.cuh"
#include "common/swizzle.cuh"
#include "window_attention/window_attention_cuda.h"

namespace vitkernels::window_attention {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kMaxLogitScale = 4.60517018598809136804f;  // ln 100
constexpr float kLongest = 1.0f / 1e-12f;                  // the inverse length of a short vector

// ---- Tokens

struct WindowPlace {
  int b, y, x;  // the sample, and the window's row and column in the shifted map
};

VK_DEVICE WindowPlace place_of(const Args& a, int64_t window) {
  const int64_t across = a.W / a.Ww, down = a.H / a.Wh;
  const int64_t row = divide(window, across), b = divide(row, down);
  return {static_cast<int>(b), static_cast<int>(row - b * down),
          static_cast<int>(window - row * across)};
}

VK_DEVICE void advance(const Args& a, WindowPlace& place) {
  if (++place.x < a.W / a.Ww) return;
  place.x = 0;
  if (++place.y < a.H / a.Wh) return;
  place.y = 0;
  ++place.b;
}

// Row and column of a token in its window, in one int.
VK_DEVICE int packed_token(const Args& a, int token) { return token / a.Ww << 16 | token % a.Ww; }

// ---- Rows of D 16-bit elements, their 16-byte chunks swizzled

template <int D>
VK_DEVICE char* chunk_at(char* tile, int row, int chunk) {
  return tile +
         swizzled(static_cast<Swizzle>(2 * D), static_cast<uint32_t>(row * 2 * D + chunk * 16));
}

// ---- Fragments: a quad of lanes has a row

VK_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
VK_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// ---- Parameters

// What the head's products are multiplied by.
VK_DEVICE float head_factor(const Args& a, int head) {
  if (a.logit_scale == nullptr) return a.scale;
  const float logit = load_scalar(a.logit_scale, a.logit_dtype, head * a.logit_step);
  return expf(logit > kMaxLogitScale ? kMaxLogitScale : logit);  // NaN stays NaN
}

// The head's bias times log2 e between two packed tokens.
VK_DEVICE float position_bias(const Args& a, int head, int query, int key) {
  const int dy = (query >> 16) - (key >> 16) + a.Wh - 1;
  const int dx = (query & 0xffff) - (key & 0xffff) + a.Ww - 1;
  const int64_t at = (dy * (2 * a.Ww - 1) + dx) * a.bias_row + head * a.bias_head;
  return load_scalar(a.bias_table, a.bias_dtype, at) * kLog2e;
}

// ---- Softmax and its gradient

// Scores (log2) become exponentials of what they exceed the row's largest by, which is `top`;
// `sum` is theirs.
template <int TILES>
VK_DEVICE void exponentiate(FragmentC (&s)[TILES], float (&top)[2], float (&sum)[2]) {
  top[0] = top[1] = -INFINITY, sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[n].v[i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    top[half] = quad_max(top[half]);
    if (top[half] == -INFINITY) top[half] = 0.0f;  // all masked, or all NaN
  }
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n].v[i] = exp2_approx(s[n].v[i] - top[i / 2]);
      sum[i / 2] += s[n].v[i];
    }
#pragma unroll
  for (int half = 0; half < 2; ++half) sum[half] = quad_sum(sum[half]);
}

// p (log2 scores before) and dp become P and dS; padded queries are left as they are. lse: of the
// thread's two rows, natural.
template <int TILES>
VK_DEVICE void differentiate(FragmentC (&p)[TILES], FragmentC (&dp)[TILES], const float (&lse)[2]) {
  float inverse[2], delta[2], rest[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // To 0 where it is not finite: the row becomes NaN by its sum, and masked keys stay 0.
    const float given = lse[half], center = given - given == 0.0f ? given * kLog2e : 0;
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        p[n].v[i] = exp2_approx(p[n].v[i] - center);
        sum += p[n].v[i];
        dot = fmaf(p[n].v[i], dp[n].v[i], dot);
      }
    sum = quad_sum(sum);
    dot = quad_sum(dot);
    // rowsum(P dP) in two numbers, so that roundings of dS do not lean to one side and add up over
    // windows in dbias.
    inverse[half] = 1.0f / sum, delta[half] = dot * inverse[half];
    rest[half] = fmaf(-delta[half], sum, dot) * inverse[half];
    if (!(rest[half] - rest[half] == 0.0f)) rest[half] = 0.0f;
  }
  // Where p is 0 there is no gradient, whatever dP is. What is not finite shows in delta.
  const bool finite = delta[0] - delta[0] == 0.0f && delta[1] - delta[1] == 0.0f;
  if (__all_sync(kAllLanes, finite)) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[n].v[i] *= inverse[i / 2];
        dp[n].v[i] = p[n].v[i] * ((dp[n].v[i] - delta[i / 2]) - rest[i / 2]);
      }
  } else {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool masked = p[n].v[i] == 0.0f;
        p[n].v[i] *= inverse[i / 2];
        dp[n].v[i] = masked ? 0.0f : p[n].v[i] * ((dp[n].v[i] - delta[i / 2]) - rest[i / 2]);
      }
  }
}

// The two neighbours of a half of a fragment in 16 bits; 0 for padded queries.
template <DType TYPE>
VK_DEVICE uint32_t rounded(const FragmentC& c, int half, bool inside) {
  const uint32_t pair = pack<TYPE>(c.v[2 * half], c.v[2 * half + 1]);
  return inside ? pair : 0;
}

// ---- Cosines

// 1 / max(|x|, 1e-12) of a row; NaN stays NaN.
template <DType TYPE, int D>
VK_DEVICE float inverse_length(char* tile, int row) {
  float sum = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < D / 8; ++chunk) {
    const auto* words = reinterpret_cast<const uint32_t*>(chunk_at<D>(tile, row, chunk));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<TYPE>(words[i]);
      sum = fmaf(x.x, x.x, fmaf(x.y, x.y, sum));
    }
  }
  const float length = sqrtf(sum);
  return 1.0f / (length < 1e-12f ? 1e-12f : length);
}

// The row becomes a unit vector.
template <DType TYPE, int D>
VK_DEVICE void make_unit(char* tile, int row, float inverse) {
#pragma unroll
  for (int chunk = 0; chunk < D / 8; ++chunk) {
    auto* words = reinterpret_cast<uint32_t*>(chunk_at<D>(tile, row, chunk));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<TYPE>(words[i]);
      words[i] = pack<TYPE>(x.x * inverse, x.y * inverse);
    }
  }
}

// g, the gradient of unit vectors of the thread's rows, `row` and row + 8, becomes that of the
// vectors: (g - u (u . g)) / length, 0 for a short one. Returns the sum of u . g over the rows that
// are inside.
template <DType TYPE, int D>
VK_DEVICE float through_unit(FragmentC (&g)[D / 8], char* units, const float* inverse, int row,
                             const bool (&inside)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float sum = 0.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float2 u[D / 8];
    float dot = 0.0f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const char* at = chunk_at<D>(units, row + 8 * half, n) + lane % 4 * 4;
      u[n] = unpack<TYPE>(*reinterpret_cast<const uint32_t*>(at));
      dot = fmaf(u[n].x, g[n].v[2 * half], fmaf(u[n].y, g[n].v[2 * half + 1], dot));
    }
    dot = quad_sum(dot);
    if (inside[half]) sum += dot;
    const float by = inverse[row + 8 * half];
    const bool is_short = by >= kLongest;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      float &x = g[n].v[2 * half], &y = g[n].v[2 * half + 1];
      x = is_short ? 0.0f : fmaf(u[n].x, -dot, x) * by;
      y = is_short ? 0.0f : fmaf(u[n].y, -dot, y) * by;
    }
  }
  return sum;
}

// ---- Host

// Whether every pixel of the map begins on a 16-byte line.
inline bool on_lines(const Args& a, const MapView& map) {
  const auto fits = [](int size, int64_t stride) { return size == 1 || stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && fits(a.B, map.batch) &&
         fits(a.H, map.row) && fits(a.W, map.column);
}

}  // namespace vitkernels::window_attention
