// Backward of CPU window attention. A work item is a chunk of windows (for some of the heads);
// inside it, window by window, head by head and by blocks of queries against all keys:
//   S = Q K^T, P = 2^(s - lse), divided by its own sum, dP = dO V^T, dS = P (dP - rowsum(P dP)),
//   dV += P^T dO, dK += dS^T Q, dQ = dS K, in fp32; each gradient is rounded once.
// P^T and dS^T are never transposed: their products broadcast A down its columns. With bf16 pairs
// two query rows are stored interleaved, [query pair][key][2], which is what those products read.
// dS also adds to the strips of the chunk; their sums become dbias_table in `reduce`.
#pragma once

#include "window_attention/window_attention_cpu_rows.h"

namespace vitkernels {
namespace {

constexpr int64_t kBackwardQueries = 32;  // at most

// Queries per block: even blocks, and an even number, so that no pair straddles two.
inline int64_t query_block(const WindowAttentionArgs& a) {
  return round_up(ceil_div(a.tokens(), ceil_div(a.tokens(), kBackwardQueries)), 2);
}

template <class Unit>
struct BackwardScratch {
  Unit *keys_t, *values_t, *keys, *queries, *douts;  // packed B operands
  Unit *query_rows, *dout_rows;                      // A operands that are gathered
  Unit *p_columns, *ds_columns, *ds_rows;            // A operands made here
  float *scores, *dprobs, *dkeys, *dvalues, *dqueries, *factors;
  float *partial_sums, *partial_dots, *inverse, *delta, *delta_rest;  // per row of a block
  float* strips;    // of the chunk's sum of dS, head by head
  double* dlogits;  // likewise
  int64_t score_stride, ds_stride, d_stride;

  BackwardScratch(const WindowAttentionArgs& a, Carver* carver) {
    const int64_t N = a.tokens(), rows = query_block(a), K = units_of<Unit>(a.D),
                  NU = units_of<Unit>(N), padded = round_up(N, kVec);
    score_stride = padded;
    ds_stride = round_up(NU, kVec);
    d_stride = round_up(a.D, kVec);
    keys_t = carver->take<Unit>(packed_units(K, N));
    values_t = carver->take<Unit>(packed_units(K, N));
    keys = carver->take<Unit>(packed_units(NU, a.D));
    queries = carver->take<Unit>(packed_units(NU, a.D));
    douts = carver->take<Unit>(packed_units(NU, a.D));
    query_rows = carver->take<Unit>(rows * round_up(K, kVec));
    dout_rows = carver->take<Unit>(rows * round_up(K, kVec));
    scores = carver->take(rows * score_stride);
    dprobs = carver->take(rows * score_stride);
    if constexpr (kElements<Unit> == 2) {
      p_columns = carver->take<Unit>(rows / 2 * score_stride);
      ds_columns = carver->take<Unit>(rows / 2 * score_stride);
      ds_rows = carver->take<Unit>(rows * ds_stride);
    } else {  // P and dS in fp32 overwrite the scores and dP
      ds_stride = score_stride;
      p_columns = reinterpret_cast<Unit*>(scores);
      ds_columns = ds_rows = reinterpret_cast<Unit*>(dprobs);
    }
    dkeys = carver->take(N * d_stride);
    dvalues = carver->take(N * d_stride);
    dqueries = carver->take(rows * d_stride);
    factors = carver->take(a.dropout ? rows * score_stride : 0);
    partial_sums = carver->take(round_up(rows, kVec) * kVec);
    partial_dots = carver->take(round_up(rows, kVec) * kVec);
    inverse = carver->take(round_up(rows, kVec));
    delta = carver->take(round_up(rows, kVec));
    delta_rest = carver->take(rows);
    strips = carver->take(a.dbias_table != nullptr ? a.heads * head_strips(a) : 0);
    dlogits = carver->take<double>(a.heads);
  }
};

VK_INLINE void add_to(float* sum, Vec x) { store(sum, load(sum) + x); }

template <class T>
struct WindowBackward {
  using Unit = typename UnitOf<T>::type;
  const WindowAttentionArgs& a;
  const bool want_dquery;
  Carver carver;
  HeadOperands<T> operands;
  const BackwardScratch<Unit> s;
  WindowTokens tokens, next;
  int64_t window = 0, h = 0;

