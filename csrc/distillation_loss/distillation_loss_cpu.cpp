// Launchers of distillation_loss on the CPU: cheap checks, outputs, rows shared among threads,
// registration.
#include "distillation_loss/distillation_loss_cpu.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/scratch.h"
#include "common/stable.h"

namespace vitkernels {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements a thread should have at least
constexpr double kFp16Unit = 1024.0;

const DistillationTable& kernels() { return VK_PICK_TABLE(distillation_loss); }

RowsArg arg(const Rows& rows) { return {const_cast<void*>(rows.data), rows.stride, rows.dtype}; }

Rows head(const Tensor& t, const Tensor& like, const char* op, const char* name) {
  VK_CHECK(shape_of(t) == shape_of(like), op, name, " must have the shape of logits, (",
           like.size(0), ", ", like.size(1), ")");
  return as_rows(t, op, name);
}

// How many times the gradients are kept enlarged: reference.py says why.
double unit(DType dtype, int64_t count) {
  if (dtype != DType::kF16) return 1.0;
  double power = 1.0;
  while (power < static_cast<double>(count)) power *= 2.0;
  return kFp16Unit * power;
}

OptTensor gradient(bool wanted, const Tensor& like, int64_t K, DType dtype, RowsArg* where) {
  if (!wanted) return std::nullopt;
  Tensor t = empty_like_shape(like, shape_of(like), like.scalar_type());
  *where = {t.mutable_data_ptr(), K, dtype};
  return t;
}

// Class ids as they lie, or a dense copy that `owner` keeps alive.
const int64_t* class_ids(const Tensor& targets, int64_t B, int64_t K, const char* op,
                         OptTensor* owner) {
  VK_CHECK(targets.scalar_type() == ScalarType::Long && targets.size(0) == B, op,
           "targets must be int64 class ids of shape (", B, ",)");
  *owner = torch::stable::contiguous(targets);
  const int64_t* ids = static_cast<const int64_t*>((*owner)->const_data_ptr());
  for (int64_t row = 0; row < B; ++row)
    VK_CHECK(ids[row] >= 0 && ids[row] < K, op, "targets must be class ids in [0, ", K, "), got ",
             ids[row], " in row ", row);
  return ids;
}

void check_number(bool fine, const char* op, const char* name, const char* expected, double got) {
  VK_CHECK(fine, op, name, " must be ", expected, ", got ", got);
}

std::tuple<Tensor, OptTensor, OptTensor> distillation_loss_fwd(
    Tensor logits, Tensor distill_logits, Tensor teacher_logits, Tensor targets, double alpha,
    double temperature, bool hard, double label_smoothing, bool per_class,
    std::vector<bool> grad_mask) {
  const char* op = "distillation_loss_fwd";
  VK_CHECK(logits.dim() == 2 && logits.size(0) >= 1 && logits.size(1) >= 1, op,
           "logits must be (B, K) with B, K >= 1, got ", logits.dim(), " dimensions of ",
           logits.numel(), " values");
  VK_CHECK(grad_mask.size() == 2, op, "grad_mask must have 2 entries, got ", grad_mask.size());
  check_number(alpha >= 0.0 && alpha <= 1.0, op, "alpha", "in [0, 1]", alpha);
  check_number(label_smoothing >= 0.0 && label_smoothing <= 1.0, op, "label_smoothing", "in [0, 1]",
               label_smoothing);
  check_number(temperature > 0.0 && std::isfinite(temperature), op, "temperature",
               "positive and finite", temperature);
  const int64_t B = logits.size(0), K = logits.size(1);
  const Rows x = head(logits, logits, op, "logits");
  const Rows distill = head(distill_logits, logits, op, "distill_logits");
  const Rows teacher = head(teacher_logits, logits, op, "teacher_logits");
  VK_CHECK(x.dtype == distill.dtype, op, "distill_logits must have the dtype of logits");
  DistillationArgs args{};
  OptTensor ids;
  std::optional<Rows> soft;
  VK_CHECK(targets.dim() == 1 || targets.dim() == 2, op, "targets must be (B,) or (B, K), got ",
           targets.dim(), " dimensions");
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
  const int64_t divisor = per_class && !hard ? B * K : B;
  args.class_weight = (1.0 - alpha) / static_cast<double>(B);
  args.distill_weight = alpha / static_cast<double>(divisor);
  args.class_grad = static_cast<float>(args.class_weight * unit(x.dtype, B));
  args.distill_grad = static_cast<float>(args.distill_weight * (hard ? 1.0 : temperature) *
                                         unit(x.dtype, per_class ? B * K : B));
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
  VK_CHECK(kept.has_value() && kept->dim() == 2 && kept->numel() > 0, op, name,
           " must be given as (B, K) when output_mask asks for it");
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
  VK_CHECK(output_mask.size() == 2, op, "output_mask must have 2 entries, got ",
           output_mask.size());
  VK_CHECK(dloss.scalar_type() == ScalarType::Float && dloss.numel() == 1 && dloss.dim() == 0, op,
           "dloss must be a float32 scalar");
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
