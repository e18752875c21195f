// Forward of CPU attention. A work item is a block of queries of one head, against all keys:
//   S = Q K^T (fp32 rows in L1/L2) -> P = 2^((s - max) scale log2 e) in one pass -> O = P V, rows
//   divided by their sum.
// K^T and V of a head are packed once per thread and head; consecutive items of a head reuse them.
// Every row is computed by the same operations in the same order whatever its block or thread, so
// bits depend on neither.
#pragma once

#include "attention/attention_cpu_rows.h"

namespace vitkernels {
namespace {

// Queries per work item: the score rows should stay in L1/L2 beside the packed keys.
inline int64_t forward_block(const AttentionArgs& a) { return a.Nk <= 512 ? 48 : 24; }

inline int64_t forward_blocks(const AttentionArgs& a) { return ceil_div(a.Nq, forward_block(a)); }

template <class Unit>
struct ForwardScratch {
  Unit *keys, *values, *queries, *probabilities;
  float *scores, *output, *factors, *terms;
  float *partials, *sums, *tops;  // per row: a vector, its reductions
  int64_t score_stride, probability_stride, output_stride, bytes;

  ForwardScratch(const AttentionArgs& a, void* memory) {
    const int64_t rows = forward_block(a), K = units_of<Unit>(a.D), N = units_of<Unit>(a.Nk);
    char* p = static_cast<char*>(memory);
    const auto take = [&p](int64_t count) {
      char* taken = p;
      p += round_up(count * 4, 64);
      return taken;
    };
    score_stride = round_up(a.Nk, kVec);
    probability_stride = kElements<Unit> == 1 ? score_stride : round_up(N, kVec);
    output_stride = round_up(a.D, kVec);
    keys = reinterpret_cast<Unit*>(take(packed_units(K, a.Nk)));
    values = reinterpret_cast<Unit*>(take(packed_units(N, a.D)));
    queries = reinterpret_cast<Unit*>(take(rows * round_up(K, kVec)));
    scores = reinterpret_cast<float*>(take(rows * score_stride));
    // fp32 probabilities overwrite the scores
    probabilities = kElements<Unit> == 1 ? reinterpret_cast<Unit*>(scores)
                                         : reinterpret_cast<Unit*>(take(rows * probability_stride));
    output = reinterpret_cast<float*>(take(rows * output_stride));
    factors = reinterpret_cast<float*>(take(a.dropout ? score_stride : 0));
    terms = reinterpret_cast<float*>(take(ScoreTerms::scratch_floats(a.Nk)));
    const int64_t whole_rows = round_up(rows, kVec);
    partials = reinterpret_cast<float*>(take(whole_rows * kVec));
    sums = reinterpret_cast<float*>(take(whole_rows));
    tops = reinterpret_cast<float*>(take(whole_rows));
    bytes = p - static_cast<char*>(memory);
  }
};

VK_INLINE void store_probabilities(float* out, int64_t v, Vec p) { store(out + v * kVec, p); }

VK_INLINE void store_probabilities(float* out, int64_t v, Vec low, Vec high) {
  store(out + v * kVec, low);
  store(out + (v + 1) * kVec, high);
}

#if defined(__AVX512BF16__)
VK_INLINE void store_probabilities(Bf16Pair* out, int64_t v, Vec low, Vec high = Vec{}) {
  _mm512_storeu_si512(out + v * kVec / 2, round_to_bf16(high, low));
}
#endif

// Lane-wise maximum of a row of whole vectors.
VK_INLINE Vec row_max(const float* scores, int64_t vecs) {
  Vec high[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  int64_t v = 0;
  for (; v + 4 <= vecs; v += 4)
    for (int u = 0; u < 4; ++u) high[u] = max_of_numbers(high[u], load(scores + (v + u) * kVec));
  for (; v < vecs; ++v) high[0] = max_of_numbers(high[0], load(scores + v * kVec));
  return max_of_numbers(max_of_numbers(high[0], high[1]), max_of_numbers(high[2], high[3]));
}

// p = 2^((s - top) * scale) over a row of whole vectors, times the dropout factors where there are
// some; P is rounded to bf16 when units are pairs. Returns the lane-wise sum before dropout and
// rounding.
template <class Unit>
VK_INLINE Vec row_probabilities(const float* scores, int64_t vecs, float scale, float top,
                                const float* factors, Unit* out) {
  const Vec factor = splat(scale), most = splat(top);
  Vec sum[2] = {Vec{}, Vec{}};
  const auto probability = [&](int64_t v, Vec& total) {
    const Vec p = exp2((load(scores + v * kVec) - most) * factor);
    total = total + p;
    return factors == nullptr ? p : p * load(factors + v * kVec);
  };
  int64_t v = 0;
  for (; v + 2 <= vecs; v += 2) {
    const Vec low = probability(v, sum[0]), high = probability(v + 1, sum[1]);
    store_probabilities(out, v, low, high);
  }
  if (v < vecs) store_probabilities(out, v, probability(v, sum[0]));
  return sum[0] + sum[1];
}

// From sums and largest scores of rows to what they are wanted for, in place: sums become the
// factor kept / sum that normalises a row, 0 for a masked row; tops become log sum exp. As in
// torch.logsumexp a row with +inf gives +inf, although its sum is NaN (inf - inf), and a masked row
// gives -inf.
inline void finish_sums(float* sums, float* tops, int64_t rows, float scale, float kept) {
  for (int64_t r = 0; r < rows; r += kVec) {
    const Vec sum = load(sums + r), top = load(tops + r);
    const IVec masked = sum == Vec{};
    const Vec lse = fma(top, splat(scale), log(sum));
    const Vec special = select(masked, splat(-kInf), select(top == splat(kInf), top, sum));
    store(tops + r, select(masked | (sum != sum), special, lse));
    store(sums + r, select(masked, Vec{}, splat(kept) / sum));
  }
}

template <class T>
void forward_items(const AttentionArgs& a, int64_t begin, int64_t end, void* memory) {
  using Unit = typename UnitOf<T>::type;
  const ForwardScratch<Unit> s(a, memory);
  ScoreTerms terms(a, s.terms, a.Nk);
  const int64_t blocks = forward_blocks(a), vecs = vecs_of(a.Nk), K = units_of<Unit>(a.D),
                N = units_of<Unit>(a.Nk);
  int64_t packed_head = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / blocks, block = item % blocks, b = head / a.H, h = head % a.H;
    if (head != packed_head) {
      pack_transposed<Unit>(head_of<const T>(a.k, b, h), a.k.row, a.Nk, a.D, s.keys);
      pack_rows<Unit>(head_of<const T>(a.v, b, h), a.v.row, a.Nk, a.D, s.values);
      terms.begin(b, h, 0, a.Nk);
      packed_head = head;
    }
    const int64_t i0 = block * a.Nq / blocks, rows = (block + 1) * a.Nq / blocks - i0;
    const RowUnits<Unit> q =
        row_units<Unit>(head_of<const T>(a.q, b, h) + i0 * a.q.row, a.q.row, rows, a.D, s.queries);
    gemm<ALayout::kRowMajor>(rows, a.Nk, K, q.data, q.stride, s.keys, K, 0, s.scores,
                             s.score_stride, false);

    const bool apply_terms = terms.active();
    const float natural = apply_terms ? 1.0f : a.scale;
    const float scale = static_cast<float>(natural * kLog2e);
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = s.scores + r * s.score_stride;
      if (apply_terms) {
        terms.begin_row(i0 + r);
        terms.apply(scores);
      }
      fill_tail(scores, a.Nk, -kInf);
      store(s.partials + r * kVec, row_max(scores, vecs));
    }
    reduce_lanes(s.partials, rows, s.tops, max_of_numbers);
    for (int64_t r = 0; r < rows; ++r) {
      // A row of -inf is a masked row (sum 0), unless a NaN hides in it (sum NaN): either way 0
      // stands for its largest score.
      if (s.tops[r] == -kInf) s.tops[r] = 0.0f;
      if (a.dropout) dropout_row(a, head, i0 + r, 0, a.Nk, 1.0f, s.factors);
      const Vec sum = row_probabilities(s.scores + r * s.score_stride, vecs, scale, s.tops[r],
                                        a.dropout ? s.factors : nullptr,
                                        s.probabilities + r * s.probability_stride);
      store(s.partials + r * kVec, sum);
    }
    reduce_lanes(s.partials, rows, s.sums, [](Vec x, Vec y) { return x + y; });
    finish_sums(s.sums, s.tops, rows, natural, a.dropout ? a.keep_scale : 1.0f);
    std::memcpy(a.lse + head * a.Nq + i0, s.tops, static_cast<size_t>(rows) * sizeof(float));
    gemm<ALayout::kRowMajor>(rows, a.D, N, s.probabilities, s.probability_stride, s.values, N, 0,
                             s.output, s.output_stride, false);
    T* out = head_of<T>(a.out, b, h) + i0 * a.out.row;
    for (int64_t r = 0; r < rows; ++r)
      store_row(out + r * a.out.row, s.output + r * s.output_stride, a.D, s.sums[r]);
  }
}

}  // namespace
}  // namespace vitkernels