  WindowBackward(const WindowAttentionArgs& args, void* memory)
      : a(args),
        want_dquery(args.dqkv != nullptr || args.dlogit_scale != nullptr),
        carver(memory),
        operands(args, &carver),
        s(args, &carver),
        tokens(args, &carver),
        next(args, &carver) {}

  int64_t scratch_bytes() const { return carver.bytes(); }

  void head() {
    const int64_t N = a.tokens(), K = units_of<Unit>(a.D), NU = units_of<Unit>(N),
                  block = query_block(a);
    const TokenRows<T> v = head_rows<T>(a, tokens, 2, h);
    const TokenRows<T> dout = {static_cast<const T*>(a.dout.data) + h * a.D, tokens.dout};
    operands.begin(tokens, h);
    operands.pack_keys_transposed(s.keys_t);
    pack_transposed<Unit>(v, N, a.D, s.values_t);
    if (want_dquery) operands.pack_keys(s.keys);
    if (a.dqkv != nullptr) {
      operands.pack_queries(s.queries);
      pack_rows<Unit>(dout, N, a.D, s.douts);
    }
    const ScoreTerms terms = operands.terms(tokens, h);
    prefetch_rows<false>(head_rows<T>(a, next, 0, h).data, next.qkv, 1, N, a.D, 3, a.heads * a.D);
    prefetch_rows<false>(dout.data, next.dout, 1, N, a.D, 1, 0);
    if (a.dqkv != nullptr)
      prefetch_rows<true>(gradient(0), tokens.places, 3 * a.heads * a.D, N, a.D, 3, a.heads * a.D);
    for (int64_t i0 = 0; i0 < N; i0 += block) {
      const int64_t rows = N - i0 < block ? N - i0 : block, R = units_of<Unit>(rows);
      const RowUnits<Unit> qr = operands.query_units(i0, rows, s.query_rows);
      const RowUnits<Unit> dr = copied_rows(dout.from(i0), rows, a.D, s.dout_rows);
      gemm<ALayout::kRowMajor>(rows, N, K, qr.data, qr.stride, s.keys_t, K, 0, s.scores,
                               s.score_stride, false);
      gemm<ALayout::kRowMajor>(rows, N, K, dr.data, dr.stride, s.values_t, K, 0, s.dprobs,
                               s.score_stride, false);
      with_constants(tokens.mixed, operands.scaled(), [&](auto mixed, auto scaled) {
        probabilities<mixed(), scaled()>(terms, i0, rows);
      });
      normalise(i0, rows);
      operands.scaled() ? gradients<true>(i0, rows) : gradients<false>(i0, rows);
      const int64_t i_unit = i0 / kElements<Unit>;
      if (a.dqkv != nullptr) {
        gemm<ALayout::kColMajor>(N, a.D, R, s.p_columns, s.score_stride, s.douts, NU, i_unit,
                                 s.dvalues, s.d_stride, i0 > 0);
        gemm<ALayout::kColMajor>(N, a.D, R, s.ds_columns, s.score_stride, s.queries, NU, i_unit,
                                 s.dkeys, s.d_stride, i0 > 0);
      }
      if (want_dquery) {
        gemm<ALayout::kRowMajor>(rows, a.D, NU, s.ds_rows, s.ds_stride, s.keys, NU, 0, s.dqueries,
                                 s.d_stride, false);
        store_gradient(0, operands.queries, i0, rows, s.dqueries, operands.query_lengths);
      }
    }
    if (a.dqkv == nullptr) return;
    store_gradient(1, operands.keys, 0, N, s.dkeys, operands.key_lengths);
    T* dv = gradient(2);
    for (int64_t i = 0; i < N; ++i)
      store_row(dv + tokens.places[i] * 3 * a.heads * a.D, s.dvalues + i * s.d_stride, a.D, 1.0f);
  }

