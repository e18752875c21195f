// What attention_sm90_long_backward.cu is made of: probabilities and their gradient in the
// registers of a warpgroup, one way round or the other, and gradients on their way out.
//
// A warpgroup has 64 rows, of queries or (BY_KEY) of keys, and goes through tiles of COLUMNS of the
// other side. Element i of a thread is v[i % 4] of FragmentC for columns i / 4 * 8 and on.
#pragma once

#include "attention/attention_sm90_long.cuh"

namespace vitkernels::attention::sm90_long {

// Of a query: lse in units of log2, 0 where all keys are masked, infinite past the last one, so
// that probabilities are 0 there; rowsum(dO O).
struct RowStats {
  float center, delta;
};

// The centers and deltas that a thread's elements need: of its two rows, or of its columns.
template <bool BY_KEY>
struct Stats {
  RowStats rows[2];           // of the thread's rows, if those are queries
  const RowStats* of_column;  // of the thread's first column, else

  template <class Use>
  VK_DEVICE void each(int elements, Use use) const {
#pragma unroll
    for (int i = 0; i < elements; i += 4) {
      if constexpr (BY_KEY) {
        const float4 x = *reinterpret_cast<const float4*>(of_column + i * 2);
        use(i, x.x, x.y), use(i + 1, x.z, x.w), use(i + 2, x.x, x.y), use(i + 3, x.z, x.w);
      } else {
#pragma unroll
        for (int n = 0; n < 4; ++n) use(i + n, rows[n / 2].center, rows[n / 2].delta);
      }
    }
  }
};

// s (products of queries and keys) becomes P = 2^(score - center), 0 past the last key.
template <bool BY_KEY, int C>
VK_DEVICE void probabilities(float (&s)[C], const Args& a, Head head, bool general,
                             const Places<BY_KEY>& at, const Stats<BY_KEY>& stats) {
  float by = a.scale * kLog2e;
  if (general) {
    if (has_float_bias(a)) {
      add_float_bias(s, a, head, by, at);
    } else {
#pragma unroll
      for (int i = 0; i < C; ++i) s[i] *= by;
    }
    hide_scores(s, a, head, at);
    by = 1.0f;
  }
  stats.each(C, [&](int i, float center, float) { s[i] = exp2_approx(fmaf(s[i], by, -center)); });
  if constexpr (!BY_KEY) {
    const int left = a.Nk - at.column;
    if (left + 8 < 2 * C) {
#pragma unroll
      for (int i = 0; i < C; ++i)
        if (i / 4 * 8 + i % 2 >= left) s[i] = 0.0f;
    }
  }
}

// dp (dO V^T) becomes dS = P (dP - delta); p, with dropout, what the output was summed with.
template <bool BY_KEY, int C>
VK_DEVICE void differentiate(float (&dp)[C], float (&p)[C], const Args& a, Head head, bool general,
                             const Places<BY_KEY>& at, const Stats<BY_KEY>& stats) {
  if (!general) {
    stats.each(C, [&](int i, float, float delta) { dp[i] = p[i] * (dp[i] - delta); });
    return;
  }
  const auto finish = [&](auto kept) {
    stats.each(C, [&](int i, float, float delta) {
      const float factor = kept(i);
      const float x = p[i] * (dp[i] * factor - delta);
      dp[i] = p[i] == 0.0f ? 0.0f : x;  // a masked key's garbage does not count
      p[i] *= factor;
    });
  };
  if (a.dropout.seed == nullptr) return finish([](int) { return 1.0f; });
  const Kept<C> kept(a, head, at);
  finish([&](int i) { return kept[i] ? a.dropout.scale : 0.0f; });
}

// Stores the warpgroup's rows times `by` where the head has them.
template <DType TYPE, int WIDTH>
VK_DEVICE void store_gradient(Sums<WIDTH>& sums, float by, const HeadView& to, const Args& a,
                              Head head, int row, int rows) {
  if (to.data == nullptr) return;
  const int quad = lane_index() % 4;
  auto* out = static_cast<uint16_t*>(to.data) + head.b * to.batch + head.h * to.head;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j += 4) {
      uint32_t w[4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
        w[n] = j + n < WIDTH / 8
                   ? pack<TYPE>(sums.at(j + n, 2 * half) * by, sums.at(j + n, 2 * half + 1) * by)
                   : 0;
      transpose_in_quad(w);
      const int column = (j + quad) * 8, at = row + 8 * half;
      if (at < rows && column < a.D)
        store_16(out + at * to.row + column, make_uint4(w[0], w[1], w[2], w[3]));
    }
}

}  // namespace vitkernels::attention::sm90_long

namespace vitkernels::attention {

// attention_sm90_long_dbias.cu, for a dbias of Nq rows and Nk columns.
void dbias_sm90_long(const Device& device, const Args& a, const sm90_long::RowStats* stats);

}  // namespace vitkernels::attention
