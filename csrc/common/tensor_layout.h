// What a TMA tensor map describes, and what may be described: host code for both builds.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/swizzle.cuh"

namespace vitkernels {

// A tensor in global memory and the box of it that one copy moves, innermost dimension first.
// Strides are in elements; that of dimension 0 is 1.
struct TensorLayout {
  int rank;  // 2 to 5
  int64_t sizes[5];
  int64_t strides[5];
  int box[5];
};

// Throws what cuTensorMapEncodeTiled would refuse [CUDA Driver API: "Tensor Map Object
// Management"], and rows of a swizzled box that are not as wide as the swizzle.
inline void check_tensor_layout(const void* data, DType dtype, const TensorLayout& layout,
                                Swizzle swizzle) {
  const auto require = [](bool fine, const std::string& what) {
    if (!fine) throw std::runtime_error("tensor map: " + what);
  };
  const int64_t element = size_of(dtype), row = layout.box[0] * element;
  require(dtype != DType::kBool, "elements of fp32, bf16 or fp16 are needed");
  require(layout.rank >= 2 && layout.rank <= 5, "2 to 5 dimensions are needed");
  require(reinterpret_cast<uintptr_t>(data) % 16 == 0, "data must begin on a 16-byte line");
  require(layout.strides[0] == 1, "dimension 0 must have stride 1");
  require(row % 16 == 0, "a row of the box must be a multiple of 16 bytes");
  require(swizzle == Swizzle::kNone || row == static_cast<int>(swizzle),
          "a row of the box must be as wide as the swizzle, " +
              std::to_string(static_cast<int>(swizzle)) + " bytes, not " + std::to_string(row));
  for (int i = 0; i < layout.rank; ++i) {
    const std::string dimension = "dimension " + std::to_string(i);
    const int64_t stride = layout.strides[i] * element;
    require(layout.sizes[i] >= 1 && layout.sizes[i] <= int64_t{1} << 32,
            dimension + " has size " + std::to_string(layout.sizes[i]));
    require(layout.box[i] >= 1 && layout.box[i] <= 256,
            dimension + " of the box is " + std::to_string(layout.box[i]) + ", not 1 to 256");
    require(i == 0 || (stride % 16 == 0 && stride >= 0 && stride < int64_t{1} << 40),
            dimension + " has a stride of " + std::to_string(stride) +
                " bytes; a multiple of 16 below 2^40 is needed");
  }
}

}  // namespace vitkernels
