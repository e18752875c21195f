// The launchers of distillation_loss_kernels.cuh (read that first): checks, views of the operands,
// the instance that distillation_loss_plan.h asks for, and registration.
#include <algorithm>
#include <tuple>

#include "common/launch.cuh"
#include "common/stable.h"
#include "distillation_loss/distillation_loss_checks.h"
#include "distillation_loss/distillation_loss_kernels.cuh"

namespace vitkernels {
namespace {

using ForwardKernel = void (*)(ForwardArgs);

template <Types TYPES>
ForwardKernel instance_of(const Plan& p) {
  if (p.block_per_row)
    return p.chunks == 1   ? forward_kernel<TYPES, true, true, 1>
           : p.chunks == 2 ? forward_kernel<TYPES, true, true, 2>
                           : forward_kernel<TYPES, true, true, 0>;
  return p.chunks == 1   ? forward_kernel<TYPES, true, false, 1>
         : p.chunks == 2 ? forward_kernel<TYPES, true, false, 2>
                         : forward_kernel<TYPES, true, false, 4>;
}

template <bool VEC>
ForwardKernel any_instance(const Plan& p) {
  if (!p.block_per_row) return forward_kernel<Types::kAny, VEC, false, 4>;
  return p.chunks == 2 ? forward_kernel<Types::kAny, VEC, true, 2>
                       : forward_kernel<Types::kAny, VEC, true, 0>;
}

ForwardKernel instance(const Plan& p, DType dtype) {
  if (p.fixed_types)
    return dtype == DType::kF32 ? instance_of<Types::kF32>(p) : instance_of<Types::kBF16>(p);
  return p.vectorized ? any_instance<true>(p) : any_instance<false>(p);
}

// Collects the tensors of one call: their views, that they are on the GPU, and what they share.
class Operands {
 public:
  Operands(const char* op, const Tensor& logits) : op_(op), logits_(logits) {
    dtype_ = dtype_of(logits, op, "logits");
  }

  bool aligned() const { return aligned_; }
  bool one_type() const { return one_type_ && dtype_ != DType::kF16; }
  DType dtype() const { return dtype_; }

  Head head(const Tensor& t, const char* name) {
    VK_CHECK(Device::holds(t), op_, name, " must be on the GPU");
    const Rows rows = distillation_loss::head(t, logits_, op_, name);
    owners_.push_back(rows.owner);
    note(rows.data, rows.stride, rows.dtype);
    return {rows.data, rows.stride, rows.dtype};
  }

  Gradient gradient(bool wanted, OptTensor* out) {
    if (!wanted) return {nullptr, dtype_};
    *out = empty_like_shape(logits_, shape_of(logits_), logits_.scalar_type());
    note((*out)->const_data_ptr(), logits_.size(1), dtype_);
    return {(*out)->mutable_data_ptr(), dtype_};
  }

  const int64_t* ids(const Tensor& t) {
    VK_CHECK(Device::holds(t), op_, "targets must be on the GPU");
    owners_.push_back(torch::stable::contiguous(t));
    return static_cast<const int64_t*>(owners_.back().const_data_ptr());
  }

 private:
  void note(const void* data, int64_t stride, DType dtype) {
    const int64_t size = size_of(dtype);
    one_type_ = one_type_ && dtype == dtype_;
    aligned_ = aligned_ && size == size_of(dtype_) && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
               (stride - logits_.size(1)) * size % 16 == 0;
  }

