// Rows of scores and probabilities on the CPU: what the operators with a softmax between two
// products share.
#pragma once

#include "common/cpu_gemm.h"
#include "common/cpu_vec.h"

namespace vitkernels {
namespace {

constexpr double kLog2e = 1.44269504088896341;
constexpr float kInf = __builtin_inff();

// The larger of two; a NaN may get lost (the softmax finds it again in the sum).
VK_INLINE Vec max_of_numbers(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return select(a > b, a, b);
#endif
}

VK_INLINE float lane_sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  return reduce_add(v);
#endif
}

// The natural logarithm of positive normal numbers within 1 ulp (Cephes' logf).
VK_INLINE Vec log(Vec x) {
  const IVec bits =
      reinterpret_cast<IVec>(reinterpret_cast<UVec>(x) - 0x3f3504f3u);  // from sqrt(1/2)
  const IVec exponent = bits >> 23;
  const Vec r = as_float((bits & 0x007fffff) + 0x3f3504f3) - splat(1.0f);
  const Vec e = __builtin_convertvector(exponent, Vec), square = r * r;
  Vec p = splat(7.0376836292e-2f);
  p = fma(p, r, splat(-1.1514610310e-1f));
  p = fma(p, r, splat(1.1676998740e-1f));
  p = fma(p, r, splat(-1.2420140846e-1f));
  p = fma(p, r, splat(1.4249322787e-1f));
  p = fma(p, r, splat(-1.6668057665e-1f));
  p = fma(p, r, splat(2.0000714765e-1f));
  p = fma(p, r, splat(-2.4999993993e-1f));
  p = fma(p, r, splat(3.3333331174e-1f));
  p = p * r * square;
  p = fma(e, splat(-2.12194440e-4f), p);
  p = fma(square, splat(-0.5f), p);
  return fma(e, splat(0.693359375f), r + p);
}

// Horizontal reductions of many rows at once: partials[r] is a vector per row, out[r] its
// reduction. Both hold whole groups of kVec rows; transposing a group costs less than a shuffle
// tree per row and does not wait for one.
template <class Combine>
VK_INLINE void reduce_lanes(const float* partials, int64_t rows, float* out, Combine combine) {
  for (int64_t r = 0; r < rows; r += kVec) {
    Vec group[kVec];
#pragma GCC unroll 16
    for (int i = 0; i < kVec; ++i) group[i] = load(partials + (r + i) * kVec);
    transpose_step<kVec / 2>(group);
#pragma GCC unroll 4
    for (int width = kVec / 2; width > 0; width /= 2)
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) group[i] = combine(group[i], group[i + width]);
    store(out + r, group[0]);
  }
}

VK_INLINE IVec load_mask(const int32_t* p) {
  IVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

VK_INLINE IVec lane_index() {
  IVec lanes = {};
#pragma GCC unroll 16
  for (int i = 0; i < kVec; ++i) lanes[i] = i;
  return lanes;
}

// Sets the lanes from n to the end of n's last vector, by whole vectors: a vector load after scalar
// stores would stall.
VK_INLINE void fill_tail(float* row, int64_t n, float value) {
  const int64_t last = n / kVec * kVec;
  if (last < n)
    store(row + last,
          select(lane_index() < static_cast<int32_t>(n - last), load(row + last), splat(value)));
}

// out[d] = T(x[d] * factor) for d < D.
template <class T, class X>
VK_INLINE void store_row(T* out, const X* x, int64_t D, float factor) {
  const Vec f = splat(factor);
  for_each_vec(D, [&](int64_t d, int n) { store_or(out + d, load_or(x + d, n) * f, n); });
}

#if defined(__AVX512BF16__)
VK_INLINE __m512i round_to_bf16(Vec high, Vec low) {  // 32 bf16: low's lanes, then high's
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
}

// [0..15 | 16..31] -> 0, 16, 1, 17, ...: two rows side by side become pairs of a column.
VK_INLINE __m512i interleave_halves(__m512i x) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, x);
}
#endif

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

// p = power(v) over the vectors of a row, times the dropout factors where there are some; P is
// rounded to bf16 when units are pairs. Returns the lane-wise sum before dropout and rounding.
template <class Unit, class Power>
VK_INLINE Vec row_probabilities(int64_t vecs, const float* factors, Unit* out, Power&& power) {
  Vec sum[2] = {Vec{}, Vec{}};
  const auto probability = [&](int64_t v, Vec& total) {
    const Vec p = power(v);
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

VK_INLINE Vec zero_where_zero(Vec test, Vec x) {
#if defined(__AVX512F__)
  const __mmask16 keep =
      _mm512_cmp_ps_mask(reinterpret_cast<__m512>(test), _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return reinterpret_cast<Vec>(_mm512_maskz_mov_ps(keep, reinterpret_cast<__m512>(x)));
#else
  return as_float(as_int(x) & (test != Vec{}));
#endif
}

// The row of an lse of +inf: +inf becomes NaN (inf - inf), -inf stays masked, and finite scores
// get the least P that is not 0, because their dS is 0 * NaN and not that of a masked key.
inline void settle_infinite(float* scores, int64_t columns, Vec scale) {
  const Vec nan = splat(__builtin_nanf("")), masked = splat(-kInf), least = splat(-125.0f) / scale;
  for (int64_t j = 0; j < columns; j += kVec) {
    const Vec x = load(scores + j);
    store(scores + j, select(x == masked, masked, select(x < splat(kInf), least, nan)));
  }
}

// One row of P and dP, turned into normalised P and dS vector by vector.
struct GradRow {
  const float *probs, *dprobs, *factors;  // factors: dropout, or null
  float inverse, delta;                   // P is probs * inverse
  float delta_rest = 0.0f;                // what delta's rounding left out

  VK_INLINE void at(int64_t j, Vec& p, Vec& ds) const {
    const Vec unscaled = load(probs + j);
    p = unscaled * splat(inverse);
    Vec dp = load(dprobs + j);
    if (factors != nullptr) dp = dp * load(factors + j);
    ds = zero_where_zero(
        unscaled,
        p * ((dp - splat(delta)) -
             splat(delta_rest)));  // a masked key has no gradient even if dP is not finite
    if (factors != nullptr) p = p * load(factors + j);
  }
};

}  // namespace
}  // namespace vitkernels
