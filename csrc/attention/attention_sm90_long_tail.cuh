// A tail of attention's forward of many tokens on sm_90 (attention_sm90_long.cu): 8 query rows of a
// head by mma.sync. Each of three warps goes through its share of the keys with a maximum and sums
// of its own; in the end they are merged.
//
// Keys are the rows of S^T = K Q^T, queries its 8 columns, so that none is computed in vain. P^T,
// transposed, is the B operand of O^T = V^T P^T. Element i of a thread is of query 2 * (lane % 4) +
// i % 2, v[i % 4] of FragmentC of 16 keys or columns of the head.
#pragma once

#include "attention/attention_sm90_long.cuh"

namespace vitkernels::attention::sm90_long {

// Over the lanes of a query.
VK_DEVICE float query_max(float x) {
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2)
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// The tail's rows of a view as the B operand of products over columns of the head, 0 where there is
// no such row or column.
template <int STEPS>
VK_DEVICE void load_tail(FragmentB (&to)[STEPS], const HeadView& view, Head head, int row, int rows,
                         int D) {
  const int mine = row + lane_index() / 4;
  const auto* from = static_cast<const uint16_t*>(view.data) + head.b * view.batch +
                     head.h * view.head + mine * view.row + lane_index() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * STEPS; ++i)
    to[i / 2].r[i % 2] =
        mine < rows && 8 * i < D ? *reinterpret_cast<const uint32_t*>(from + 8 * i) : 0;
}

// Stores what is of the tail's rows, times `by` of each of the thread's two: element by element,
// for it is one row, or a few, of a head.
template <DType TYPE, int STEPS>
VK_DEVICE void store_tail(const FragmentC (&o)[STEPS], const float (&by)[2], const HeadView& view,
                          Head head, int row, int rows, int D) {
  const int mine = row + lane_index() % 4 * 2;
  auto* out = static_cast<uint16_t*>(view.data) + head.b * view.batch + head.h * view.head +
              mine * view.row + lane_index() / 4;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 2 * STEPS; ++i)
      if (mine + n < rows && 8 * i < D)
        out[n * view.row + 8 * i] =
            static_cast<uint16_t>(pack<TYPE>(o[i / 2].v[i % 2 * 2 + n] * by[n], 0.0f));
}

template <DType TYPE, int WIDTH, bool GENERAL>
struct Tail {
  static constexpr int kSteps = WIDTH / 16;
  static constexpr int kParts = GENERAL ? 1 : 2;  // of 16 keys at a time
  static constexpr int kKeys = 16 * kParts;
  const Args& a;
  int index, row;            // the head, b * H + h; the first query
  FragmentB q[kSteps] = {};  // Q^T
  FragmentC o[kSteps] = {};  // O^T
  // The largest score in units of log2, the same in all lanes of a query; the sum of the lane's
  // exponentials.
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  VK_DEVICE int query() const { return row + lane_index() % 4 * 2; }  // of element 0

  VK_DEVICE void load_queries() { load_tail(q, a.q, head_at(a, index), row, a.Nq, a.D); }

  // Raises the maxima to those of new scores; what was summed before is scaled accordingly.
  VK_DEVICE void raise_to(const float (&s)[4 * kParts], float (&low)[2]) {
    float rescale[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = n; i < 4 * kParts; i += 2) largest = fmaxf(largest, s[i]);
      const float before = top[n];
      top[n] = fmaxf(query_max(largest), before);
      low[n] = top[n] == -INFINITY ? 0.0f : top[n];  // all masked, or all NaN
      rescale[n] = exp2_approx(before - low[n]);
      sum[n] *= rescale[n];
    }
    scale_sums(rescale);
  }

  VK_DEVICE void scale_sums(const float (&by)[2]) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[j].v[i] *= by[i % 2];
  }

  // kKeys keys from row `at` of the tile on, which are the head's from `key` on; none from
  // `end` on.
  VK_DEVICE void add_keys(const Tile& k, const Tile& v, int at, int key, int end) {
    const int lane = lane_index();
    FragmentC products[kParts] = {};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      // Without a branch, so that loads wait for no product; what is read twice is hidden below.
      const int from = (key + 16 * part < end ? at + 16 * part : at) + lane % 16;
      FragmentA f[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step)  // matrices: 16 keys (low columns), then high
        load_matrices(f[step].r, chunk_at<WIDTH>(k, from, step, lane / 16));
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        mma_m16n8k16<TYPE>(products[part], f[step], q[step]);
    }

    // Addresses of bias and masks and the like are not to wait in registers for the next keys.
    int own = index, first = query();
    if constexpr (GENERAL) pin_registers(own), pin_registers(first);
    const Head head = head_at(a, own);
    const auto place = [&](int i) {
      return Place{first + i % 2, key + i / 4 * 16 + i % 4 / 2 * 8 + lane / 4};
    };
    float s[4 * kParts], low[2];
    const float by = a.scale * kLog2e;
