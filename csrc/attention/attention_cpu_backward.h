// Backward of CPU attention. A work item is one head (or the heads that add to one slice of dbias);
// inside it, blocks of keys (outer) and blocks of queries (inner):
//   S = Q K^T, P = 2^(log2 e (scale S + bias - lse)), dP = dO V^T, dS = P (dP - delta), delta =
//   rowsum(dO O) dV += P^T dO, dK += dS^T Q, dQ += dS K, in fp32; each gradient is rounded once.
// P^T and dS^T are never transposed: their products broadcast A down its columns. With bf16 pairs
// two query rows are stored interleaved, [query pair][key][2], which is what those products read.
// Up to 288 keys are one block of keys; its rows are whole, so P is normalised by its own sum and
// delta is rowsum(P dP): better than the rounded lse and out.
#pragma once

#include "attention/attention_cpu_rows.h"

namespace vitkernels {
namespace {

constexpr int64_t kBackwardQueries = 48;  // at most
constexpr int64_t kBackwardKeys = 288;

inline int64_t key_blocks(const AttentionArgs& a) { return ceil_div(a.Nk, kBackwardKeys); }

// Queries per block: even blocks, and an even number, so that no pair straddles two.
inline int64_t query_block(const AttentionArgs& a) {
  return round_up(ceil_div(a.Nq, ceil_div(a.Nq, kBackwardQueries)), 2);
}

// Keys per block: even blocks of whole vectors, the last one with the rest.
inline int64_t key_block(const AttentionArgs& a) {
  return round_up(ceil_div(a.Nk, key_blocks(a)), 16);
}

template <class Unit>
struct BackwardScratch {
  Unit *keys_t, *values_t, *keys, *queries, *douts;     // packed B operands
  Unit *query_rows, *dout_rows;                         // A operands that need widening
  Unit *p_columns, *ds_columns, *ds_rows;               // A operands made here
  float *scores, *dprobs, *dkeys, *dvalues, *dqueries;  // fp32
  float *delta, *lse, *factors, *terms, *dbias;
  float *partial_sums, *partial_dots, *inverse, *row_delta;  // per row of a block
  int64_t score_stride, ds_stride, d_stride, bytes;

  BackwardScratch(const AttentionArgs& a, void* memory) {
    const int64_t rows = kBackwardQueries, n = key_block(a), K = units_of<Unit>(a.D);
    const int64_t NK = units_of<Unit>(n), NQ = units_of<Unit>(a.Nq);
    char* p = static_cast<char*>(memory);
    const auto take = [&p](int64_t count) {
      char* taken = p;
      p += round_up(count * 4, 64);
      return taken;
    };
    const auto take_units = [&](int64_t count) { return reinterpret_cast<Unit*>(take(count)); };
    const auto take_floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count)); };
    score_stride = round_up(n, kVec);
    ds_stride = round_up(NK, kVec);
    d_stride = round_up(a.D, kVec);
    keys_t = take_units(packed_units(K, n));
    values_t = take_units(packed_units(K, n));
    keys = take_units(packed_units(NK, a.D));
    queries = take_units(packed_units(NQ, a.D));
    douts = take_units(packed_units(NQ, a.D));
    query_rows = take_units(rows * round_up(K, kVec));
    dout_rows = take_units(rows * round_up(K, kVec));
    scores = take_floats(rows * score_stride);
    dprobs = take_floats(rows * score_stride);
    if constexpr (kElements<Unit> == 2) {
      p_columns = take_units(rows / 2 * score_stride);
      ds_columns = take_units(rows / 2 * score_stride);
      ds_rows = take_units(rows * ds_stride);
    } else {  // P and dS in fp32 overwrite the scores and dP
      p_columns = reinterpret_cast<Unit*>(scores);
      ds_columns = ds_rows = reinterpret_cast<Unit*>(dprobs);
    }
    dkeys = take_floats(n * d_stride);
    dvalues = take_floats(n * d_stride);
    dqueries = take_floats((key_blocks(a) > 1 ? a.Nq : rows) * d_stride);
    delta = take_floats(a.Nq);
    lse = take_floats(a.Nq + kVec);
    factors = take_floats(a.dropout ? rows * score_stride : 0);
    terms = take_floats(ScoreTerms::scratch_floats(n));
    partial_sums = take_floats(rows * kVec);
    partial_dots = take_floats(rows * kVec);
    inverse = take_floats(rows);
    row_delta = take_floats(rows);
    dbias = take_floats(a.dbias != nullptr && a.chunks == 1 ? a.dbias_rows * a.dbias_columns : 0);
    bytes = p - static_cast<char*>(memory);
  }
};