  const float* lse() const { return a.lse + (window * a.heads + h) * a.tokens(); }

  float* factors(int64_t r) const { return a.dropout ? s.factors + r * s.score_stride : nullptr; }

  // Products become P, not yet normalised, with the lane-wise sums of P and P dP of each row.
  template <bool kMixed, bool kScaled>
  void probabilities(const ScoreTerms& terms, int64_t i0, int64_t rows) {
    const int64_t N = terms.N, columns = round_up(N, kVec);
    for (int64_t r = 0; r < rows; ++r) {
      float *scores = s.scores + r * s.score_stride, *dprobs = s.dprobs + r * s.score_stride;
      const ScoreRow<kMixed, kScaled> row(a, terms, scores, i0 + r);
      // P relative to lse; to 0 when it is not finite: rows with a NaN become NaN by their inverse,
      // which leaves masked keys recognisable as 0.
      const float lse_i = lse()[i0 + r];
      const bool finite = lse_i - lse_i == 0.0f;
      const Vec center = splat(finite ? static_cast<float>(lse_i * kLog2e) : 0.0f);
      float* kept = factors(r);
      if (a.dropout) dropout_row(a, window * a.heads + h, i0 + r, a.keep_scale, kept);
      Vec sum = {}, dot = {};
      const auto add = [&](int64_t j, Vec x) {
        const Vec p = exp2(x - center);
        Vec dp = load(dprobs + j);
        if (kept != nullptr) dp = dp * load(kept + j);
        sum = sum + p;
        dot = fma(p, dp, dot);
        store(scores + j, p);
      };
      if (lse_i == kInf) {
        for (int64_t j = 0; j < columns; j += kVec) store(scores + j, row.at(j));
        settle_infinite(scores, columns, splat(1.0f));
        for (int64_t j = 0; j < columns; j += kVec) add(j, load(scores + j));
      } else {
        for (int64_t j = 0; j < columns; j += kVec) add(j, row.at(j));
      }
      store(s.partial_sums + r * kVec, sum);
      store(s.partial_dots + r * kVec, dot);
    }
  }

  // What divides P by its sum, and rowsum(P dP) in two numbers. The sums lie next to 1, where the
  // roundings of quotients lean to one side: dS would not sum to 0 along rows, with one sign in all
  // of them, and that adds up over windows in dbias_table and dlogit_scale. The dS of a token that
  // attends to itself alone is 0 already.
  void normalise(int64_t i0, int64_t rows) {
    const auto add = [](Vec x, Vec y) { return x + y; };
    reduce_lanes(s.partial_sums, rows, s.inverse, add);
    reduce_lanes(s.partial_dots, rows, s.delta, add);
    for (int64_t r = 0; r < rows; ++r) {
      const float sum = lse()[i0 + r] == kInf ? 1.0f : s.inverse[r], dot = s.delta[r];
      s.inverse[r] = 1.0f / sum;
      s.delta[r] = dot * s.inverse[r];
      const float rest = __builtin_fmaf(-s.delta[r], sum, dot) * s.inverse[r];
      s.delta_rest[r] = rest - rest == 0.0f && !tokens.alone(i0 + r) ? rest : 0.0f;
    }
  }

  GradRow grad_row(int64_t r) const {
    return {s.scores + r * s.score_stride,
            s.dprobs + r * s.score_stride,
            factors(r),
            s.inverse[r],
            s.delta[r],
            s.delta_rest[r]};
  }

