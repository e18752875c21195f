// What the launchers of distillation_loss check alike, and the numbers they hand to their kernels.
#pragma once

#include <cmath>

#include "common/stable.h"

namespace vitkernels::distillation_loss {

// How many times the gradients are kept enlarged: reference.py says why.
inline double unit(DType dtype, int64_t count) {
  constexpr double kFp16Unit = 1024.0;
  if (dtype != DType::kF16) return 1.0;
  double power = 1.0;
  while (power < static_cast<double>(count)) power *= 2.0;
  return kFp16Unit * power;
}

// The weights of a row's losses in the batch's, and what its kept gradients are multiplied by.
struct Weights {
  double class_weight, distill_weight, class_grad, distill_grad;
};

inline Weights weights(DType dtype, int64_t B, int64_t K, double alpha, double temperature,
                       bool hard, bool per_class) {
  Weights w{};
  w.class_weight = (1.0 - alpha) / static_cast<double>(B);
  w.distill_weight = alpha / static_cast<double>(per_class && !hard ? B * K : B);
  w.class_grad = w.class_weight * unit(dtype, B);
  w.distill_grad =
      w.distill_weight * (hard ? 1.0 : temperature) * unit(dtype, per_class ? B * K : B);
  return w;
}

inline void check_forward(const Tensor& logits, const Tensor& targets, double alpha,
                          double temperature, double label_smoothing,
                          const std::vector<bool>& grad_mask, const char* op) {
  VK_CHECK(logits.dim() == 2 && logits.size(0) >= 1 && logits.size(1) >= 1, op,
           "logits must be (B, K) with B, K >= 1, got ", logits.dim(), " dimensions of ",
           logits.numel(), " values");
  VK_CHECK(grad_mask.size() == 2, op, "grad_mask must have 2 entries, got ", grad_mask.size());
  VK_CHECK(alpha >= 0.0 && alpha <= 1.0, op, "alpha must be in [0, 1], got ", alpha);
  VK_CHECK(label_smoothing >= 0.0 && label_smoothing <= 1.0, op,
           "label_smoothing must be in [0, 1], got ", label_smoothing);
  VK_CHECK(temperature > 0.0 && std::isfinite(temperature), op,
           "temperature must be positive and finite, got ", temperature);
  VK_CHECK(targets.dim() == 1 || targets.dim() == 2, op, "targets must be (B,) or (B, K), got ",
           targets.dim(), " dimensions");
  VK_CHECK(targets.dim() == 2 ||
               (targets.scalar_type() == ScalarType::Long && targets.size(0) == logits.size(0)),
           op, "targets must be int64 class ids of shape (", logits.size(0), ",)");
}

// A head's rows; it has the shape of logits.
inline Rows head(const Tensor& t, const Tensor& logits, const char* op, const char* name) {
  VK_CHECK(shape_of(t) == shape_of(logits), op, name, " must have the shape of logits, (",
           logits.size(0), ", ", logits.size(1), ")");
  return as_rows(t, op, name);
}

inline void check_backward(const Tensor& dloss, const OptTensor (&kept)[2],
                           const std::vector<bool>& output_mask, const char* op) {
  VK_CHECK(output_mask.size() == 2, op, "output_mask must have 2 entries, got ",
           output_mask.size());
  VK_CHECK(dloss.scalar_type() == ScalarType::Float && dloss.numel() == 1 && dloss.dim() == 0, op,
           "dloss must be a float32 scalar");
  const char* const names[2] = {"dlogits", "ddistill"};
  for (int i = 0; i < 2; ++i)
    VK_CHECK(
        !output_mask[i] || (kept[i].has_value() && kept[i]->dim() == 2 && kept[i]->numel() > 0), op,
        names[i], " must be given as (B, K) when output_mask asks for it");
}

}  // namespace vitkernels::distillation_loss
