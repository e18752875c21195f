// Launchers of distillation_loss on the CPU: cheap checks, outputs, rows shared among threads,
// registration.
#include "distillation_loss/distillation_loss_cpu.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/scratch.h"
#include "common/stable.h"
#include "distillation_loss/distillation_loss_checks.h"

namespace vitkernels {
namespace {

using namespace distillation_loss;

constexpr int64_t kGrain = 1 << 15;  // elements a thread should have at least

const DistillationTable& kernels() { return VK_PICK_TABLE(distillation_loss); }

RowsArg arg(const Rows& rows) { return {const_cast<void*>(rows.data), rows.stride, rows.dtype}; }

OptTensor gradient(bool wanted, const Tensor& like, int64_t K, DType dtype, RowsArg* where) {
  if (!wanted) return std::nullopt;
  Tensor t = empty_like_shape(like, shape_of(like), like.scalar_type());
  *where = {t.mutable_data_ptr(), K, dtype};
  return t;
}

// Class ids as they lie, or a dense copy that `owner` keeps alive.
const int64_t* class_ids(const Tensor& targets, int64_t B, int64_t K, const char* op,
                         OptTensor* owner) {
  *owner = torch::stable::contiguous(targets);
  const int64_t* ids = static_cast<const int64_t*>((*owner)->const_data_ptr());
  for (int64_t row = 0; row < B; ++row)
    VK_CHECK(ids[row] >= 0 && ids[row] < K, op, "targets must be class ids in [0, ", K, "), got ",
             ids[row], " in row ", row);
  return ids;
}

std::tuple<Tensor, OptTensor, OptTensor> distillation_loss_fwd(
    Tensor logits, Tensor distill_logits, Tensor teacher_logits, Tensor targets, double alpha,
    double temperature, bool hard, double label_smoothing, bool per_class,
    std::vector<bool> grad_mask) {
  const char* op = "distillation_loss_fwd";
  check_forward(logits, targets, alpha, temperature, label_smoothing, grad_mask, op);
  const int64_t B = logits.size(0), K = logits.size(1);
  const Rows x = head(logits, logits, op, "logits");
  const Rows distill = head(distill_logits, logits, op, "distill_logits");
  const Rows teacher = head(teacher_logits, logits, op, "teacher_logits");
  VK_CHECK(x.dtype == distill.dtype, op, "distill_logits must have the dtype of logits");
  DistillationArgs args{};
  OptTensor ids;
  std::optional<Rows> soft;
  if (targets.dim() == 1) {
    args.ids = class_ids(targets, B, K, op, &ids);
  } else {
    soft = head(targets, logits, op, "targets");
    args.soft_targets = arg(*soft);
  }
  args.logits = arg(x);
  args.distill = arg(distill);
  args.teacher = arg(teacher);
  args.K = K;
  args.hard = hard;
  args.label_smoothing = static_cast<float>(label_smoothing);
  args.inverse_temperature = static_cast<float>(1.0 / temperature);
  const Weights w = weights(x.dtype, B, K, alpha, temperature, hard, per_class);
  args.class_weight = w.class_weight;
  args.distill_weight = w.distill_weight;
  args.class_grad = static_cast<float>(w.class_grad);
  args.distill_grad = static_cast<float>(w.distill_grad);
  OptTensor dlogits = gradient(grad_mask[0], logits, K, x.dtype, &args.dlogits);
  OptTensor ddistill = gradient(grad_mask[1], distill_logits, K, x.dtype, &args.ddistill);
  std::vector<double> losses(static_cast<size_t>(B));
  args.losses = losses.data();
  const auto rows = [&](int64_t begin, int64_t end) {
    kernels().forward(args, thread_scratch(kernels().scratch_bytes(K)), begin, end);
  };
  torch::stable::parallel_for(0, B, std::max<int64_t>(1, kGrain / K), rows);
  double total = 0.0;
  for (const double loss : losses) total += loss;
  Tensor loss = empty_like_shape(logits, {}, ScalarType::Float);
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total);
  return {loss, dlogits, ddistill};
}

OptTensor scaled(const OptTensor& kept, const Tensor& dloss, bool per_class, const char* op,
                 const char* name) {
  const DType dtype = dtype_of(*kept, op, name);
  const Tensor in = torch::stable::contiguous(*kept);
  Tensor out = empty_like_shape(in, shape_of(in), in.scalar_type());
  const RowsArg source{const_cast<void*>(in.const_data_ptr()), 0, dtype};
  const RowsArg target{out.mutable_data_ptr(), 0, dtype};
  const double g = *static_cast<const float*>(dloss.const_data_ptr());
  const float factor = static_cast<float>(g / unit(dtype, per_class ? in.numel() : in.size(0)));
  torch::stable::parallel_for(0, in.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernels().scale(source, target, factor, begin, end);
  });
  return out;
}

std::tuple<OptTensor, OptTensor> distillation_loss_bwd(Tensor dloss, OptTensor dlogits,
                                                       OptTensor ddistill, bool per_class,
                                                       std::vector<bool> output_mask) {
  const char* op = "distillation_loss_bwd";
  check_backward(dloss, {dlogits, ddistill}, output_mask, op);
  OptTensor dx, dz;
  if (output_mask[0]) dx = scaled(dlogits, dloss, false, op, "dlogits");
  if (output_mask[1]) dz = scaled(ddistill, dloss, per_class, op, "ddistill");
  return {dx, dz};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("distillation_loss_fwd", TORCH_BOX(&distillation_loss_fwd));
  m.impl("distillation_loss_fwd.cpu", TORCH_BOX(&distillation_loss_fwd));
  m.impl("distillation_loss_bwd", TORCH_BOX(&distillation_loss_bwd));
  m.impl("distillation_loss_bwd.cpu", TORCH_BOX(&distillation_loss_bwd));
}
