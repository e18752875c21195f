// Forward of CPU attention. A work item is a block of queries of one head, against all keys:
//   S = Q K^T (fp32 rows in L1/L2) -> P = 2^((s - max) scale log2 e) in one pass -> O = P V, rows divided by their sum.
// K^T and V of a head are packed once per thread and head; consecutive items of a head reuse them. Every row is computed by
// the same operations in the same order whatever its block or thread, so bits depend on neither.
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
    bytes = p - static_cast<char*>(memory);
  }
};

// Probabilities of one row without their normalisation. scores hold whole vectors, -inf beyond the last key; `scale` is the
// factor to log2 units. factors (dropout) or null. Returns the sum before dropout and the shift: p = 2^(s * scale - shift).
struct RowSum {
  float sum, shift;
};

// log sum exp as torch.logsumexp has it: a row with +inf and no NaN gives +inf, although its sum is NaN (inf - inf).
inline float log_sum_exp(const RowSum& row, const float* scores, int64_t n) {
  if (row.sum == 0.0f) return -kInf;
  if (row.shift == kInf) {
    for (int64_t j = 0; j < n; ++j)
      if (scores[j] != scores[j]) return scores[j];
    return kInf;
  }
  return static_cast<float>(row.shift * kLn2 + __builtin_log(row.sum));
}

template <class Unit>
RowSum softmax_row(const float* scores, int64_t vecs, float scale, const float* factors, Unit* probabilities) {
  Vec high[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  int64_t v = 0;
  for (; v + 4 <= vecs; v += 4)
    for (int u = 0; u < 4; ++u) high[u] = max_of_numbers(high[u], load(scores + (v + u) * kVec));
  for (; v < vecs; ++v) high[0] = max_of_numbers(high[0], load(scores + v * kVec));
  const float top = lane_max(max_of_numbers(max_of_numbers(high[0], high[1]), max_of_numbers(high[2], high[3])));
  // A row of -inf is a masked row (sum 0), unless a NaN hides in it (sum NaN): both come out with shift 0.
  const float shift = top == -kInf ? 0.0f : top * scale;
  const Vec factor = splat(scale), minus_shift = splat(-shift);
  Vec sum[2] = {Vec{}, Vec{}};
  const auto probability = [&](int64_t index, Vec& total) {
    Vec p = exp2(fma(load(scores + index * kVec), factor, minus_shift));
    total = total + p;
    return factors == nullptr ? p : p * load(factors + index * kVec);
  };
#if defined(__AVX512BF16__)
  if constexpr (kElements<Unit> == 2) {
    for (v = 0; v + 2 <= vecs; v += 2) {
      const Vec low = probability(v, sum[0]);
      const Vec above = probability(v + 1, sum[1]);
      _mm512_storeu_si512(probabilities + v * kVec / 2, round_to_bf16(above, low));
    }
    if (v < vecs) _mm512_storeu_si512(probabilities + v * kVec / 2, round_to_bf16(Vec{}, probability(v, sum[0])));
    return {lane_sum(sum[0] + sum[1]), shift};
  }
#endif
  float* out = reinterpret_cast<float*>(probabilities);
  for (v = 0; v + 2 <= vecs; v += 2) {
    store(out + v * kVec, probability(v, sum[0]));
    store(out + (v + 1) * kVec, probability(v + 1, sum[1]));
  }
  if (v < vecs) store(out + v * kVec, probability(v, sum[0]));
  return {lane_sum(sum[0] + sum[1]), shift};
}

template <class T>
void forward_items(const AttentionArgs& a, int64_t begin, int64_t end, void* memory) {
  using Unit = typename UnitOf<T>::type;
  const ForwardScratch<Unit> s(a, memory);
  ScoreTerms terms(a, s.terms, a.Nk);
  const int64_t blocks = forward_blocks(a), vecs = vecs_of(a.Nk), K = units_of<Unit>(a.D), N = units_of<Unit>(a.Nk);
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
    const RowUnits<Unit> q = row_units<Unit>(head_of<const T>(a.q, b, h) + i0 * a.q.row, a.q.row, rows, a.D, s.queries);
    gemm<ALayout::kRowMajor>(rows, a.Nk, K, q.data, q.stride, s.keys, K, 0, s.scores, s.score_stride, false);

    const bool apply_terms = terms.active();
    const float scale = apply_terms ? kLog2e : a.scale * kLog2e;
    float* lse = a.lse + head * a.Nq + i0;
    float normalizer[48];
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = s.scores + r * s.score_stride;
      if (apply_terms) {
        terms.begin_row(i0 + r);
        terms.apply(scores);
      }
      fill_tail(scores, a.Nk, -kInf);
      if (a.dropout) dropout_row(a, head, i0 + r, 0, a.Nk, 1.0f, s.factors);
      const RowSum row = softmax_row(scores, vecs, scale, a.dropout ? s.factors : nullptr,
                                     s.probabilities + r * s.probability_stride);
      normalizer[r] = row.sum == 0.0f ? 0.0f : (a.dropout ? a.keep_scale : 1.0f) / row.sum;
      lse[r] = log_sum_exp(row, scores, a.Nk);
    }
    gemm<ALayout::kRowMajor>(rows, a.D, N, s.probabilities, s.probability_stride, s.values, N, 0, s.output, s.output_stride,
                             false);
    T* out = head_of<T>(a.out, b, h) + i0 * a.out.row;
    for (int64_t r = 0; r < rows; ++r) {
      float* output = s.output + r * s.output_stride;
      if (normalizer[r] == 0.0f)  // masked: zero even where V is not finite
        for (int64_t d = 0; d < s.output_stride; ++d) output[d] = 0.0f;
      store_row(out + r * a.out.row, output, a.D, normalizer[r]);
    }
  }
}

}  // namespace
}  // namespace vitkernels
