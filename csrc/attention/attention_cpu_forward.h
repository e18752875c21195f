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
      const float* scores = s.scores + r * s.score_stride;
      const Vec factor = splat(scale), top = splat(s.tops[r]);
      const Vec sum = row_probabilities(
          vecs, a.dropout ? s.factors : nullptr, s.probabilities + r * s.probability_stride,
          [&](int64_t v) { return exp2((load(scores + v * kVec) - top) * factor); });
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