  const char* op_;
  const Tensor& logits_;
  DType dtype_;
  bool aligned_ = true, one_type_ = true;
  std::vector<Tensor> owners_;  // dense copies, alive until the launch
};

std::tuple<Tensor, OptTensor, OptTensor> distillation_loss_fwd(
    Tensor logits, Tensor distill_logits, Tensor teacher_logits, Tensor targets, double alpha,
    double temperature, bool hard, double label_smoothing, bool per_class,
    std::vector<bool> grad_mask) {
  const char* op = "distillation_loss_fwd";
  check_forward(logits, targets, alpha, temperature, label_smoothing, grad_mask, op);
  VK_CHECK(Device::holds(logits), op, "logits must be on the GPU");
  const Device device(logits);
  const int64_t B = logits.size(0), K = logits.size(1);
  VK_CHECK(K <= 1 << 30 && B <= INT32_MAX, op, "logits must have at most 2^31 rows of 2^30, got (",
           B, ", ", K, ")");
  Operands operands(op, logits);
  ForwardArgs a{};
  a.logits = operands.head(logits, "logits");
  a.distill = operands.head(distill_logits, "distill_logits");
  VK_CHECK(a.distill.dtype == a.logits.dtype, op, "distill_logits must have the dtype of logits");
  a.teacher = operands.head(teacher_logits, "teacher_logits");
  if (targets.dim() == 1)
    a.ids = operands.ids(targets);
  else
    a.soft_targets = operands.head(targets, "targets");
  OptTensor dlogits, ddistill;
  a.dlogits = operands.gradient(grad_mask[0], &dlogits);
  a.ddistill = operands.gradient(grad_mask[1], &ddistill);
  const Tensor losses = empty_like_shape(logits, {B}, ScalarType::Float);
  a.losses = static_cast<float*>(losses.mutable_data_ptr());
  a.rows = B;
  a.K = static_cast<int>(K);
  a.hard = hard;
  a.smoothing = static_cast<float>(label_smoothing);
  a.inverse_temperature = static_cast<float>(1.0 / temperature);
  const Weights w = weights(operands.dtype(), B, K, alpha, temperature, hard, per_class);
  a.class_weight = static_cast<float>(w.class_weight);
  a.distill_weight = static_cast<float>(w.distill_weight);
  a.class_grad = static_cast<float>(w.class_grad);
  a.distill_grad = static_cast<float>(w.distill_grad);
  const Plan p = plan(B, K, operands.aligned(), operands.one_type());
  device.launch(instance(p, operands.dtype()), dim3(static_cast<unsigned>(p.blocks)),
                dim3(static_cast<unsigned>(p.threads)), 0, a);
  Tensor loss = empty_like_shape(logits, {}, ScalarType::Float);
  const int64_t threads = std::min<int64_t>((B + kWarp - 1) / kWarp * kWarp, kTotalThreads);
  device.launch(total_kernel, dim3(1), dim3(static_cast<unsigned>(threads)), 0,
                static_cast<const float*>(a.losses), B,
                static_cast<float*>(loss.mutable_data_ptr()));
  return {loss, dlogits, ddistill};
}

std::tuple<OptTensor, OptTensor> distillation_loss_bwd(Tensor dloss, OptTensor dlogits,
                                                       OptTensor ddistill, bool per_class,
                                                       std::vector<bool> output_mask) {
  const char* op = "distillation_loss_bwd";
  const OptTensor kept[2] = {dlogits, ddistill};
  check_backward(dloss, kept, output_mask, op);
  VK_CHECK(Device::holds(dloss), op, "dloss must be on the GPU");
  const Device device(dloss);
  const char* const names[2] = {"dlogits", "ddistill"};
  ScaleArgs a{};
  a.dloss = static_cast<const float*>(dloss.const_data_ptr());
  OptTensor owners[2], out[2];
  for (int i = 0; i < 2; ++i) {
    if (!output_mask[i]) continue;
    VK_CHECK(Device::holds(*kept[i]), op, names[i], " must be on the GPU");
    VK_CHECK(a.size == 0 || a.size == kept[i]->numel(), op,
             "ddistill must have the shape of dlogits");
    owners[i] = torch::stable::contiguous(*kept[i]);
    out[i] = empty_like_shape(*kept[i], shape_of(*kept[i]), kept[i]->scalar_type());
    a.size = kept[i]->numel();
    a.kept[i] = owners[i]->const_data_ptr();
    a.aligned[i] = reinterpret_cast<uintptr_t>(a.kept[i]) % 16 == 0;
    a.out[i] = out[i]->mutable_data_ptr();
    a.dtype[i] = dtype_of(*kept[i], op, names[i]);
    const bool of_elements = i == 1 && per_class;
    const double enlarged = unit(a.dtype[i], of_elements ? a.size : kept[i]->size(0));
    a.inverse_unit[i] = static_cast<float>(1.0 / enlarged);
  }
  if (a.size > 0) {
    const int64_t of_block = kScaleThreads * 8;
    device.launch(scale_kernel, dim3(static_cast<unsigned>((a.size + of_block - 1) / of_block), 2),
                  dim3(kScaleThreads), 0, a);
  }
  return {out[0], out[1]};
}

}  // namespace
}  // namespace vitkernels

VK_CUDA_LIBRARY_IMPL(m) {
  m.impl("distillation_loss_fwd.cuda", TORCH_BOX(&vitkernels::distillation_loss_fwd));
  m.impl("distillation_loss_bwd.cuda", TORCH_BOX(&vitkernels::distillation_loss_bwd));
}
