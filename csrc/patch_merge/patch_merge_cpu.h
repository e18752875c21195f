// What the launcher and the per-ISA kernels of patch_merge_layer_norm share.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace vitkernels {

// x or dx, (B, H, W, C) with unit channel stride; data is null where the operand is absent. Row
// (b, i, j) of the merged map, of size (rows_h, rows_w), holds pixels (2i + s % 2, 2j + s / 2),
// s = 0..3.
struct MapArg {
  void* data;
  int64_t H, W, C;
  int64_t stride_b, stride_h, stride_w;  // in elements
  DType dtype;
  int64_t rows_h() const { return (H + 1) / 2; }
  int64_t rows_w() const { return (W + 1) / 2; }
};

struct MergeForwardArgs {
  MapArg x;
  RowsArg y;
  const float *weight, *bias;  // always present
  float *mean, *rstd;
  float eps;
};

struct MergeBackwardArgs {
  MapArg x, dx;
  RowsArg dy;
  const float *weight, *mean, *rstd;
  // Sums over a chunk of rows, 4 * C floats each; null where not asked for.
  float *dweight, *dbias;
};

// Each function works on rows [begin, end) of the merged map; backward adds its weight gradients to
// the chunk's sums.
struct PatchMergeTable {
  void (*forward)(const MergeForwardArgs&, int64_t begin, int64_t end);
  void (*backward)(const MergeBackwardArgs&, int64_t begin, int64_t end);
  // out[c] = sum of partials[i * C + c] over i, in order, for columns [begin, end).
  void (*sum_partials)(const float* partials, int64_t count, int64_t C, RowsArg out, int64_t begin,
                       int64_t end);
};

VK_DECLARE_TABLES(PatchMergeTable, patch_merge)

}  // namespace vitkernels
