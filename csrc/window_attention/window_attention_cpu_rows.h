// What the forward and the backward of CPU window attention share: where the tokens of a window
// lie, the position bias as strips, and the rows of scores.
//
// Strips: bias[i][j] of query (yi, xi) and key (yj, xj) depends on yj - yi and xj - xi. For each xi
// a strip holds the bias for all yj - yi, one row of Ww keys after the other; the bias row of query
// (yi, xi) over all N keys is the strip of xi from (Wh - 1 - yi) * Ww on. So a head needs
// Ww * (2 Wh - 1) * Ww floats, not N * N: 2.5 KB at 7x7, 108 KB instead of 1.3 MB at 24x24. The
// gradient of the table is summed in strips too.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "common/cpu_gemm.h"
#include "common/cpu_softmax.h"
#include "common/cpu_vec.h"
#include "common/philox.h"
#include "window_attention/window_attention_cpu.h"

namespace vitkernels {
namespace {

constexpr double kLn2 = 0.693147180559945309;
constexpr float kMaxLogitScale = 4.60517018598809137f;  // ln 100
constexpr float kShortest = 1e-12f;                     // of a vector in cosine attention

// Hands out aligned parts of a thread's scratch; of none at all to measure it.
struct Carver {
  uintptr_t begin, next;

  explicit Carver(void* memory) : begin(reinterpret_cast<uintptr_t>(memory)), next(begin) {}

  template <class T = float>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next);
    next += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return taken;
  }

  int64_t bytes() const { return static_cast<int64_t>(next - begin); }
};

// ---- strips

// Floats from one strip to the next: whole vectors may be read from any row of it.
inline int64_t strip_stride(const WindowAttentionArgs& a) { return (2 * a.Wh - 1) * a.Ww + kVec; }

inline int64_t head_strips(const WindowAttentionArgs& a) { return a.Ww * strip_stride(a); }

// Where query i's row begins in the strips of a head.
VK_INLINE int64_t strip_row(const WindowAttentionArgs& a, int64_t i) {
  const int64_t y = i / a.Ww, x = i % a.Ww;
  return x * strip_stride(a) + (a.Wh - 1 - y) * a.Ww;
}

// `shared`: the strips of every head (in units of 1 / log2 e, as exponents of 2), then the factor
// on the products of every head, then a column of the table.
inline int64_t shared_floats(const WindowAttentionArgs& a) {
  return a.heads * (head_strips(a) + 1) + a.table_rows();
}

inline float* head_factors(const WindowAttentionArgs& a) {
  return a.shared + a.heads * head_strips(a);
}

inline float logit_of(const WindowAttentionArgs& a, int64_t h) {
  float value = 0.0f;
  VK_SWITCH_FLOAT(a.logit_dtype,
                  value = to_float(static_cast<const scalar_t*>(a.logit_scale)[h * a.logit_step]));
  return value;
}

inline void prepare(const WindowAttentionArgs& a) {
  const int64_t rows = a.table_rows(), across = 2 * a.Ww - 1, stride = strip_stride(a);
  float *factors = head_factors(a), *column = factors + a.heads;
  std::memset(a.shared, 0, static_cast<size_t>(a.heads * head_strips(a)) * sizeof(float));
  for (int64_t h = 0; h < a.heads; ++h) {
    VK_SWITCH_FLOAT(a.bias_dtype, {
      const scalar_t* table = static_cast<const scalar_t*>(a.bias_table) + h * a.bias_head;
      for (int64_t t = 0; t < rows; ++t)  // backwards: then keys run forwards
        column[rows - 1 - t] = static_cast<float>(to_float(table[t * a.bias_row]) * kLog2e);
    });
    for (int64_t x = 0; x < a.Ww; ++x)
      for (int64_t y = 0; y < 2 * a.Wh - 1; ++y)
        std::memcpy(a.shared + h * head_strips(a) + x * stride + y * a.Ww,
                    column + y * across + a.Ww - 1 - x, static_cast<size_t>(a.Ww) * sizeof(float));
    double factor = a.scale;
    if (a.logit_scale != nullptr) {
      const float logit = logit_of(a, h);
      factor = std::exp(static_cast<double>(logit > kMaxLogitScale ? kMaxLogitScale : logit));
    }
    factors[h] = static_cast<float>(factor);
  }
}

// table[t] += the sum of what the strips of a head hold of row t, for a head's column.
inline void add_strips(const WindowAttentionArgs& a, const float* strips, float* column) {
  const int64_t across = 2 * a.Ww - 1;
  for (int64_t x = 0; x < a.Ww; ++x)
    for (int64_t y = 0; y < 2 * a.Wh - 1; ++y) {
      const float* keys = strips + x * strip_stride(a) + y * a.Ww;
      float* out = column + (2 * a.Wh - 2 - y) * across + x + a.Ww - 1;
      for (int64_t j = 0; j < a.Ww; ++j) out[-j] += keys[j];
    }
}

// ---- tokens