// A row whose P and dS are made already.
struct StoredRow {
  const float *probs, *dscores;

  VK_INLINE void at(int64_t j, Vec& p, Vec& ds) const {
    p = load(probs + j);
    ds = load(dscores + j);
  }
};

inline void grad_row(const GradRow& row, int64_t n, float* p_out, float* ds_out) {
  for (int64_t j = 0; j < n; j += kVec) {
    Vec p, ds;
    row.at(j, p, ds);
    store(p_out + j, p);
    store(ds_out + j, ds);
  }
}

#if defined(__AVX512BF16__)
// Two query rows to bf16: [key][2] interleaved for the products over queries, and dS row by row for
// the product over keys.
template <class Row>
void round_row_pair(const Row& even, const Row& odd, bool has_odd, int64_t n, Bf16Pair* p_columns,
                    Bf16Pair* ds_columns, Bf16Pair* ds_even, Bf16Pair* ds_odd) {
  for (int64_t j = 0; j < n; j += kVec) {
    Vec p0, p1 = {}, ds0, ds1 = {};
    even.at(j, p0, ds0);
    if (has_odd) odd.at(j, p1, ds1);
    const __m512i p = round_to_bf16(p1, p0), ds = round_to_bf16(ds1, ds0);
    _mm512_storeu_si512(p_columns + j, interleave_halves(p));
    _mm512_storeu_si512(ds_columns + j, interleave_halves(ds));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_even + j / 2), _mm512_castsi512_si256(ds));
    if (has_odd)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_odd + j / 2),
                          _mm512_extracti64x4_epi64(ds, 1));
  }
}
#endif

// Adds one row of dS (keys [j0, j0 + n)) to its place in a slice of dbias, summing the dimensions
// the bias lacks.
inline void add_dbias_row(const AttentionArgs& a, const float* ds, int64_t i, int64_t j0, int64_t n,
                          float* slice) {
  float* out = slice + (a.dbias_rows == 1 ? 0 : i) * a.dbias_columns;
  if (a.dbias_columns == 1) {
    Vec sum = {};
    for_each_vec(n, [&](int64_t j, int m) { sum = sum + load_or(ds + j, m); });
    // Softmax does not see a term that all keys share: the sum of a finite row is 0 but for
    // rounding.
    const float total = lane_sum(sum);
    if (total - total != 0.0f) out[0] += total;
  } else {
    for_each_vec(n, [&](int64_t j, int m) {
      store_or(out + j0 + j, load_or(out + j0 + j, m) + load_or(ds + j, m), m);
    });
  }
}

template <class T>
float row_dot(const T* x, const T* y, int64_t D) {
  Vec sum = {};
  for_each_vec(D, [&](int64_t d, int n) { sum = fma(load_or(x + d, n), load_or(y + d, n), sum); });
  return lane_sum(sum);
}

// rowsum(dout * out), which is rowsum(P dP): an infinity in dout alone makes dP infinite with both
// signs, hence a NaN.
template <class T>
float row_delta(const T* dout, const T* out, int64_t D) {
  const float delta = row_dot(dout, out, D);
  const bool only_dout = delta - delta != 0.0f && row_dot(out, out, D) < kInf;
  return only_dout ? __builtin_nanf("") : delta;
}

