// The vector layer of the CPU kernels: one float vector `Vec` of the widest width of the level, and
// what kernels do with it.
//
// Compiled once per instruction set (VK_ISA); everything sits in an anonymous namespace so that no
// symbol of one level can be picked by the linker for another. `Vec` is a GCC/Clang vector type: +
// - * / and comparisons are the language's own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#pragma GCC diagnostic push  // GCC 12 calls its own _mm512_undefined_ps() uninitialized
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common/dtype.h"

#define VK_INLINE [[maybe_unused]] inline __attribute__((always_inline))

namespace vitkernels {
namespace {

#if defined(__AVX512F__)
constexpr int kVec = 16;
#elif defined(__AVX2__)
constexpr int kVec = 8;
#else
constexpr int kVec = 4;
#endif

typedef float Vec __attribute__((vector_size(kVec * 4), may_alias));
typedef int32_t IVec __attribute__((vector_size(kVec * 4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(kVec * 4), may_alias));
typedef uint16_t HVec __attribute__((vector_size(kVec * 2), may_alias));

VK_INLINE Vec splat(float x) { return x - Vec{}; }
VK_INLINE IVec as_int(Vec x) { return reinterpret_cast<IVec>(x); }
VK_INLINE Vec as_float(IVec x) { return reinterpret_cast<Vec>(x); }

// mask lanes are 0 or -1, as vector comparisons give them.
VK_INLINE Vec select(IVec mask, Vec yes, Vec no) { return mask ? yes : no; }

// ---- scalar conversions (tails, portable level)
VK_INLINE float to_float(float x) { return x; }

VK_INLINE float to_float(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

VK_INLINE float to_float(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u,
                 mantissa = x.bits & 0x3ffu;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // zero or denormal: mantissa * 2^-24 is exact in fp32
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <class T>
T from_float(float x);

template <>
VK_INLINE float from_float<float>(float x) {
  return x;
}

template <>
VK_INLINE BF16 from_float<BF16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
VK_INLINE F16 from_float<F16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u)
    return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to or above 65520
  if (bits <
      0x38800000u) {  // half denormal: adding 0.5 lines the mantissa up and rounds to nearest even
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  return {
      static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13))};
}

// ---- loads and stores; the `_n` forms touch n < kVec elements only, and zero the other lanes
VK_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

VK_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

VK_INLINE Vec load(const BF16* p) {
#if defined(__AVX512F__)  // GCC splits the generic conversion into halves
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#elif defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
#else
  HVec h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<Vec>(__builtin_convertvector(h, UVec) << 16);
#endif
}

VK_INLINE void store(BF16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(p, &h, sizeof h);
#else
  const UVec bits = reinterpret_cast<UVec>(v);
  const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UVec quiet = (bits >> 16) | 0x40u;
  const UVec nan = reinterpret_cast<UVec>(v != v);
  const HVec h = __builtin_convertvector((nan & quiet) | (~nan & rounded), HVec);
  std::memcpy(p, &h, sizeof h);
#endif
}

VK_INLINE Vec load(const F16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Vec>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v;
  for (int i = 0; i < kVec; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

VK_INLINE void store(F16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  for (int i = 0; i < kVec; ++i) p[i] = from_float<F16>(v[i]);
#endif
}

template <class T>
VK_INLINE Vec load_n(const T* p, int n) {
  T lanes[kVec] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

template <class T>
VK_INLINE void store_n(T* p, Vec v, int n) {
  T lanes[kVec];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

#if defined(__AVX512F__)
VK_INLINE Vec load_n(const float* p, int n) {
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
}
VK_INLINE void store_n(float* p, Vec v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
}
VK_INLINE Vec load_n(const BF16* p, int n) {
  const __m256i h = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
VK_INLINE Vec load_n(const F16* p, int n) {
  return reinterpret_cast<Vec>(
      _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p)));
}
template <class T>
VK_INLINE void store_n_16bit(T* p, Vec v, int n) {
  __m256i h;
  store(reinterpret_cast<T*>(&h), v);
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), h);
}
VK_INLINE void store_n(BF16* p, Vec v, int n) { store_n_16bit(p, v, n); }
VK_INLINE void store_n(F16* p, Vec v, int n) { store_n_16bit(p, v, n); }
#endif

// Calls body(c, n) over [0, C): full vectors with n = kVec, then once with the rest. The body is
// inlined twice, so that load_or(p, n) folds into a plain load in the first.
template <class Body>
VK_INLINE void for_each_vec(int64_t C, Body&& body) {
  int64_t c = 0;
  for (; c + kVec <= C; c += kVec) body(c, kVec);
  if (c < C) body(c, static_cast<int>(C - c));
}

template <class T>
VK_INLINE Vec load_or(const T* p, int n) {
  return n == kVec ? load(p) : load_n(p, n);
}

template <class T>
VK_INLINE void store_or(T* p, Vec v, int n) {
  if (n == kVec) {
    store(p, v);
  } else {
    store_n(p, v, n);
  }
}

// Stores v rounded to T, and returns what reads back.
template <class T>
VK_INLINE Vec store_rounded(T* p, Vec v, int n) {
  T lanes[kVec];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

template <>
VK_INLINE Vec store_rounded<float>(float* p, Vec v, int n) {
  store_or(p, v, n);
  return v;
}

#if defined(__AVX512BF16__)
template <>
VK_INLINE Vec store_rounded<BF16>(BF16* p, Vec v, int n) {
  const __m256i h = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), h);
  return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
#endif

// ---- arithmetic
VK_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vec>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;  // contracted to fused multiply-add where the portable level has one (aarch64)
#endif
}

// NaN in `a` is kept; NaN in `b` is kept too (a > b is false then).
VK_INLINE Vec max(Vec a, Vec b) { return select((a > b) | (a != a), a, b); }

VK_INLINE float reduce_add(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float lanes[kVec];
  store(lanes, v);
  for (int width = kVec / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

VK_INLINE float reduce_max(Vec v) {
  float lanes[kVec];
  store(lanes, v);
  for (int width = kVec / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      lanes[i] =
          (lanes[i] > lanes[i + width]) || (lanes[i] != lanes[i]) ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// e^x within 1 ulp for x in [-87.3, 88.7]; 0 below (no denormals), inf above, NaN stays.
VK_INLINE Vec exp(Vec x) {
  constexpr float kLog2e = 1.44269504088896341f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  const Vec clamped = select(x > splat(88.7228394f), splat(88.7228394f),
                             select(x < splat(-87.3365f), splat(-87.3365f), x));
  const Vec shifted =
      fma(clamped, splat(kLog2e), splat(12582912.0f));  // round to nearest by the 1.5 * 2^23 trick
  const Vec n = shifted - splat(12582912.0f);
  Vec r = fma(n, splat(-kLn2Hi), clamped);
  r = fma(n, splat(-kLn2Lo), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  // n = 128 does not fit an exponent: scale in two steps, 2^(n/2) twice.
  const IVec exponent = as_int(shifted) - as_int(splat(12582912.0f));
  const IVec half = exponent >> 1;
  const Vec scale1 = as_float((half + 127) << 23), scale2 = as_float((exponent - half + 127) << 23);
  const Vec y = p * scale1 * scale2;
  const Vec finite = select(x < splat(-87.3365f), Vec{},
                            select(x > splat(88.7228394f), splat(__builtin_inff()), y));
  return select(x != x, x, finite);
}

// 2^x for x <= 127 from `power(r)`, which is 2^r on [0, 1]; 0 for -inf and below the normal range,
// NaN stays.
template <class Power>
VK_INLINE Vec exp2_by(Vec x, Power&& power) {
#if defined(__AVX512F__)
  const __m512 value = reinterpret_cast<__m512>(x);
  const Vec p = power(reinterpret_cast<Vec>(_mm512_reduce_ps(value, 1)));  // x - floor(x)
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), value));
#else
  const Vec low = splat(-127.0f), high = splat(127.5f),
            magic = splat(12582912.0f);  // 1.5 * 2^23 rounds to nearest
  const Vec clamped = select(x < low, low, select(x > high, high, x));
  const Vec shifted = (clamped - splat(0.5f)) + magic;
  const IVec exponent = as_int(shifted) - as_int(magic);
  const Vec y = power(clamped - (shifted - magic)) * as_float((exponent + 127) << 23);
  return select(x < splat(-126.0f), Vec{}, y);
#endif
}

// 2^(x - kDown) for x <= 127, within 1 ulp.
template <int kDown = 0>
VK_INLINE Vec exp2(Vec x) {
  constexpr float kUnit = 1.0f / static_cast<float>(1 << kDown);  // exact in every coefficient
  return exp2_by(x, [](Vec r) {
    Vec p = splat(kUnit * 2.170225489e-4f);  // minimax on [0, 1], relative error 2e-9
    p = fma(p, r, splat(kUnit * 1.243968727e-3f));
    p = fma(p, r, splat(kUnit * 9.678840637e-3f));
    p = fma(p, r, splat(kUnit * 5.548334122e-2f));
    p = fma(p, r, splat(kUnit * 2.402298301e-1f));
    p = fma(p, r, splat(kUnit * 6.931470037e-1f));
    return fma(p, r, splat(kUnit));
  });
}

// For what is rounded to 16 bits: relative error 3e-6.
VK_INLINE Vec exp2_short(Vec x) {
  return exp2_by(x, [](Vec r) {
    const Vec square = r * r;  // Estrin's scheme: for users whom latency bounds
    const Vec low = fma(r, splat(6.930038333e-1f), splat(1.000002623f));
    const Vec high = fma(r, splat(5.201146379e-2f), splat(2.414427549e-1f));
    return fma(square, fma(square, splat(1.353416778e-2f), high), low);
  });
}

}  // namespace
}  // namespace vitkernels
