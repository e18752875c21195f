// The launchers of patch_merge_kernels.cuh (read that first): checks, views of the operands, the
// choice of the instance that patch_merge_plan.h asks for, and registration.
#include <tuple>

#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/stable.h"
#include "patch_merge/patch_merge_kernels.cuh"
#include "patch_merge/patch_merge_plan.h"

namespace vitkernels {
namespace {

// ---- Which instance

using ForwardKernel = void (*)(ForwardArgs);
using BackwardKernel = void (*)(BackwardArgs);

template <Widths WIDTHS>
ForwardKernel forward_of_widths(const Plan& p) {
  if (p.block_per_row)
    return p.chunks == 1 ? forward_kernel<WIDTHS, true, true, 1>
                         : forward_kernel<WIDTHS, true, true, 2>;
  return p.chunks == 3 ? forward_kernel<WIDTHS, true, false, 3>
                       : forward_kernel<WIDTHS, true, false, 4>;
}

ForwardKernel forward_instance(const Plan& p, Widths widths) {
  if (p.chunks == 0)
    return p.vectorized ? forward_kernel<Widths::kAny, true, true, 0>
                        : forward_kernel<Widths::kAny, false, true, 0>;
  return widths == Widths::k16   ? forward_of_widths<Widths::k16>(p)
         : widths == Widths::k32 ? forward_of_widths<Widths::k32>(p)
                                 : forward_of_widths<Widths::k16Of32>(p);
}

template <Widths WIDTHS>
BackwardKernel backward_of_widths(const Plan& p) {
  if (p.block_per_row)
    return p.chunks == 1 ? backward_kernel<WIDTHS, true, true, 1>
                         : backward_kernel<WIDTHS, true, true, 2>;
  return p.chunks == 3 ? backward_kernel<WIDTHS, true, false, 3>
                       : backward_kernel<WIDTHS, true, false, 4>;
}

BackwardKernel backward_instance(const Plan& p, Widths widths) {
  if (p.chunks == 0)
    return p.vectorized ? backward_kernel<Widths::kAny, true, true, 0>
                        : backward_kernel<Widths::kAny, false, true, 0>;
  return widths == Widths::k16   ? backward_of_widths<Widths::k16>(p)
         : widths == Widths::k32 ? backward_of_widths<Widths::k32>(p)
                                 : backward_of_widths<Widths::k16Of32>(p);
}

Widths widths_of(DType x, DType y) {
  const bool wide_x = x == DType::kF32, wide_y = y == DType::kF32;
  return wide_x ? (wide_y ? Widths::k32 : Widths::k16Of32) : wide_y ? Widths::kAny : Widths::k16;
}

// ---- Launchers

Tensor dense_copy(const Tensor& t) {
  Tensor copy = empty_like_shape(t, shape_of(t), t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// Collects the operands of one call: their checks, and their views, which 16-byte accesses fit
// where the number of channels allows them.
class Operands {
 public:
  Operands(const char* op, const Tensor& x) : op_(op) {
    VK_CHECK(x.dim() == 4, op, "x must be (B, H, W, C), got ", x.dim(), " dimensions");
    VK_CHECK(x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1, op,
             "x must have H, W, C >= 1, got ", x.size(1), ", ", x.size(2), ", ", x.size(3));
    for (int d = 0; d < 3; ++d)
      VK_CHECK(x.size(d) <= 1 << 30, op, "x must have B, H, W <= 2^30, got ", x.size(d));
    VK_CHECK(x.size(3) <= 1 << 28, op, "x must have at most 2^28 channels, got ", x.size(3));
    const int H = static_cast<int>(x.size(1)), W = static_cast<int>(x.size(2));
    merged_ = {x.size(0), (H + 1) / 2, (W + 1) / 2};
    size_ = {merged_[0] * merged_[1] * merged_[2], H, W, static_cast<int>(x.size(3))};
  }

  const MapSize& size() const { return size_; }
  int64_t columns() const { return int64_t{4} * size_.C; }
  // (B, ceil(H / 2), ceil(W / 2)), and with the channels.
  const std::vector<int64_t>& merged() const { return merged_; }
  std::vector<int64_t> merged_with_channels() const {
    return {merged_[0], merged_[1], merged_[2], columns()};
  }

  // As it lies, unless its channels are not contiguous or its pixels not on lines.
  MapView map(const Tensor& t, const char* name) {
    check_device(t, name);
    const MapView found = view(t, name);
    const int64_t steps[3] = {found.stride_b, found.stride_h, found.stride_w};
    bool fits = t.size(3) == 1 || t.stride(3) == 1;
    for (int d = 0; d < 3; ++d)  // a dimension of size 1 is never stepped over
      fits = fits && on_lines(found.data, t.size(d) == 1 ? 0 : steps[d], found.dtype);
    return fits ? found : view(keep(dense_copy(t)), name);
  }
  MapView output_map(const Tensor& like, OptTensor* out) {
    *out = empty_like_shape(like, shape_of(like), like.scalar_type());
    return view(**out, "dx");
  }

  RowsView rows(const Tensor& t, const char* name) {
    check_device(t, name);
    VK_CHECK(shape_of(t) == merged_with_channels(), op_, name,
             " must have the shape of y, (B, ceil(H / 2), ceil(W / 2), ", columns(), ")");
    Rows found = as_rows(t, op_, name);
    if (!on_lines(found.data, found.stride, found.dtype)) found = as_rows(dense_copy(t), op_, name);
    keep(found.owner);
    return {const_cast<void*>(found.data), found.stride, found.dtype};
  }
  RowsView output_rows(const Tensor& like, ScalarType dtype, Tensor* out) {
    const DType tag = dtype_of(dtype, op_, "out_dtype");
    *out = empty_like_shape(like, merged_with_channels(), dtype);
    return {out->mutable_data_ptr(), columns(), tag};
  }

  Parameter parameter(const OptTensor& t, const char* name) {
    if (!t.has_value()) return {nullptr, DType::kF32};
    check_device(*t, name);
    VK_CHECK(t->dim() == 1 && t->numel() == columns(), op_, name, " must have shape (4 * C,) = (",
             columns(), ",)");
    const DType dtype = dtype_of(*t, op_, name);
    const bool fits = t->is_contiguous() && on_lines(t->const_data_ptr(), 0, dtype);
    return {fits ? t->const_data_ptr() : keep(dense_copy(*t)).const_data_ptr(), dtype};
  }

  const float* statistics(const Tensor& t, const char* name) {
    check_device(t, name);
    VK_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == size_.rows, op_, name,
             " must be float32 with ", size_.rows, " elements");
    return static_cast<const float*>(keep(torch::stable::contiguous(t)).const_data_ptr());
  }

 private:
  MapView view(const Tensor& t, const char* name) {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2),
            dtype_of(t, op_, name)};
  }
  // Whether 16-byte accesses may begin at `data` and `step` elements from there; without them,
  // anything.
  bool on_lines(const void* data, int64_t step, DType dtype) const {
    return size_.C % 8 != 0 ||
           (reinterpret_cast<uintptr_t>(data) % 16 == 0 && step * size_of(dtype) % 16 == 0);
  }
  const Tensor& keep(const Tensor& t) {
    owners_.push_back(t);
    return owners_.back();
  }
  void check_device(const Tensor& t, const char* name) {
    VK_CHECK(Device::holds(t), op_, name, " is on another device than this kernel's");
  }

