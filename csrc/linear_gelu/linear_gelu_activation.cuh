// GELU, its relatives and their derivatives in fp32, for the epilogues of every path.
//   erf    h Phi(h);  tanh  h (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2;
//   quick  h sigmoid(1.702 h)
#pragma once

#include <cmath>

#include "common/platform.cuh"
#include "linear_gelu/linear_gelu_cuda.h"

namespace vitkernels::linear_gelu {

constexpr float kRootHalf = 0.707106781f, kRootTwoOverPi = 0.797884561f, kCube = 0.044715f;
constexpr float kQuickFactor = 1.702f, kDensity = 0.398942280f;  // 1 / sqrt(2 pi)

VK_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The switch is outside of the loop over a thread's results: one branch for all of them.
template <int N>
VK_DEVICE void activate(float (&v)[N], Activation activation) {
  if (activation == Activation::kErf) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= 0.5f + 0.5f * erff(kRootHalf * v[i]);
  } else if (activation == Activation::kTanh) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      v[i] *= 0.5f + 0.5f * tanhf(kRootTwoOverPi * (v[i] + kCube * v[i] * v[i] * v[i]));
  } else if (activation == Activation::kQuick) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= sigmoid(kQuickFactor * v[i]);
  }
}

VK_DEVICE float derivative(float h, Activation activation) {
  if (activation == Activation::kErf)
    return 0.5f * erfcf(-kRootHalf * h) + h * kDensity * expf(-0.5f * h * h);
  if (activation == Activation::kTanh) {
    const float t = tanhf(kRootTwoOverPi * (h + kCube * h * h * h));
    const float square = fminf(h * h, 1e30f);  // finite, where 1 - t * t is 0
    return 0.5f * (1.0f + t) +
           0.5f * h * (1.0f - t * t) * kRootTwoOverPi * (1.0f + 3.0f * kCube * square);
  }
  if (activation == Activation::kQuick) {
    const float gate = sigmoid(kQuickFactor * h);
    return gate + kQuickFactor * h * gate * (1.0f - gate);
  }
  return 1.0f;
}

VK_DEVICE float bias_at(const ProductArgs& a, int column) {
  return a.bias == nullptr || column >= a.N ? 0.0f : load_scalar(a.bias, a.bias_dtype, column);
}

}  // namespace vitkernels::linear_gelu
