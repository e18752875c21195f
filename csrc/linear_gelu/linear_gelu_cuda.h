// Arguments and entry points that the launcher (linear_gelu_cuda.cu) shares with the kernels of
// each path (linear_gelu_simt.cu, _sm80.cu, _sm90.cu).
//
// Every product of the operator is out = A B, sums over k of A(m, k) B(n, k):
//   forward  A = x (kK), B = weight (kK);  dx  A = dh (kK), B = weight (kMN);
//   dweight  A = dh (kMN), B = x (kMN)
#pragma once

#include <cstdint>

#include "common/cuda_path.h"
#include "common/device.cuh"
#include "common/fragment.cuh"
#include "common/launch.cuh"
#include "common/stable.h"

namespace vitkernels::linear_gelu {

enum class Activation : int { kIdentity, kErf, kTanh, kQuick };

struct Matrix {  // unit stride along its rows' elements; null data: absent
  const void* data;
  int64_t stride;  // between rows, in elements
  DType dtype;
};

// (M, N); null data: not wanted.
struct Out {
  void* data;
  int64_t stride;
  DType dtype;
};

struct ProductArgs {
  Matrix a, b;
  Major a_major, b_major;  // kK: a row of the matrix is a row of A, column of B; kMN: a k
  int64_t M;
  int N;
  int64_t K;
  DType dtype;       // operands are rounded to it
  const void* bias;  // (N,), contiguous; null: none
  DType bias_dtype;
  Activation activation;
  Out h, y;  // h = A B + bias, y = activation(h)
  // More than one: y is (splits, M, N) in fp32, partial sums of k_per_split each, no h.
  int splits;
  int64_t k_per_split;
};

struct GradArgs {  // dh = dy * activation'(h)
  Matrix dy, h;    // h: null where the activation is the identity
  Out dh;          // contiguous; null: only dbias is wanted
  float* partial;  // (programs, N): sums over rows of dh as it is before it is rounded; null: none
  int64_t rows, rows_per_program;
  int N;
  Activation activation;
};

Refusal sm80_refuses(const ProductArgs& args);
Refusal sm90_refuses(const ProductArgs& args);

// `like`: a tensor of the device, for scratch memory. M, N and K are at least 1.
void product_simt(const Device& device, const ProductArgs& args);
void product_sm80(const Device& device, const ProductArgs& args);
void product_sm90(const Device& device, const ProductArgs& args);
void grad_simt(const Device& device, const GradArgs& args, int64_t programs);
// out (size,) = the sum of partial (count, size) in its order.
void sum_partials(const Device& device, const float* partial, int64_t count, int64_t size,
                  const Out& out);
// out = in, both dense, rounded to out's dtype.
void round_all(const Device& device, const Matrix& in, int64_t rows, int64_t columns,
               const Out& out);

}  // namespace vitkernels::linear_gelu