// The tokens of one window, row-major in it: elements from the beginning of a tensor.
struct WindowTokens {
  int64_t *places, *qkv, *dout;  // places: of the map's tokens, b * H * W + y * W + x
  int32_t* regions;              // whole vectors; tokens of equal regions attend to each other
  int64_t sizes[4];              // tokens of each region
  bool mixed;                    // the window has more than one region

  WindowTokens(const WindowAttentionArgs& a, Carver* carver)
      : places(carver->take<int64_t>(a.tokens())),
        qkv(carver->take<int64_t>(a.tokens())),
        dout(carver->take<int64_t>(a.tokens())),
        regions(carver->take<int32_t>(round_up(a.tokens(), kVec))),
        sizes{},
        mixed(false) {}

  void begin(const WindowAttentionArgs& a, int64_t window) {
    const int64_t across = a.W / a.Ww, b = window / a.map_windows();
    const int64_t wy = window % a.map_windows() / across, wx = window % across;
    const bool last_row = a.shift_h > 0 && (wy + 1) * a.Wh == a.H;
    const bool last_column = a.shift_w > 0 && wx + 1 == across;
    mixed = last_row || last_column;
    for (int64_t& size : sizes) size = 0;
    for (int64_t ty = 0, n = 0; ty < a.Wh; ++ty) {
      const int64_t y = source(wy * a.Wh + ty + a.shift_h, a.H);
      const int32_t below = last_row && ty >= a.Wh - a.shift_h ? 2 : 0;
      for (int64_t tx = 0; tx < a.Ww; ++tx, ++n) {
        const int64_t x = source(wx * a.Ww + tx + a.shift_w, a.W);
        places[n] = (b * a.H + y) * a.W + x;
        qkv[n] = b * a.qkv.batch + y * a.qkv.row + x * a.qkv.column;
        dout[n] = b * a.dout.batch + y * a.dout.row + x * a.dout.column;
        regions[n] = below + (last_column && tx >= a.Ww - a.shift_w ? 1 : 0);
        ++sizes[regions[n]];
      }
    }
  }

  // Whether a token attends to itself alone.
  bool alone(int64_t i) const { return sizes[regions[i]] == 1; }

  static int64_t source(int64_t rolled, int64_t size) {
    return rolled < size ? rolled : rolled - size;
  }
};

// Rows of a tensor at the tokens of a window, from the first'th on.
template <class T>
struct TokenRows {
  const T* data;
  const int64_t* offsets;

  VK_INLINE const T* operator()(int64_t r) const { return data + offsets[r]; }
  TokenRows from(int64_t first) const { return {data, offsets + first}; }
};

// q, k or v (which = 0, 1, 2) of a head.
template <class T>
TokenRows<T> head_rows(const WindowAttentionArgs& a, const WindowTokens& tokens, int64_t which,
                       int64_t h) {
  return {static_cast<const T*>(a.qkv.data) + (which * a.heads + h) * a.D, tokens.qkv};
}

// Asks for `parts` heads' rows, `part` elements apart, at tokens of a window that comes later: the
// rows of a window are many short runs, which no hardware prefetcher foresees.
template <bool kWrite, class T>
VK_INLINE void prefetch_rows(const T* data, const int64_t* offsets, int64_t scale, int64_t rows,
                             int64_t D, int64_t parts, int64_t part) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t p = 0; p < parts; ++p)
      for (int64_t d = 0; d < D; d += kLine)
        __builtin_prefetch(data + offsets[r] * scale + p * part + d, kWrite ? 1 : 0, 2);
}

// ---- cosines

VK_INLINE Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  Vec y;
  for (int i = 0; i < kVec; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

// out[r] = 1 / max(|row r|, kShortest), 0 up to whole vectors; squares: a vector for each of those.
template <class T>
void inverse_lengths(const TokenRows<T>& row, int64_t rows, int64_t D, float* squares, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    Vec sum = {};
    for_each_vec(D, [&](int64_t d, int n) {
      const Vec x = load_or(row(r) + d, n);
      sum = fma(x, x, sum);
    });
    store(squares + r * kVec, sum);
  }
  reduce_lanes(squares, rows, out, [](Vec x, Vec y) { return x + y; });
  for (int64_t r = 0; r < rows; r += kVec) {
    const Vec length = square_root(load(out + r)), least = splat(kShortest);
    store(out + r, splat(1.0f) / select(length < least, least, length));
  }
  fill_tail(out, rows, 0.0f);
}

// How the products of a head in a window become exponents of 2: s log2 e, s = factor * product +
// bias; kScaled divides the product by both lengths.
struct ScoreTerms {
  int64_t N;
  float factor;                 // times log2 e
  const float* strips;          // of the head
  const float *queries, *keys;  // inverse lengths
  const int32_t* regions;
};

// The queries and keys of a head as the products read them. With cosines in fp32 units that is unit
// vectors; bf16 pairs stay as they are, exact, and the scores are divided by the lengths.
template <class T>
struct HeadOperands {
  using Unit = typename UnitOf<T>::type;
  static constexpr bool kUnitVectors = kElements<Unit> == 1;