template <class T>
struct HeadBackward {
  using Unit = typename UnitOf<T>::type;
  const AttentionArgs& a;
  const BackwardScratch<Unit> s;
  ScoreTerms terms;
  int64_t b = 0, h = 0;
  float* dbias = nullptr;  // fp32 slice that dS adds to, or null

  HeadBackward(const AttentionArgs& args, void* memory)
      : a(args), s(args, memory), terms(args, s.terms, key_block(args)) {}

  void run(int64_t head_index) {
    b = head_index / a.H, h = head_index % a.H;
    const int64_t K = units_of<Unit>(a.D), NQ = units_of<Unit>(a.Nq), n_block = key_block(a),
                  block = query_block(a);
    const T *q = head_of<const T>(a.q, b, h), *k = head_of<const T>(a.k, b, h),
            *v = head_of<const T>(a.v, b, h);
    const T *dout = head_of<const T>(a.dout, b, h), *out = head_of<const T>(a.out, b, h);
    if (a.dk.data != nullptr) pack_rows<Unit>(q, a.q.row, a.Nq, a.D, s.queries);
    if (a.dv.data != nullptr) pack_rows<Unit>(dout, a.dout.row, a.Nq, a.D, s.douts);
    const bool whole_rows = key_blocks(a) == 1;  // then rows make their own delta
    for (int64_t i = 0; i < a.Nq; ++i) {
      s.delta[i] = whole_rows ? 0.0f : row_delta(dout + i * a.dout.row, out + i * a.out.row, a.D);
      s.lse[i] = a.lse[head_index * a.Nq + i];
    }
    for (int64_t j0 = 0; j0 < a.Nk; j0 += n_block) {
      const int64_t n = a.Nk - j0 < n_block ? a.Nk - j0 : n_block;
      pack_transposed<Unit>(k + j0 * a.k.row, a.k.row, n, a.D, s.keys_t);
      pack_transposed<Unit>(v + j0 * a.v.row, a.v.row, n, a.D, s.values_t);
      if (a.dq.data != nullptr) pack_rows<Unit>(k + j0 * a.k.row, a.k.row, n, a.D, s.keys);
      terms.begin(b, h, j0, n);
      for (int64_t i0 = 0; i0 < a.Nq; i0 += block) {
        const int64_t rows = a.Nq - i0 < block ? a.Nq - i0 : block;
        const RowUnits<Unit> qr =
            row_units<Unit>(q + i0 * a.q.row, a.q.row, rows, a.D, s.query_rows);
        const RowUnits<Unit> dr =
            row_units<Unit>(dout + i0 * a.dout.row, a.dout.row, rows, a.D, s.dout_rows);
        gemm<ALayout::kRowMajor>(rows, n, K, qr.data, qr.stride, s.keys_t, K, 0, s.scores,
                                 s.score_stride, false);
        gemm<ALayout::kRowMajor>(rows, n, K, dr.data, dr.stride, s.values_t, K, 0, s.dprobs,
                                 s.score_stride, false);
        score_gradients(i0, rows, j0, n);
        const int64_t R = units_of<Unit>(rows), i_unit = i0 / kElements<Unit>;
        if (a.dv.data != nullptr)
          gemm<ALayout::kColMajor>(n, a.D, R, s.p_columns, s.score_stride, s.douts, NQ, i_unit,
                                   s.dvalues, s.d_stride, i0 > 0);
        if (a.dk.data != nullptr)
          gemm<ALayout::kColMajor>(n, a.D, R, s.ds_columns, s.score_stride, s.queries, NQ, i_unit,
                                   s.dkeys, s.d_stride, i0 > 0);
        if (a.dq.data != nullptr) query_gradients(i0, rows, j0, n);
      }
      store_rows(a.dv, j0, n, s.dvalues, 1.0f);
      store_rows(a.dk, j0, n, s.dkeys, a.scale);
    }
  }

