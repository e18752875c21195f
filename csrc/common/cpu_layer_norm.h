// LayerNorm over rows, as the CPU kernels of add_layer_norm and patch_merge share it. Included by
// kernel files only, once per instruction set.
#pragma once

#include "common/cpu_vec.h"

namespace vitkernels {
namespace {

constexpr int kUnroll =
    4;  // independent accumulators of a row sum: hides the latency of the vector add
// Rows that go through a pass together: while one row's sum, division and square root are on their
// way, the next row's loads run (76 -> 57 ns a row at C = 384, bf16). Wide rows go alone, so that
// the buffers stay in the L1 cache.
constexpr int kRowBlock = 4;
constexpr int64_t kRowBlockElements = 4096;

// kBuffers fp32 buffers for each row of a block, of `size` floats: C and `slack`, rounded up.
// Aligned to a cache line: a vector store across two lines costs a tenth of the speed.
template <int kBuffers>
struct RowBuffers {
  explicit RowBuffers(int64_t C, int64_t slack = 0)
      : size((C + slack + kLine - 1) / kLine * kLine),
        rows(C * kRowBlock <= kRowBlockElements ? kRowBlock : 1),
        allocation(new float[kBuffers * rows * size + kLine]),
        memory(reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(allocation) + 63) &
                                        ~uintptr_t{63})) {}
  ~RowBuffers() { delete[] allocation; }
  RowBuffers(const RowBuffers&) = delete;
  RowBuffers& operator=(const RowBuffers&) = delete;
  float* at(int which, int i) { return memory + (which * rows + i) * size; }
  static constexpr int64_t kLine = 16;  // floats in a cache line
  int64_t size;
  int rows;
  float* allocation;
  float* memory;
};

template <class T>
VK_INLINE T* row_of(const RowsArg& arg, int64_t row) {
  return static_cast<T*>(arg.data) + row * arg.stride;
}

// Runs body(c, n, k) over the vectors of a row, k cycling through the accumulators.
template <class Body>
VK_INLINE void for_row(int64_t C, Body&& body) {
  int64_t c = 0;
  for (; c + kUnroll * kVec <= C; c += kUnroll * kVec)
    for (int k = 0; k < kUnroll; ++k) body(c + k * kVec, kVec, k);
  int k = 0;
  for (; c + kVec <= C; c += kVec, ++k) body(c, kVec, k);
  if (c < C) body(c, static_cast<int>(C - c), 0);
}

// What an accumulator takes in before it is emptied into a row's sum. Equal terms, as a padded
// pixel or a background has them, round the same way at every addition: over 5,000 of them the
// variance was off by 20 ulp.
constexpr int64_t kSumBlock = 1024;

struct Sums {
  Vec lane[kUnroll] = {};
  VK_INLINE float total() const { return reduce_add((lane[0] + lane[1]) + (lane[2] + lane[3])); }
};

// Lanes at and beyond n of a last, partial vector must not enter a sum.
VK_INLINE Vec first_n(Vec v, int n) {
  if (n == kVec) return v;
  float lanes[kVec];
  store(lanes, v);
  for (int i = n; i < kVec; ++i) lanes[i] = 0.0f;
  return load(lanes);
}

// ---- forward

// Lines that a later row will write: at 4 bytes an element the stores wait for them (225 -> 175 ns
// a row of 384 out of cache); at 2 bytes they do not.
template <class T>
VK_INLINE void prefetch_output(const T* p) {
  if (sizeof(T) == 4) __builtin_prefetch(p, 1);
}

VK_INLINE float reciprocal_std(const float* z, int64_t C, float mean, float eps) {
  const Vec centre = splat(mean);
  float total = 0.0f;
  for (int64_t begin = 0; begin < C; begin += kSumBlock) {
    Sums squares;
    for_row(C - begin < kSumBlock ? C - begin : kSumBlock, [&](int64_t c, int n, int k) {
      const Vec d = first_n(load(z + begin + c) - centre, n);
      squares.lane[k] = fma(d, d, squares.lane[k]);
    });
    total += squares.total();
  }
  return 1.0f / __builtin_sqrtf(total / static_cast<float>(C) + eps);
}

// y = (z - mean) * rstd * weight + bias; `ahead`: elements to the row that is written next but
// kRowBlock - 1.
template <class Y>
VK_INLINE void normalize_row(Y* y, int64_t ahead, int64_t C, const float* weight, const float* bias,
                             const float* z, float mean, float rstd) {
  const Vec centre = splat(mean), factor = splat(rstd);
  for_row(C, [=](int64_t c, int n, int) {
    const Vec xhat = (load(z + c) - centre) * factor;
    store_or(y + c, fma(xhat, load_or(weight + c, n), load_or(bias + c, n)), n);
    prefetch_output(y + ahead + c);
  });
}

// ---- backward

struct RowMeans {
  float wdy, wdy_xhat;  // mean(weight * dy) and mean(weight * dy * xhat)
};

// out[c] = sum of partials[i * C + c] over i, in order, for columns [begin, end).
[[maybe_unused]] void sum_partials(const float* partials, int64_t count, int64_t C, RowsArg out,
                                   int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += kVec) {
    const int n = end - c < kVec ? static_cast<int>(end - c) : kVec;
    Vec total{}, lost{};  // Kahan: the number of chunks does not show in the result
    for (int64_t i = 0; i < count; ++i) {
      const Vec term = load_or(partials + i * C + c, n) - lost;
      const Vec next = total + term;
      lost = (next - total) - term;
      total = next;
    }
    VK_SWITCH_FLOAT(out.dtype, store_or(static_cast<scalar_t*>(out.data) + c, total, n));
  }
}

}  // namespace
}  // namespace vitkernels
