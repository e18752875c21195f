// What the forward and the backward of CPU attention share: the scores' additive terms and masks,
// dropout.
#pragma once

#include "attention/attention_cpu.h"
#include "common/cpu_gemm.h"
#include "common/cpu_softmax.h"
#include "common/cpu_vec.h"
#include "common/philox.h"

namespace vitkernels {
namespace {

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

// factors[j] = kept where dropout keeps the probability of key j0 + j, 0 where it drops it.
VK_INLINE void dropout_row(const AttentionArgs& a, int64_t head, int64_t i, int64_t j0, int64_t n,
                           float kept, float* factors) {
  const Dropout dropout{a.seed, a.threshold, kept};
  dropout_factors(dropout, static_cast<uint64_t>((head * a.Nq + i) * a.Nk + j0), n, factors);
  fill_tail(factors, n, 0.0f);
}

}  // namespace
}  // namespace vitkernels
