// What the launcher and the per-ISA kernels of add_layer_norm and layer_norm_add share.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace vitkernels {

// The branch: row_scale[b] * gamma * dropout(x), b = row / rows_per_sample. Null pointers stand
// for 1.
struct BranchArgs {
  const float* gamma;
  const float* row_scale;
  int64_t rows_per_sample;
  uint64_t seed;
  uint64_t threshold;   // dropout keeps where the Philox word is >= threshold
  float dropout_scale;  // 1 / (1 - p); 0 switches dropout off
};

struct NormForwardArgs {
  RowsArg x, residual, y, z;   // z is new_residual; residual and z are absent for plain LayerNorm
  const float *weight, *bias;  // always present
  float *mean, *rstd;
  BranchArgs branch;
  int64_t C;
  float eps;
};

struct NormBackwardArgs {
  RowsArg dy, dz, z, x;  // x: the branch, present only when dgamma is
  RowsArg dx, dresidual;
  const float *weight, *mean, *rstd;
  const float* dy_row_scale;  // layer_norm_add: the factor of each sample on the incoming gradient
  BranchArgs branch;
  int64_t C;
  // Sums over a chunk of rows, C floats each; null where not asked for.
  float *dweight, *dbias, *dgamma;
};

// Each function works on rows [begin, end); backward adds its weight gradients to the chunk's sums.
struct AddLayerNormTable {
  void (*forward)(const NormForwardArgs&, int64_t begin,
                  int64_t end);  // y = LayerNorm(residual + branch)
  void (*post_forward)(const NormForwardArgs&, int64_t begin,
                       int64_t end);  // y = residual + LayerNorm(x) * row_scale
  void (*backward)(const NormBackwardArgs&, int64_t begin, int64_t end);
  // out[c] = sum of partials[i * C + c] over i, in order, for columns [begin, end).
  void (*sum_partials)(const float* partials, int64_t count, int64_t C, RowsArg out, int64_t begin,
                       int64_t end);
};

VK_DECLARE_TABLES(AddLayerNormTable, add_layer_norm)

}  // namespace vitkernels
