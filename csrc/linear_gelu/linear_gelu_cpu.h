// What the launcher and the per-ISA kernels of linear_gelu share.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace vitkernels {

enum class Activation : int32_t { kIdentity, kErf, kTanh, kQuick };  // the schema's numbers

// A matrix with unit column stride; data is null where it is absent.
struct MatrixArg {
  void* data;
  int64_t stride;  // in elements
  DType dtype;
};

// C[M][N] = A[M][K] * B[K][N] with operands rounded to `dtype`, and what becomes of C.
struct ProductArgs {
  int64_t M, N, K;
  DType dtype;
  MatrixArg a, b;
  bool a_transposed;  // a is (K, M) in memory
  bool b_transposed;  // b is (N, K) in memory
  void* packed_b;
  int64_t row_blocks, column_groups;  // work items: row_blocks * column_groups

  // h = C + bias; preactivation = h, out = activation(h); either may be absent.
  const float* bias;  // N floats up to whole panels, or null
  Activation activation;
  MatrixArg out, preactivation;

  // A product over a long K comes in slabs: all but the last leave their sums in `sums` (M, N),
  // all but the first add to what they find there.
  float* sums;
  bool first_slab, last_slab;
};

struct GradArgs {
  int64_t N;
  DType dtype;  // of dy, preactivation and dh
  Activation activation;
  MatrixArg dy, preactivation;
  MatrixArg dh;      // dy * activation'(preactivation); absent when only dbias is wanted
  float* dbias_sum;  // N floats: this chunk's sum of dh; null when not wanted
};

struct LinearGeluTable {
  int64_t (*panels)(int64_t columns);  // work items of `pack` and `few_rows`
  int64_t (*padded_columns)(int64_t columns);
  int64_t (*packed_bytes)(const ProductArgs&);
  int64_t (*pack_scratch)(const ProductArgs&);  // bytes per thread
  void (*pack)(const ProductArgs&, int64_t begin, int64_t end, void* scratch);
  int64_t (*product_scratch)(const ProductArgs&);  // bytes per thread
  void (*product)(const ProductArgs&, int64_t begin, int64_t end, void* scratch);
  // Products of so few rows that packing B does not pay; work items are panels.
  bool (*is_few_rows)(const ProductArgs&);
  int64_t (*few_rows_scratch)(const ProductArgs&);  // bytes per thread
  void (*few_rows)(const ProductArgs&, int64_t begin, int64_t end, void* scratch);
  // dh and the sum of its columns, for rows [begin, end).
  void (*grad)(const GradArgs&, int64_t begin, int64_t end);
  // out[n] = sum of partials[i * N + n] over i, in order.
  void (*sum_partials)(const float* partials, int64_t count, int64_t N, MatrixArg out);
};

VK_DECLARE_TABLES(LinearGeluTable, linear_gelu)

}  // namespace vitkernels
