// What the CPU launchers of add_layer_norm and patch_merge share: parameters as fp32, statistics,
// and weight gradients summed over fixed chunks of rows.
#pragma once

#include <algorithm>

#include "common/cpu_vec.h"
#include "common/stable.h"

namespace vitkernels {
namespace {

constexpr int64_t kForwardGrain = 1 << 15;  // elements a thread should have at least
constexpr int64_t kChunkRows = 32;          // rows whose weight gradients are summed together...
constexpr int64_t kMaxChunks = 256;         // ...unless that makes more partial sums than this

inline int64_t rows_per_thread(int64_t C) { return std::max<int64_t>(1, kForwardGrain / C); }

inline RowsArg arg(const Rows& rows) {
  return {const_cast<void*>(rows.data), rows.stride, rows.dtype};
}

inline RowsArg output(const Tensor& t, int64_t C, const char* op) {
  return {t.mutable_data_ptr(), C, dtype_of(t, op, "output")};
}

inline RowsArg absent(DType dtype = DType::kF32) { return {nullptr, 0, dtype}; }

struct FloatParameter {
  OptTensor tensor;
  std::vector<float> values;
};

// A parameter of C values as contiguous fp32, or null. A few hundred values are converted here
// faster than a dispatcher call; `owner` keeps what the pointer needs alive.
inline const float* as_float(const OptTensor& t, int64_t C, const char* op, const char* name,
                             FloatParameter* owner) {
  if (!t.has_value()) return nullptr;
  VK_CHECK(t->numel() == C, op, name, " must have ", C, " elements, got ", t->numel());
  VK_CHECK(t->dim() == 1, op, name, " must have one dimension, got ", t->dim());
  const bool dense = C <= 1 || t->stride(0) == 1;
  owner->tensor = dense ? *t : torch::stable::contiguous(*t);
  const void* data = owner->tensor->const_data_ptr();
  if (t->scalar_type() == ScalarType::Float) return static_cast<const float*>(data);
  owner->values.resize(static_cast<size_t>(C));
  VK_SWITCH_FLOAT(dtype_of(*t, op, name), {
    const scalar_t* source = static_cast<const scalar_t*>(data);
    for (int64_t c = 0; c < C; ++c) owner->values[c] = to_float(source[c]);
  });
  return owner->values.data();
}

// The same for LayerNorm's weight and bias, which the kernels always read: an absent one is `value`
// everywhere.
inline const float* as_float_or(const OptTensor& t, float value, int64_t C, const char* op,
                                const char* name, FloatParameter* owner) {
  if (t.has_value()) return as_float(t, C, op, name, owner);
  owner->values.assign(static_cast<size_t>(C), value);
  return owner->values.data();
}

// Saved statistics: one fp32 value a row.
inline const float* statistics(const Tensor& t, int64_t rows, const char* op, const char* name,
                               OptTensor* owner) {
  VK_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == rows, op, name,
           " must hold one float32 for each of the ", rows, " rows, got ", t.numel(), " values");
  *owner = torch::stable::contiguous(t);
  return static_cast<const float*>((*owner)->const_data_ptr());
}

// The gradient of a parameter of C values, in its dtype, or nothing.
inline OptTensor parameter_grad(bool wanted, const OptTensor& parameter, int64_t C, const char* op,
                                const char* name) {
  if (!wanted) return std::nullopt;
  VK_CHECK(parameter.has_value() && parameter->dim() == 1 && parameter->numel() == C, op, name,
           " must be given with ", C, " values for its gradient");
  dtype_of(*parameter, op, name);
  return empty_like_shape(*parameter, {C}, parameter->scalar_type());
}

// Runs chunk(begin, end, sums) over fixed chunks of rows, each with its own sums of C floats, then
// adds the chunks up in order. Absent outputs are skipped: their sums are null.
template <size_t N, class Chunk, class SumPartials>
void sum_over_rows(int64_t rows, int64_t C, const Tensor& like, const OptTensor (&outputs)[N],
                   const char* op, const Chunk& run_chunk, SumPartials* sum_partials) {
  const int64_t chunk = std::max(kChunkRows, (rows + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const int64_t kept = static_cast<int64_t>(N);
  const Tensor partials = empty_like_shape(like, {kept, chunks, C}, ScalarType::Float);
  float* base = static_cast<float*>(partials.mutable_data_ptr());
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* sums[N] = {};
      for (int64_t which = 0; which < kept; ++which) {
        if (!outputs[which].has_value()) continue;
        sums[which] = base + (which * chunks + i) * C;
        std::fill_n(sums[which], C, 0.0f);
      }
      run_chunk(i * chunk, std::min(rows, (i + 1) * chunk), sums);
    }
  });
  for (int64_t which = 0; which < kept; ++which) {
    if (!outputs[which].has_value()) continue;
    sum_partials(base + which * chunks * C, chunks, C, output(*outputs[which], C, op), 0, C);
  }
}

}  // namespace
}  // namespace vitkernels