  const char* op_;
  MapSize size_{};
  std::vector<int64_t> merged_;
  std::vector<Tensor> owners_;  // copies, alive until the launch
};

template <class Args>
Plan plan_of(const Device& device, const Operands& operands, Args& a, Widths widths,
             bool backward) {
  a.size = operands.size();
  const Plan p = patch_merge::plan(a.size.rows, a.size.C, widths != Widths::kAny,
                                   device.multiprocessors(), backward);
  a.lanes = p.lanes;
  return p;
}

std::tuple<Tensor, Tensor, Tensor> patch_merge_layer_norm_fwd(Tensor x, OptTensor weight,
                                                              OptTensor bias, double eps,
                                                              ScalarType out_dtype) {
  const Device device(x);
  Operands operands("patch_merge_layer_norm_fwd", x);
  Tensor y, mean = empty_like_shape(x, operands.merged(), ScalarType::Float),
            rstd = empty_like_shape(x, operands.merged(), ScalarType::Float);
  ForwardArgs a{};
  a.x = operands.map(x, "x");
  a.y = operands.output_rows(x, out_dtype, &y);
  a.weight = operands.parameter(weight, "weight");
  a.bias = operands.parameter(bias, "bias");
  a.mean = static_cast<float*>(mean.mutable_data_ptr());
  a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  a.eps = static_cast<float>(eps);
  const Widths widths = widths_of(a.x.dtype, a.y.dtype);
  const Plan p = plan_of(device, operands, a, widths, false);
  if (p.blocks > 0)
    device.launch(forward_instance(p, widths), dim3(static_cast<unsigned>(p.blocks)),
                  dim3(p.threads), p.shared_bytes, a);
  return {y, mean, rstd};
}

std::tuple<OptTensor, OptTensor, OptTensor> patch_merge_layer_norm_bwd(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, OptTensor weight, OptTensor bias,
    std::vector<bool> output_mask) {
  const char* op = "patch_merge_layer_norm_bwd";
  const Device device(x);
  Operands operands(op, x);
  VK_CHECK(output_mask.size() == 3, op, "output_mask must have 3 entries, got ",
           output_mask.size());
  BackwardArgs a{};
  a.x = operands.map(x, "x");
  a.y = operands.rows(dy, "dy");
  a.weight = operands.parameter(weight, "weight");
  a.mean = operands.statistics(mean, "mean");
  a.rstd = operands.statistics(rstd, "rstd");
  OptTensor dx, gradients[2], scratch;
  if (output_mask[0]) a.dx = operands.output_map(x, &dx);
  const OptTensor* parameters[2] = {&weight, &bias};
  FinishArgs finish{};
  for (int i = 0; i < 2; ++i) {
    if (!output_mask[1 + i]) continue;
    VK_CHECK(parameters[i]->has_value(), op,
             "output_mask asks for the gradient of a parameter that is None");
    operands.parameter(*parameters[i], i == 0 ? "weight" : "bias");
    gradients[i] =
        empty_like_shape(**parameters[i], {operands.columns()}, (*parameters[i])->scalar_type());
    finish.out[i] = {gradients[i]->mutable_data_ptr(), dtype_of(*gradients[i], op, "parameter")};
  }
  const Widths widths = widths_of(a.x.dtype, a.y.dtype);
  const Plan p = plan_of(device, operands, a, widths, true);
  const bool sums = output_mask[1] || output_mask[2];
  if (sums) {
    scratch = empty_like_shape(x, {2, p.blocks, operands.columns()}, ScalarType::Float);
    a.partial = static_cast<float*>(scratch->mutable_data_ptr());
    finish.partial = a.partial;
    finish.blocks[0] = finish.blocks[1] = p.blocks;
    finish.stride = p.blocks * operands.columns();
    finish.columns = static_cast<int>(operands.columns());
  }
  if (p.blocks > 0 && (sums || output_mask[0]))
    device.launch(backward_instance(p, widths), dim3(static_cast<unsigned>(p.blocks)),
                  dim3(p.threads), p.shared_bytes, a);
  if (sums) {
    const auto columns = static_cast<unsigned>(operands.columns());
    device.launch(finish_kernel, dim3((columns + kWarp - 1) / kWarp, 2), dim3(kWarp, kFinishRows),
                  0, finish);
  }
  return {dx, gradients[0], gradients[1]};
}

}  // namespace
}  // namespace vitkernels

VK_CUDA_LIBRARY_IMPL(m) {
  m.impl("patch_merge_layer_norm_fwd.cuda", TORCH_BOX(&vitkernels::patch_merge_layer_norm_fwd));
  m.impl("patch_merge_layer_norm_bwd.cuda", TORCH_BOX(&vitkernels::patch_merge_layer_norm_bwd));
}