  // P and dS in the form that the products read, and dS into the strips. kScaled divides dS by
  // the length that the other operand of its product lacks: of the query for dK, of the key for dQ.
  template <bool kScaled>
  void gradients(int64_t i0, int64_t rows) {
    const int64_t columns = round_up(a.tokens(), kVec);
    constexpr int kStep = kElements<Unit>;
    for (int64_t r = 0; r < rows; r += kStep) {
      const bool pair = kStep == 2 && r + 1 < rows;
      const GradRow even = grad_row(r), odd = grad_row(pair ? r + 1 : r);
      float* strips = a.dbias_table == nullptr ? nullptr : s.strips + h * head_strips(a);
      float *even_sum = strips, *odd_sum = strips;
      if (strips != nullptr) {
        even_sum += strip_row(a, i0 + r);
        odd_sum += strip_row(a, pair ? i0 + r + 1 : i0 + r);
      }
      const Vec even_length = splat(kScaled ? operands.query_lengths[i0 + r] : 1.0f);
      const Vec odd_length = splat(kScaled && pair ? operands.query_lengths[i0 + r + 1] : 1.0f);
      for (int64_t j = 0; j < columns; j += kVec) {
        Vec p0, ds0, p1 = {}, ds1 = {};
        even.at(j, p0, ds0);
        if (pair) odd.at(j, p1, ds1);
        if (strips != nullptr) {
          add_to(even_sum + j, ds0);
          if (pair) add_to(odd_sum + j, ds1);
        }
        Vec to_keys0 = ds0, to_keys1 = ds1;
        if constexpr (kScaled) {
          const Vec key_length = load(operands.key_lengths + j);
          to_keys0 = ds0 * even_length, to_keys1 = ds1 * odd_length;
          ds0 = ds0 * key_length, ds1 = ds1 * key_length;
        }
        store_pair(r, j, pair, p0, p1, to_keys0, to_keys1, ds0, ds1);
      }
    }
  }

  VK_INLINE void store_pair(int64_t r, int64_t j, bool pair, Vec p0, Vec p1, Vec to_keys0,
                            Vec to_keys1, Vec ds0, Vec ds1) const {
#if defined(__AVX512BF16__)
    if constexpr (kElements<Unit> == 2) {
      const int64_t column = r / 2 * s.score_stride + j;
      _mm512_storeu_si512(s.p_columns + column, interleave_halves(round_to_bf16(p1, p0)));
      _mm512_storeu_si512(s.ds_columns + column,
                          interleave_halves(round_to_bf16(to_keys1, to_keys0)));
      const __m512i ds = round_to_bf16(ds1, ds0);
      Unit* rows = s.ds_rows + r * s.ds_stride + j / 2;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows), _mm512_castsi512_si256(ds));
      if (pair)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + s.ds_stride),
                            _mm512_extracti64x4_epi64(ds, 1));
      return;
    }
#endif
    (void)pair, (void)p1, (void)to_keys1, (void)ds1;
    const int64_t place = r * s.score_stride + j;
    store(reinterpret_cast<float*>(s.p_columns) + place, p0);
    store(reinterpret_cast<float*>(s.ds_columns) + place, to_keys0);
    store(reinterpret_cast<float*>(s.ds_rows) + place, ds0);
  }

  T* gradient(int64_t which) const { return static_cast<T*>(a.dqkv) + (which * a.heads + h) * a.D; }

  // dq or dk of rows [first, first + rows) from the product x; with cosines through the
  // normalisation of `row`, where the queries' also add to dlogit_scale.
  void store_gradient(int64_t which, const TokenRows<T>& row, int64_t first, int64_t rows, float* x,
                      const float* lengths) {
    const float factor = head_factors(a)[h];
    T* out = a.dqkv == nullptr ? nullptr : gradient(which);
    for (int64_t r = 0; r < rows; ++r, x += s.d_stride) {
      float scale = factor;
      if (operands.cosine) {
        const float dot = project(row(first + r), x, lengths[first + r], factor);
        if (which == 0) s.dlogits[h] += dot;
        scale = 1.0f;
      }
      if (a.dqkv != nullptr)
        store_row(out + tokens.places[first + r] * 3 * a.heads * a.D, x, a.D, scale);
    }
  }

  // x = the gradient of a vector for that of its unit vector, factor * x: (g - unit (unit . g)) /
  // length, 0 for a vector shorter than kShortest. Returns unit . g.
  float project(const T* vector, float* x, float inverse, float factor) const {
    Vec dots = {};
    for_each_vec(a.D,
                 [&](int64_t d, int n) { dots = fma(load_or(vector + d, n), load(x + d), dots); });
    const float dot = lane_sum(dots) * inverse * factor;
    const float length = inverse < 1.0f / kShortest ? inverse : 0.0f;
    const Vec along = splat(-dot * inverse), by = splat(factor), shorten = splat(length);
    for_each_vec(a.D, [&](int64_t d, int n) {
      const Vec g = load(x + d) * by;
      store(x + d, fma(load_or(vector + d, n), along, g) * shorten);
    });
    return dot;
  }
};

