// What every launcher needs of PyTorch's stable ABI: tensors, checks, dtypes, and the (rows, C)
// view of a tensor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "common/dtype.h"

namespace vitkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// One sentence naming operator, argument, expected and got; graphs exported to C++ see it instead
// of Python's checks.
#define VK_CHECK(condition, op, ...) \
  STD_TORCH_CHECK(condition, "vitkernels::", op, ": ", __VA_ARGS__)

inline DType dtype_of(ScalarType type, const char* op, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      VK_CHECK(false, op, name, " must be float32, bfloat16 or float16, got scalar type ",
               static_cast<int>(type));
  }
  return DType::kF32;
}

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  return dtype_of(t.scalar_type(), op, name);
}

// For an attention bias, which may be a mask.
inline DType float_or_bool_dtype_of(const Tensor& t, const char* op, const char* name) {
  return t.scalar_type() == ScalarType::Bool ? DType::kBool : dtype_of(t, op, name);
}

inline Tensor empty_like_shape(const Tensor& like, const std::vector<int64_t>& shape,
                               ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// A tensor of shape (..., C) as `rows` rows with one row stride and unit column stride; copies only
// when it must.
struct Rows {
  Tensor owner;
  const void* data;
  int64_t rows, stride;
  DType dtype;
};

inline bool has_uniform_rows(const Tensor& t, int64_t* row_stride) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t last = t.dim() - 1;
  if (sizes[last] != 1 && strides[last] != 1) return false;
  int64_t step = -1, rows = 1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (step < 0) step = strides[d];
    if (strides[d] != step * rows) return false;
    rows *= sizes[d];
  }
  *row_stride = step < 0 ? sizes[last] : step;
  return true;
}

inline Rows as_rows(const Tensor& t, const char* op, const char* name) {
  VK_CHECK(t.dim() >= 1, op, name, " must have at least one dimension");
  int64_t stride = 0;
  Tensor owner = has_uniform_rows(t, &stride) ? t : torch::stable::contiguous(t);
  const int64_t C = t.size(t.dim() - 1);
  VK_CHECK(C >= 1, op, name, " must have at least one column");
  if (!has_uniform_rows(owner, &stride)) stride = C;
  return {owner, owner.const_data_ptr(), C == 0 ? 0 : t.numel() / C, stride, dtype_of(t, op, name)};
}

}  // namespace vitkernels