  // P and dS of a block, from scores and dP, in the form the products read. Whole rows are
  // normalised by their own sums.
  void score_gradients(int64_t i0, int64_t rows, int64_t j0, int64_t n) {
    const bool whole = n == a.Nk;
    for (int64_t r = 0; r < rows; ++r) probabilities(i0 + r, r, j0, n, whole);
    if (whole) {
      const auto add = [](Vec x, Vec y) { return x + y; };
      reduce_lanes(s.partial_sums, rows, s.inverse, add);
      reduce_lanes(s.partial_dots, rows, s.row_delta, add);
      for (int64_t r = 0; r < rows; r += kVec) {
        const Vec sum = load(s.inverse + r), lse = load(s.lse + i0 + r), one = splat(1.0f);
        const Vec inverse = select(sum == Vec{}, sum,
                                   select(lse == splat(kInf), one, one / sum));  // 0: a masked row
        store(s.inverse + r, inverse);
        store(s.row_delta + r, load(s.row_delta + r) * inverse);
      }
    }
    for (int64_t r = 0; r < rows; ++r) gradients(i0, r, rows, j0, n);
  }

  // Scores of row r become P (when whole, not yet normalised, with the lane-wise sums of P and P
  // dP).
  void probabilities(int64_t i, int64_t r, int64_t j0, int64_t n, bool whole) {
    float *scores = s.scores + r * s.score_stride, *dprobs = s.dprobs + r * s.score_stride;
    const int64_t columns = round_up(n, kVec);
    const float lse = s.lse[i];
    const bool apply_terms = terms.active();
    if (apply_terms) {
      terms.begin_row(i);
      terms.apply(scores);
    }
    fill_tail(scores, n, -kInf);
    const float* factors = a.dropout ? s.factors + r * s.score_stride : nullptr;
    if (a.dropout)
      dropout_row(a, b * a.H + h, i, j0, n, a.keep_scale, s.factors + r * s.score_stride);
    // P = 2^((s - center) scale - low), center = lse in units of the scores; low is what its
    // rounding lost. 0 when lse is not finite: masked rows have scores of -inf only, and rows with
    // a NaN become NaN by their inverse, which leaves masked keys recognisable as 0.
    const float natural = apply_terms ? 1.0f : a.scale;
    const float center_of_lse = lse - lse == 0.0f ? lse / natural : 0.0f;
    const Vec scale = splat(static_cast<float>(natural * kLog2e)), center = splat(center_of_lse);
    if (lse == kInf) settle_infinite(scores, columns, scale);
    if (!whole) {
      const double lost =
          center_of_lse == 0.0f ? 0.0 : lse - static_cast<double>(center_of_lse) * natural;
      const Vec low = splat(static_cast<float>(lost * kLog2e));
      for (int64_t j = 0; j < columns; j += kVec)
        store(scores + j, exp2((load(scores + j) - center) * scale - low));
      s.inverse[r] = lse != lse ? lse : 1.0f;
      s.row_delta[r] = s.delta[i];
      return;
    }
    Vec sum = {}, dot = {};
    for (int64_t j = 0; j < columns; j += kVec) {
      const Vec p = exp2((load(scores + j) - center) * scale);
      Vec dp = load(dprobs + j);
      if (factors != nullptr) dp = dp * load(factors + j);
      sum = sum + p;
      dot = fma(p, dp, dot);
      store(scores + j, p);
    }
    store(s.partial_sums + r * kVec, sum);
    store(s.partial_dots + r * kVec, dot);
  }

  GradRow row(int64_t r) const {
    return {s.scores + r * s.score_stride, s.dprobs + r * s.score_stride,
            a.dropout ? s.factors + r * s.score_stride : nullptr, s.inverse[r], s.row_delta[r]};
  }