#pragma unroll
    for (int i = 0; i < 4 * kParts; ++i) s[i] = products[i / 4].v[i % 4];
    if (GENERAL && has_float_bias(a)) {
      add_float_bias(s, a, head, by, place);
    } else {
#pragma unroll
      for (int i = 0; i < 4 * kParts; ++i) s[i] *= by;
    }
    if constexpr (GENERAL) hide_scores(s, a, head, place);
#pragma unroll
    for (int i = 0; i < 4 * kParts; ++i)
      if (place(i).key >= end) s[i] = -INFINITY;

    raise_to(s, low);
#pragma unroll
    for (int i = 0; i < 4 * kParts; ++i) {
      s[i] = exp2_approx(s[i] - low[i % 2]);
      sum[i % 2] += s[i];
    }
    if constexpr (GENERAL)
      if (a.dropout.seed != nullptr) drop_weights(s, a, head, place);

#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (key + 16 * part >= end) continue;
      const float* const p = s + 4 * part;
      const FragmentB weights = {
          {transpose_matrix(pack<TYPE>(p[0], p[1])), transpose_matrix(pack<TYPE>(p[2], p[3]))}};
      const int from = at + 16 * part + lane / 16 * 8 + lane % 8;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {  // matrices: 16 columns (low keys), then high
        FragmentA f;
        load_matrices_transposed(f.r, chunk_at<WIDTH>(v, from, step, lane / 8 % 2));
        mma_m16n8k16<TYPE>(o[step], f, weights);
      }
    }
  }

  // What one warp hands to another, kSteps + 1 for each lane.
  VK_DEVICE void give(float4* to) const {
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
      to[j * kWarp + lane_index()] = make_float4(o[j].v[0], o[j].v[1], o[j].v[2], o[j].v[3]);
    to[kSteps * kWarp + lane_index()] = make_float4(top[0], top[1], sum[0], sum[1]);
  }

  VK_DEVICE void take(const float4* from) {
    const float4 other = from[kSteps * kWarp + lane_index()];
    const float tops[2] = {other.x, other.y}, sums[2] = {other.z, other.w};
    float by[2], by_mine[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float before = top[n];
      top[n] = fmaxf(before, tops[n]);
      const float low = top[n] == -INFINITY ? 0.0f : top[n];
      by[n] = exp2_approx(tops[n] - low), by_mine[n] = exp2_approx(before - low);
      sum[n] = fmaf(sums[n], by[n], sum[n] * by_mine[n]);
    }
    scale_sums(by_mine);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float4 x = from[j * kWarp + lane_index()];
      o[j].v[0] = fmaf(x.x, by[0], o[j].v[0]), o[j].v[1] = fmaf(x.y, by[1], o[j].v[1]);
      o[j].v[2] = fmaf(x.z, by[0], o[j].v[2]), o[j].v[3] = fmaf(x.w, by[1], o[j].v[3]);
    }
  }

  VK_DEVICE void store() const {
    const float kept = GENERAL && a.dropout.seed != nullptr ? a.dropout.scale : 1.0f;
    float by[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float total = sum[n];
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2)
        total += __shfl_xor_sync(kAllLanes, total, offset);
      by[n] = total == 0.0f ? 0.0f : kept / total;  // 0: fully masked
      if (lane_index() < 4 && query() + n < a.Nq) {
        const float low = top[n] == -INFINITY ? 0.0f : top[n];
        a.lse[static_cast<int64_t>(index) * a.Nq + query() + n] = fmaf(low, kLn2, logf(total));
      }
    }
    store_tail<TYPE>(o, by, a.out, head_at(a, index), row, a.Nq, a.D);
  }
};

}  // namespace vitkernels::attention::sm90_long