// Floats that each chunk leaves: the columns of dbias_table, then dlogit_scale.
inline int64_t partial_floats(const WindowAttentionArgs& a) {
  return a.heads * (a.table_rows() + 1);
}

template <class T>
void backward_items(const WindowAttentionArgs& a, int64_t begin, int64_t end, void* memory) {
  WindowBackward<T> backward(a, memory);
  const auto& s = backward.s;
  const int64_t groups = a.head_groups(), chunks = a.chunks(), windows = a.windows();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item / groups, group = item % groups;
    const int64_t first = group * a.heads / groups, last = (group + 1) * a.heads / groups;
    for (int64_t h = first; h < last; ++h) {
      s.dlogits[h] = 0.0;
      if (a.dbias_table != nullptr)
        std::memset(s.strips + h * head_strips(a), 0,
                    static_cast<size_t>(head_strips(a)) * sizeof(float));
    }
    for (int64_t w = chunk * windows / chunks; w < (chunk + 1) * windows / chunks; ++w) {
      if (w == chunk * windows / chunks) backward.next.begin(a, w);
      std::swap(backward.tokens, backward.next);
      backward.next.begin(a, w + 1 < windows ? w + 1 : w);
      backward.window = w;
      for (backward.h = first; backward.h < last; ++backward.h) backward.head();
    }
    float* partial = a.partials + chunk * partial_floats(a);
    for (int64_t h = first; h < last; ++h) {
      partial[a.heads * a.table_rows() + h] = static_cast<float>(s.dlogits[h]);
      if (a.dbias_table == nullptr) continue;
      float* column = partial + h * a.table_rows();
      std::memset(column, 0, static_cast<size_t>(a.table_rows()) * sizeof(float));
      add_strips(a, s.strips + h * head_strips(a), column);
    }
  }
}

// The sum of each chunk's x[i], in order.
inline float sum_of_chunks(const WindowAttentionArgs& a, int64_t i) {
  float sum = 0.0f;
  for (int64_t chunk = 0; chunk < a.chunks(); ++chunk)
    sum += a.partials[chunk * partial_floats(a) + i];
  return sum;
}

inline void reduce(const WindowAttentionArgs& a) {
  const int64_t rows = a.table_rows();
  if (a.dbias_table != nullptr)
    VK_SWITCH_FLOAT(a.bias_dtype, {
      scalar_t* out = static_cast<scalar_t*>(a.dbias_table);
      for (int64_t h = 0; h < a.heads; ++h)
        for (int64_t t = 0; t < rows; ++t)
          out[t * a.heads + h] = from_float<scalar_t>(sum_of_chunks(a, h * rows + t));
    });
  if (a.dlogit_scale != nullptr)
    VK_SWITCH_FLOAT(a.logit_dtype, {
      scalar_t* out = static_cast<scalar_t*>(a.dlogit_scale);
      for (int64_t h = 0; h < a.heads; ++h)
        out[h] = from_float<scalar_t>(
            logit_of(a, h) > kMaxLogitScale ? 0.0f : sum_of_chunks(a, a.heads * rows + h));
    });
}

}  // namespace
}  // namespace vitkernels
