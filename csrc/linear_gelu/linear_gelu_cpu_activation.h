// GELU and its derivative: y = h * gate(h), dy/dh = gate(h) + h * gate'(h). As in PyTorch, -Inf
// gives NaN (-Inf * 0), and so does the derivative at both infinities.
#pragma once

#include "common/cpu_vec.h"
#include "linear_gelu/linear_gelu_cpu.h"

namespace vitkernels {
namespace {

constexpr float kLog2eF = 1.44269504f;

VK_INLINE Vec absolute(Vec x) { return as_float(as_int(x) & 0x7fffffff); }

// Phi(-a) for a >= 0, the normal distribution's tail, as 2^P(a): one polynomial for all a, because
// log2 Phi(-a) is smooth and P falls without end, and no cancellation in the tail.
// Estrin's scheme: latency, not FMAs, is what bounds an epilogue.
template <class T>
VK_INLINE Vec normal_tail(Vec a) {
  if constexpr (sizeof(T) == 4) a = select(a > splat(30.0f), splat(30.0f), a);  // no inf - inf
  const Vec square = a * a;
  const auto line = [&](float one, float zero) { return fma(a, splat(one), splat(zero)); };
  if constexpr (sizeof(T) == 4) {  // absolute error 4e-8
    const Vec fourth = square * square;
    const Vec low =
        fma(square, line(-5.250502378e-2f, -4.592049122e-1f), line(-1.151105762f, -1.0f));
    const Vec high = fma(square, line(3.862124140e-5f, -1.825499930e-4f),
                         line(-1.458642073e-4f, 7.075463887e-3f));
    return exp2(fma(fourth, fma(fourth, splat(-2.772090056e-6f), high), low));
  } else {  // absolute error 5e-6, relative 8e-4 up to a = 4
    const Vec high = fma(square, line(-4.508104466e-4f, 6.977356970e-3f),
                         line(-5.171717331e-2f, -4.599108696e-1f));
    return exp2_short(fma(square, high, line(-1.150921941f, -1.000007033f)));
  }
}

// 1 / (1 + e^-z), and its derivative where asked for; exactly 0 where it underflows.
template <class T, bool kSlope>
VK_INLINE Vec sigmoid(Vec z, Vec* slope) {
  const Vec x = absolute(z) * splat(-kLog2eF);
  const Vec e = sizeof(T) == 4 ? exp2(x) : exp2_short(x);
  const Vec inverse = splat(1.0f) / (splat(1.0f) + e), small = e * inverse;
  if constexpr (kSlope) *slope = small * inverse;
  return select(z < Vec{}, small, inverse);
}

// gate(h), and its derivative where asked for, good for values stored in T.
template <Activation activation, class T, bool kSlope>
VK_INLINE Vec gate(Vec h, Vec* slope) {
  if constexpr (activation == Activation::kErf) {
    if constexpr (kSlope) {
      constexpr float kRootHalfPi = 0.398942280f;  // 1 / sqrt(2 pi)
      const Vec x = h * h * splat(-0.5f * kLog2eF);
      *slope = (sizeof(T) == 4 ? exp2(x) : exp2_short(x)) * splat(kRootHalfPi);
    }
    const Vec tail = normal_tail<T>(absolute(h));
    return select(h < Vec{}, tail, splat(1.0f) - tail);
  } else if constexpr (activation == Activation::kTanh) {  // (1 + tanh u) / 2 = sigmoid(2 u)
    constexpr float kTwoBeta = 1.59576912f, kKappa = 0.044715f;
    const Vec square = h * h;
    const Vec result =
        sigmoid<T, kSlope>(h * fma(square, splat(kTwoBeta * kKappa), splat(kTwoBeta)), slope);
    if constexpr (kSlope) {  // the slope is 0 long before h * h reaches the bound
      const Vec bound = splat(1e6f), bounded = select(square > bound, bound, square);
      *slope = *slope * fma(bounded, splat(3.0f * kTwoBeta * kKappa), splat(kTwoBeta));
    }
    return result;
  } else {
    const Vec result = sigmoid<T, kSlope>(h * splat(1.702f), slope);
    if constexpr (kSlope) *slope = *slope * splat(1.702f);
    return result;
  }
}

template <Activation activation, class T>
VK_INLINE Vec activate(Vec h) {
  if constexpr (activation == Activation::kIdentity) {
    return h;
  } else {
    return h * gate<activation, T, false>(h, nullptr);
  }
}

// d activate / dh.
template <Activation activation, class T>
VK_INLINE Vec derivative(Vec h) {
  if constexpr (activation == Activation::kIdentity) {
    return splat(1.0f);
  } else {
    Vec slope;
    const Vec g = gate<activation, T, true>(h, &slope);
    return fma(h, slope, g);
  }
}

}  // namespace
}  // namespace vitkernels

// Calls the statements with the constant `act` bound to a run-time Activation.
#define VK_ACTIVATION_CASE(value, ...)                                                         \
  case ::vitkernels::Activation::value: {                                                      \
    [[maybe_unused]] constexpr ::vitkernels::Activation act = ::vitkernels::Activation::value; \
    __VA_ARGS__;                                                                               \
    break;                                                                                     \
  }
#define VK_SWITCH_ACTIVATION(activation, ...)  \
  switch (activation) {                        \
    VK_ACTIVATION_CASE(kIdentity, __VA_ARGS__) \
    VK_ACTIVATION_CASE(kErf, __VA_ARGS__)      \
    VK_ACTIVATION_CASE(kTanh, __VA_ARGS__)     \
    VK_ACTIVATION_CASE(kQuick, __VA_ARGS__)    \
  }
