// Element types and operands as the kernels see them: a tag for run-time switches, two storage
// structs, rows.
#pragma once

#include <cstdint>

namespace vitkernels {

enum class DType : int32_t { kF32, kBF16, kF16, kBool };

struct BF16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kBool ? 1 : 2;
}

// A (rows, C) operand with unit column stride; data is null where the operand is absent.
struct RowsArg {
  void* data;
  int64_t stride;  // in elements
  DType dtype;
};

}  // namespace vitkernels

// Calls the statements with `scalar_t` bound to the storage type of a floating DType.
#define VK_DTYPE_CASE(tag, type, ...) \
  case tag: {                         \
    using scalar_t = type;            \
    __VA_ARGS__;                      \
    break;                            \
  }
#define VK_SWITCH_FLOAT(dtype, ...)                                            \
  switch (dtype) {                                                             \
    VK_DTYPE_CASE(::vitkernels::DType::kF32, float, __VA_ARGS__)               \
    VK_DTYPE_CASE(::vitkernels::DType::kBF16, ::vitkernels::BF16, __VA_ARGS__) \
    VK_DTYPE_CASE(::vitkernels::DType::kF16, ::vitkernels::F16, __VA_ARGS__)   \
    default:                                                                   \
      break;                                                                   \
  }
