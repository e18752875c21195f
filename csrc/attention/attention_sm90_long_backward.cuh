// What attention_sm90_long_backward.cu is made of: probabilities and their gradient in the
// registers of a warpgroup, one way round or the other, and gradients on their way out; the same of
// a tail of 8 rows, by three warps.
//
// A warpgroup has 64 rows, of queries or (BY_KEY) of keys, and goes through tiles of COLUMNS of the
// other side. Element i of a thread is v[i % 4] of FragmentC for columns i / 4 * 8 and on.
#pragma once

#include "attention/attention_sm90_long_tail.cuh"

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

// s (products of queries and keys) becomes P = 2^(score - center).
template <int C, class At, class Of>
VK_DEVICE void probabilities(float (&s)[C], const Args& a, Head head, bool general, const At& at,
                             const Of& stats) {
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
}

// P is 0 past the last key, `left` after the thread's first.
template <int C>
VK_DEVICE void clear_keys(float (&p)[C], int left) {
  if (left + 8 >= 2 * C) return;
#pragma unroll
  for (int i = 0; i < C; ++i)
    if (i / 4 * 8 + i % 2 >= left) p[i] = 0.0f;
}

// dp (dO V^T) becomes dS = P (dP - delta); p, with dropout, what the output was summed with.
template <int C, class At, class Of>
VK_DEVICE void differentiate(float (&dp)[C], float (&p)[C], const Args& a, Head head, bool general,
                             const At& at, const Of& stats) {
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

// ---- A tail (attention_sm90_long_tail.cuh): 8 queries, the columns of products with 16 keys

struct TailStats {
  RowStats queries[2];  // the thread's

  template <class Use>
  VK_DEVICE void each(int elements, Use use) const {
#pragma unroll
    for (int i = 0; i < elements; ++i) use(i, queries[i % 2].center, queries[i % 2].delta);
  }
};

template <DType TYPE, int WIDTH>
struct GradientTail {
  static constexpr int kSteps = WIDTH / 16;
  const Args& a;
  bool general;
  int index, row;               // the head, the first query
  const RowStats* of_head;      // of each query
  float4* own;                  // the warp's shared memory, where each lane reads what it wrote
  FragmentC sums[kSteps] = {};  // dQ^T

  // Q^T or dO^T of a step: they stay in shared memory, for registers are few.
  VK_DEVICE FragmentB* fragment(int which, int step) const {
    return reinterpret_cast<FragmentB*>(own) + (which * kSteps + step) * kWarp + lane_index();
  }
  VK_DEVICE void load() const {
    const Head head = head_at(a, index);
    const HeadView* const views[2] = {&a.q, &a.dout};
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      FragmentB rows[kSteps];
      load_tail(rows, *views[which], head, row, a.Nq, a.D);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) *fragment(which, step) = rows[step];
    }
  }

  // 16 keys from row `at` of the tiles on, which are the head's from `key` on.
  VK_DEVICE void add_keys(const Tile& k, const Tile& v, int at, int key) {
    const int lane = lane_index(), mine = key + lane / 4;
    FragmentC p = {}, ds = {};
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {  // loads of two steps wait for no product
      FragmentA f[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_matrices(f[i].r,
                      chunk_at<WIDTH>(i % 2 == 0 ? k : v, at + lane % 16, step + i / 2, lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mma_m16n8k16<TYPE>(i % 2 == 0 ? p : ds, f[i], *fragment(i % 2, step + i / 2));
    }

    // Addresses of bias and masks and the like are not to wait in registers for the next keys.
    int own_head = index, query = row + lane % 4 * 2;
    pin_registers(own_head), pin_registers(query);
    const Head head = head_at(a, own_head);
    const auto place = [&](int i) { return Place{query + i % 2, mine + i / 2 * 8}; };
    const TailStats stats = {{of_head[query], of_head[query + 1]}};
    probabilities(p.v, a, head, general, place, stats);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (place(i).key >= a.Nk) p.v[i] = 0.0f;
    differentiate(ds.v, p.v, a, head, general, place, stats);

    const FragmentB turned = {{transpose_matrix(pack<TYPE>(ds.v[0], ds.v[1])),
                               transpose_matrix(pack<TYPE>(ds.v[2], ds.v[3]))}};
    const int from = at + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      FragmentA f;
      load_matrices_transposed(f.r, chunk_at<WIDTH>(k, from, step, lane / 8 % 2));
      mma_m16n8k16<TYPE>(sums[step], f, turned);
    }
  }

  VK_DEVICE void give() const {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float (&x)[4] = sums[j].v;
      own[j * kWarp + lane_index()] = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
  VK_DEVICE void take(const float4* from) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float4 x = from[j * kWarp + lane_index()];
      sums[j].v[0] += x.x, sums[j].v[1] += x.y, sums[j].v[2] += x.z, sums[j].v[3] += x.w;
    }
  }
  VK_DEVICE void store() const {
    const float by[2] = {a.scale, a.scale};
    store_tail<TYPE>(sums, by, a.dq, head_at(a, index), row, a.Nq, a.D);
  }
};

}  // namespace vitkernels::attention::sm90_long

namespace vitkernels::attention {

// attention_sm90_long_dbias.cu, for a dbias of Nq rows and Nk columns.
void dbias_sm90_long(const Device& device, const Args& a, const sm90_long::RowStats* stats);

}  // namespace vitkernels::attention
