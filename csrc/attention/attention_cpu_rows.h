// What the forward and the backward of CPU attention share: the scores' additive terms and masks,
// row helpers.
#pragma once

#include "attention/attention_cpu.h"
#include "common/cpu_gemm.h"
#include "common/cpu_vec.h"
#include "common/philox.h"

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

template <class T>
VK_INLINE T* head_of(const HeadView& view, int64_t b, int64_t h) {
  return static_cast<T*>(view.data) + b * view.batch + h * view.head;
}

// dst[j] = src[j * stride] for j < n, as fp32.
template <class T>
void widen_row(const T* src, int64_t stride, int64_t n, float* dst) {
  if (stride == 1) {
    for_each_vec(n, [&](int64_t j, int m) { store_or(dst + j, load_or(src + j, m), m); });
  } else {
    for (int64_t j = 0; j < n; ++j) dst[j] = to_float(src[j * stride]);
  }
}

// out[d] = T(x[d] * factor) for d < D; x is padded to whole vectors.
template <class T>
VK_INLINE void store_row(T* out, const float* x, int64_t D, float factor) {
  const Vec f = splat(factor);
  for_each_vec(D, [&](int64_t d, int n) { store_or(out + d, load(x + d) * f, n); });
}

// Bias, masks and scale of the scores of one head, for the keys [j0, j0 + n): rows of fp32 terms to
// add and of lanes to keep, made once per head when the bias is the same for all queries, else once
// per query.
struct ScoreTerms {
  const AttentionArgs& args;
  float* add;        // n floats, whole vectors
  int32_t* keep;     // n lanes, 0 or -1
  int32_t* padding;  // n lanes of the key padding mask
  const char* bias = nullptr;
  int64_t j0 = 0, n = 0;
  bool has_add = false, has_keep = false;

  static int64_t scratch_floats(int64_t keys) { return 3 * round_up(keys, kVec); }

  ScoreTerms(const AttentionArgs& a, float* scratch, int64_t keys)
      : args(a),
        add(scratch),
        keep(reinterpret_cast<int32_t*>(scratch + round_up(keys, kVec))),
        padding(reinterpret_cast<int32_t*>(scratch + 2 * round_up(keys, kVec))) {}

  // Scores need a pass of their own: something is added or masked, or the scale does not commute
  // with the maximum, or lse / scale could overflow.
  bool active() const { return has_add || has_keep || !(args.scale > 1e-6f && args.scale < 1e6f); }

  void begin(int64_t b, int64_t h, int64_t first, int64_t count) {
    j0 = first, n = count;
    const bool has_bias = args.bias.data != nullptr;
    has_add = has_bias && args.bias.dtype != DType::kBool;
    has_keep = args.padding != nullptr || (has_bias && !has_add);
    if (args.padding != nullptr) {
      const uint8_t* row = args.padding + b * args.padding_batch + j0 * args.padding_column;
      for (int64_t j = 0; j < n; ++j) keep[j] = padding[j] = row[j * args.padding_column] ? 0 : -1;
    }
    if (has_bias) {
      bias = static_cast<const char*>(args.bias.data) +
             (b * args.bias.batch + h * args.bias.head) * size_of(args.bias.dtype);
      if (args.bias.row == 0) read_bias(0);
    }
  }

  void begin_row(int64_t i) {
    if (bias != nullptr && args.bias.row != 0) read_bias(i);
  }

  void read_bias(int64_t i) {
    const int64_t step = args.bias.column;
    const char* row = bias + (i * args.bias.row + j0 * step) * size_of(args.bias.dtype);
    if (args.bias.dtype == DType::kBool) {
      const uint8_t* attend = reinterpret_cast<const uint8_t*>(row);
      for (int64_t j = 0; j < n; ++j) keep[j] = attend[j * step] ? -1 : 0;
      if (args.padding != nullptr)
        for (int64_t j = 0; j < n; ++j) keep[j] &= padding[j];
    } else {
      VK_SWITCH_FLOAT(args.bias.dtype,
                      widen_row(reinterpret_cast<const scalar_t*>(row), step, n, add));
    }
  }

  // scores * scale + bias where kept, -inf elsewhere.
  void apply(float* scores) const {
    const Vec scale = splat(args.scale), masked = splat(-kInf);
    for (int64_t j = 0; j < n; j += kVec) {
      Vec x = load(scores + j) * scale;
      if (has_add) x = x + load(add + j);
      if (has_keep) x = select(load_mask(keep + j), x, masked);
      store(scores + j, x);
    }
  }
};

// Sets the lanes from n to the end of n's last vector, by whole vectors: a vector load after scalar
// stores would stall.
VK_INLINE void fill_tail(float* row, int64_t n, float value) {
  const int64_t last = n / kVec * kVec;
  if (last < n)
    store(row + last,
          select(lane_index() < static_cast<int32_t>(n - last), load(row + last), splat(value)));
}

// factors[j] = kept where dropout keeps the probability of key j0 + j, 0 where it drops it.
VK_INLINE void dropout_row(const AttentionArgs& a, int64_t head, int64_t i, int64_t j0, int64_t n,
                           float kept, float* factors) {
  const Dropout dropout{a.seed, a.threshold, kept};
  dropout_factors(dropout, static_cast<uint64_t>((head * a.Nq + i) * a.Nk + j0), n, factors);
  fill_tail(factors, n, 0.0f);
}

#if defined(__AVX512BF16__)
VK_INLINE __m512i round_to_bf16(Vec high, Vec low) {  // 32 bf16: low's lanes, then high's
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
}
#endif

}  // namespace
}  // namespace vitkernels