  const WindowAttentionArgs& a;
  const bool cosine;
  const int64_t stride;                       // of the unit vectors
  float *squares, *unit_queries, *unit_keys;  // scratch
  float *query_lengths, *key_lengths;         // inverse, with cosines
  TokenRows<T> queries{}, keys{};

  HeadOperands(const WindowAttentionArgs& args, Carver* carver)
      : a(args), cosine(args.logit_scale != nullptr), stride(round_up(args.D, kVec)) {
    const int64_t rows = cosine ? round_up(a.tokens(), kVec) : 0;
    squares = carver->take(rows * kVec);
    query_lengths = carver->take(rows);
    key_lengths = carver->take(rows);
    unit_queries = carver->take(kUnitVectors ? rows * stride : 0);
    unit_keys = carver->take(kUnitVectors ? rows * stride : 0);
  }

  void begin(const WindowTokens& tokens, int64_t h) {
    queries = head_rows<T>(a, tokens, 0, h), keys = head_rows<T>(a, tokens, 1, h);
    if (!cosine) return;
    inverse_lengths(queries, a.tokens(), a.D, squares, query_lengths);
    inverse_lengths(keys, a.tokens(), a.D, squares, key_lengths);
    if constexpr (kUnitVectors) {
      unit_vectors(queries, query_lengths, unit_queries);
      unit_vectors(keys, key_lengths, unit_keys);
    }
  }

  // The lengths that scores are divided by.
  bool scaled() const { return cosine && !kUnitVectors; }

  ScoreTerms terms(const WindowTokens& tokens, int64_t h) const {
    return {a.tokens(),
            static_cast<float>(head_factors(a)[h] * kLog2e),
            a.shared + h * head_strips(a),
            query_lengths,
            key_lengths,
            tokens.regions};
  }

  void pack_keys_transposed(Unit* packed) const {
    with_keys([&](const auto& rows) { pack_transposed<Unit>(rows, a.tokens(), a.D, packed); });
  }

  void pack_keys(Unit* packed) const {
    with_keys([&](const auto& rows) { pack_rows<Unit>(rows, a.tokens(), a.D, packed); });
  }

  void pack_queries(Unit* packed) const {
    if constexpr (kUnitVectors)
      if (cosine) return pack_rows<Unit>(unit_queries, stride, a.tokens(), a.D, packed);
    pack_rows<Unit>(queries, a.tokens(), a.D, packed);
  }

  RowUnits<Unit> query_units(int64_t first, int64_t rows, Unit* scratch) const {
    if constexpr (kUnitVectors)
      if (cosine) return {unit_queries + first * stride, stride};
    return copied_rows(queries.from(first), rows, a.D, scratch);
  }

 private:
  template <class Body>
  void with_keys(Body&& body) const {
    if constexpr (kUnitVectors)
      if (cosine) return body(EvenRows<float>{unit_keys, stride});
    body(keys);
  }

  void unit_vectors(const TokenRows<T>& row, const float* lengths, float* out) const {
    for (int64_t r = 0; r < a.tokens(); ++r) store_row(out + r * stride, row(r), a.D, lengths[r]);
  }
};

// ---- scores

// One query's row of those.
template <bool kMixed, bool kScaled>
struct ScoreRow {
  const ScoreTerms& terms;
  const float *products, *bias;
  Vec factor;
  int32_t region;

  VK_INLINE ScoreRow(const WindowAttentionArgs& a, const ScoreTerms& t, const float* row, int64_t i)
      : terms(t),
        products(row),
        bias(t.strips + strip_row(a, i)),
        factor(splat(kScaled ? t.factor * t.queries[i] : t.factor)),
        region(kMixed ? t.regions[i] : 0) {}

  // Keys [j, j + kVec); -inf for those behind a seam, and for lanes from N on.
  VK_INLINE Vec at(int64_t j) const {
    const Vec x = unmasked(j);
    if (j + kVec <= terms.N) return x;
    return select(lane_index() < static_cast<int32_t>(terms.N - j), x, splat(-kInf));
  }

  VK_INLINE Vec unmasked(int64_t j) const {
    Vec x = load(products + j);
    if constexpr (kScaled) x = x * load(terms.keys + j);
    x = fma(x, factor, load(bias + j));
    if constexpr (kMixed) x = select(load_mask(terms.regions + j) == region, x, splat(-kInf));
    return x;
  }
};

// Calls body with both as compile-time constants.
template <class Body>
VK_INLINE void with_constants(bool mixed, bool scaled, Body&& body) {
  const auto then = [&](auto is_mixed) {
    scaled ? body(is_mixed, std::true_type{}) : body(is_mixed, std::false_type{});
  };
  mixed ? then(std::true_type{}) : then(std::false_type{});
}

// factors[j] = kept where dropout keeps the probability of query i and key j of a (window, head).
VK_INLINE void dropout_row(const WindowAttentionArgs& a, int64_t window_head, int64_t i, float kept,
                           float* factors) {
  const int64_t N = a.tokens();
  dropout_factors({a.seed, a.threshold, kept}, static_cast<uint64_t>((window_head * N + i) * N), N,
                  factors);
  fill_tail(factors, N, 0.0f);
}

}  // namespace
}  // namespace vitkernels