  void gradients(int64_t i0, int64_t r, int64_t rows, int64_t j0, int64_t n) {
    const int64_t columns = round_up(n, kVec);
    float *scores = s.scores + r * s.score_stride, *dprobs = s.dprobs + r * s.score_stride;
    if (dbias != nullptr || kElements<Unit> == 1) grad_row(row(r), columns, scores, dprobs);
    if (dbias != nullptr) add_dbias_row(a, dprobs, i0 + r, j0, n, dbias);
#if defined(__AVX512BF16__)
    if constexpr (kElements<Unit> == 2) {
      const bool odd = r % 2 == 1;
      if (!odd && r + 1 < rows) return;  // wait for the second row of the pair
      const int64_t even = odd ? r - 1 : r;
      Bf16Pair *p = s.p_columns + even / 2 * s.score_stride,
               *ds = s.ds_columns + even / 2 * s.score_stride;
      Bf16Pair *ds_even = s.ds_rows + even * s.ds_stride, *ds_odd = ds_even + s.ds_stride;
      if (dbias == nullptr) {
        round_row_pair(row(even), row(r), odd, columns, p, ds, ds_even, ds_odd);
      } else {
        const float *probs = s.scores + even * s.score_stride,
                    *dscores = s.dprobs + even * s.score_stride;
        round_row_pair(StoredRow{probs, dscores},
                       StoredRow{probs + s.score_stride, dscores + s.score_stride}, odd, columns, p,
                       ds, ds_even, ds_odd);
      }
    }
#endif
    (void)rows;
  }

  void query_gradients(int64_t i0, int64_t rows, int64_t j0, int64_t n) {
    const bool whole = key_blocks(a) == 1;
    float* dq = s.dqueries + (whole ? 0 : i0 * s.d_stride);
    const int64_t N = units_of<Unit>(n);
    gemm<ALayout::kRowMajor>(rows, a.D, N, s.ds_rows,
                             kElements<Unit> == 2 ? s.ds_stride : s.score_stride, s.keys, N, 0, dq,
                             s.d_stride, j0 > 0);
    if (j0 + n == a.Nk) store_rows(a.dq, i0, rows, dq, a.scale);
  }

  void store_rows(const HeadView& view, int64_t first, int64_t rows, const float* x, float factor) {
    if (view.data == nullptr) return;
    T* out = head_of<T>(view, b, h) + first * view.row;
    for (int64_t r = 0; r < rows; ++r)
      store_row(out + r * view.row, x + r * s.d_stride, a.D, factor);
  }
};

// dbias = the sum of `chunks` fp32 slices that lie one after the other, in order.
inline void store_dbias(const AttentionArgs& a, int64_t slice, const float* partials,
                        int64_t chunks) {
  const int64_t size = a.dbias_rows * a.dbias_columns;
  VK_SWITCH_FLOAT(a.dbias_dtype, {
    scalar_t* out = static_cast<scalar_t*>(a.dbias) + slice * size;
    for_each_vec(size, [&](int64_t c, int n) {
      Vec sum = load_or(partials + c, n);
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        sum = sum + load_or(partials + chunk * size + c, n);
      store_or(out + c, sum, n);
    });
  });
}

template <class T>
void backward_items(const AttentionArgs& a, int64_t begin, int64_t end, void* memory) {
  HeadBackward<T> head(a, memory);
  if (a.dbias == nullptr) {
    for (int64_t item = begin; item < end; ++item) head.run(item);
    return;
  }
  const int64_t size = a.dbias_rows * a.dbias_columns, slice_heads = a.sum_head ? 1 : a.H;
  const int64_t members = (a.sum_batch ? a.B : 1) * (a.sum_head ? a.H : 1);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t slice = item / a.chunks, chunk = item % a.chunks;
    head.dbias = a.chunks == 1 ? head.s.dbias : a.dbias_partial + item * size;
    std::memset(head.dbias, 0, static_cast<size_t>(size) * sizeof(float));
    for (int64_t m = chunk * members / a.chunks; m < (chunk + 1) * members / a.chunks; ++m) {
      const int64_t b = !a.sum_batch ? slice / slice_heads : a.sum_head ? m / a.H : m;
      const int64_t h = a.sum_head ? m % a.H : slice % slice_heads;
      head.run(b * a.H + h);
    }
    if (a.chunks == 1) store_dbias(a, slice, head.dbias, 1);
  }
}

}  // namespace
}  // namespace vitkernels
