// Forward of CPU window attention. A work item is a window (or some of its heads); inside it, head
// by head and by blocks of queries against all keys:
//   S = Q K^T (fp32 rows in L1) -> P = 2^(s - max) in one pass -> O = P V, rows divided by their
//   sum.
// Q, K and V of a head are gathered straight into the form that the products read.
#pragma once

#include "window_attention/window_attention_cpu_rows.h"

namespace vitkernels {
namespace {

constexpr int64_t kForwardQueries = 32;  // at most: score rows stay in L1 beside the packed keys

// P is 2^-kDown too small until it is normalised: sums over all keys of a window stay within V's
// largest values. The powers of two cost no rounding.
constexpr int kDown = 10;
constexpr float kUp = 1 << kDown;

inline int64_t forward_blocks(const WindowAttentionArgs& a) {
  return ceil_div(a.tokens(), kForwardQueries);
}

template <class Unit>
struct ForwardScratch {
  Unit *keys, *values, *queries, *probabilities;
  float *scores, *output, *factors;
  float *partials, *sums, *tops;  // per row of a block: a vector, its reductions
  int64_t score_stride, probability_stride, output_stride;

  ForwardScratch(const WindowAttentionArgs& a, Carver* carver) {
    const int64_t N = a.tokens(), rows = kForwardQueries, K = units_of<Unit>(a.D),
                  NK = units_of<Unit>(N), padded = round_up(N, kVec);
    score_stride = padded;
    probability_stride = kElements<Unit> == 1 ? score_stride : round_up(NK, kVec);
    output_stride = round_up(a.D, kVec);
    keys = carver->take<Unit>(packed_units(K, N));
    values = carver->take<Unit>(packed_units(NK, a.D));
    queries = carver->take<Unit>(rows * round_up(K, kVec));
    scores = carver->take(rows * score_stride);
    // fp32 probabilities overwrite the scores
    probabilities = kElements<Unit> == 1 ? reinterpret_cast<Unit*>(scores)
                                         : carver->take<Unit>(rows * probability_stride);
    output = carver->take(rows * output_stride);
    factors = carver->take(a.dropout ? score_stride : 0);
    partials = carver->take(round_up(rows, kVec) * kVec);
    sums = carver->take(round_up(rows, kVec));
    tops = carver->take(round_up(rows, kVec));
  }
};

template <class T>
struct WindowForward {
  using Unit = typename UnitOf<T>::type;
  const WindowAttentionArgs& a;
  Carver carver;
  HeadOperands<T> operands;
  const ForwardScratch<Unit> s;
  WindowTokens tokens, next;

  WindowForward(const WindowAttentionArgs& args, void* memory)
      : a(args),
        carver(memory),
        operands(args, &carver),
        s(args, &carver),
        tokens(args, &carver),
        next(args, &carver) {}

  int64_t scratch_bytes() const { return carver.bytes(); }

  void head(int64_t window, int64_t h) {
    const int64_t N = a.tokens(), K = units_of<Unit>(a.D), NK = units_of<Unit>(N);
    const int64_t blocks = forward_blocks(a), window_head = window * a.heads + h;
    operands.begin(tokens, h);
    operands.pack_keys_transposed(s.keys);
    pack_rows<Unit>(head_rows<T>(a, tokens, 2, h), N, a.D, s.values);
    const ScoreTerms terms = operands.terms(tokens, h);
    prefetch_rows<false>(head_rows<T>(a, next, 0, h).data, next.qkv, 1, N, a.D, 3, a.heads * a.D);
    prefetch_rows<true>(static_cast<const T*>(a.out) + h * a.D, tokens.places, a.heads * a.D, N,
                        a.D, 1, 0);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t i0 = block * N / blocks, rows = (block + 1) * N / blocks - i0;
      const RowUnits<Unit> units = operands.query_units(i0, rows, s.queries);
      gemm<ALayout::kRowMajor>(rows, N, K, units.data, units.stride, s.keys, K, 0, s.scores,
                               s.score_stride, false);
      with_constants(tokens.mixed, operands.scaled(), [&](auto mixed, auto scaled) {
        exponents<mixed(), scaled()>(terms, i0, rows);
      });
      probabilities(window_head, i0, rows);
      gemm<ALayout::kRowMajor>(rows, a.D, NK, s.probabilities, s.probability_stride, s.values, NK,
                               0, s.output, s.output_stride, false);
      T* out = static_cast<T*>(a.out) + h * a.D;
      for (int64_t r = 0; r < rows; ++r)
        store_row(out + tokens.places[i0 + r] * a.heads * a.D, s.output + r * s.output_stride, a.D,
                  s.sums[r]);
    }
  }

  // Products become exponents, with the lane-wise maximum of each row.
  template <bool kMixed, bool kScaled>
  void exponents(const ScoreTerms& terms, int64_t i0, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = s.scores + r * s.score_stride;
      const ScoreRow<kMixed, kScaled> row(a, terms, scores, i0 + r);
      Vec top = splat(-kInf);
      for (int64_t j = 0; j < terms.N; j += kVec) {
        const Vec x = row.at(j);
        store(scores + j, x);
        top = max_of_numbers(top, x);
      }
      store(s.partials + r * kVec, top);
    }
  }

  // Exponents become P, not yet divided by s.sums; lse is done.
  void probabilities(int64_t window_head, int64_t i0, int64_t rows) {
    const int64_t N = a.tokens();
    reduce_lanes(s.partials, rows, s.tops, max_of_numbers);
    for (int64_t r = 0; r < rows; ++r) {
      if (a.dropout) dropout_row(a, window_head, i0 + r, 1.0f, s.factors);
      const float* scores = s.scores + r * s.score_stride;
      const Vec top = splat(s.tops[r]);
      const Vec sum = row_probabilities(
          vecs_of(N), a.dropout ? s.factors : nullptr, s.probabilities + r * s.probability_stride,
          [&](int64_t v) { return exp2<kDown>(load(scores + v * kVec) - top); });
      store(s.partials + r * kVec, sum);
    }
    reduce_lanes(s.partials, rows, s.sums, [](Vec x, Vec y) { return x + y; });
    for (int64_t r = 0; r < rows; ++r) s.sums[r] *= kUp;
    finish_sums(s.sums, s.tops, rows, static_cast<float>(kLn2),
                kUp * (a.dropout ? a.keep_scale : 1.0f));
    std::memcpy(a.lse + window_head * N + i0, s.tops, static_cast<size_t>(rows) * sizeof(float));
  }
};

template <class T>
void forward_items(const WindowAttentionArgs& a, int64_t begin, int64_t end, void* memory) {
  WindowForward<T> forward(a, memory);
  const int64_t groups = a.head_groups();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t window = item / groups, group = item % groups;
    if (item == begin) forward.next.begin(a, window);
    if (item == begin || group == 0) {
      std::swap(forward.tokens, forward.next);
      forward.next.begin(a, window + 1 < a.windows() ? window + 1 : window);
    }
    for (int64_t h = group * a.heads / groups; h < (group + 1) * a.heads / groups; ++h)
      forward.head(window, h);
  }
}

}  // namespace
}  // namespace vitkernels
