// add_layer_norm and layer_norm_add for NVIDIA GPUs, one forward kernel (Form) and one backward:
//   y = LN(z), z = residual + row_scale * gamma * dropout(x);  out = residual + row_scale * LN(x).
// This file has the launchers: checks, views of the operands, the instance that
// add_layer_norm_plan.h asks for, and registration.
//
// Algorithm: a row is worked on in registers, eight elements at a time; mean and variance are two
//   passes over the registers, in fp32. The usual dtypes (Widths) read rows by a ring: cp.async
//   brings the next one or two of each thread to shared memory meanwhile, where the parameters are
//   too. The backward's threads keep the sums over rows of dweight, dbias and dgamma for their
//   columns, blocks write them, and finish_kernel, which starts while they do, adds them in a fixed
//   order: no atomics. Dropout's mask is computed again, a row's before the row is in registers.
// Grid: persistent. 1..32 lanes a row up to C = 1024 (512 without 16-byte accesses), a block a row
//   up to 8192 (4096); beyond, the block walks the row and reads it again in each pass.
// Memory per block: ring and parameters, most of a multiprocessor's: add_layer_norm_plan.h.
// Limits: any C, any alignment; 16-byte accesses where C % 8 == 0 and rows begin on 16-byte lines.
// Floor: bytes per element with x, y, z in 16 bits (fp32 residual; y too) forward: x, residual in,
//   z, y out, 8 (12; 14); backward: dy, dz, z in, dz out, 8 (14), with LayerScale also x in, dx
//   out, 12 (18), with dropout alone dx out, 10 (16). ViT-B, B256 N197 C768 at 4.3 TB/s: 72, 72,
//   108, 90 us. A row with row_scale 0 saves the 2 of x.
//   The SASS reads and writes each piece of a row once (tests/test_cuda_build.py), beside 8 bytes
//   of statistics; parameters once a block. Not measured. On sm_90, 16 bits, C = 768: 24 warps
//   forward (8 backward, with LayerScale) have 74 KB (98) of later rows under way, of which 4.3
//   TB/s at 0.8 us need 26; 562 (899) instructions of a warp a row are 30 us (48) of all issue
//   slots at 1.8 GHz. Dropout is 45 instructions an element, 41 of them Philox, 17 of these
//   products at half rate: 1641 a row forward (2037 backward), 87 us (108) of issue slots: more
//   than the memory of 16-bit tensors takes (72, 90), less than that of an fp32 residual (108,
//   144).
#include <cmath>

#include "add_layer_norm/add_layer_norm_backward.cuh"
#include "add_layer_norm/add_layer_norm_forward.cuh"
#include "add_layer_norm/add_layer_norm_plan.h"
#include "common/launch.cuh"
#include "common/stable.h"

namespace vitkernels {
namespace {

// ---- Which instance

using ForwardKernel = void (*)(ForwardArgs);
using BackwardKernel = void (*)(BackwardArgs);

template <Form FORM, Widths WIDTHS>
ForwardKernel forward_of_widths(const Plan& p) {
  if (p.block_per_row)
    return p.chunks == 1 ? forward_kernel<FORM, WIDTHS, true, true, 1>
                         : forward_kernel<FORM, WIDTHS, true, true, 2>;
  return p.chunks == 1   ? forward_kernel<FORM, WIDTHS, true, false, 1>
         : p.chunks == 2 ? forward_kernel<FORM, WIDTHS, true, false, 2>
         : p.chunks == 3 ? forward_kernel<FORM, WIDTHS, true, false, 3>
                         : forward_kernel<FORM, WIDTHS, true, false, 4>;
}

template <Form FORM>
ForwardKernel forward_instance(const Plan& p, Widths widths) {
  if (p.fixed_widths) {
    if (widths == Widths::k32) return forward_of_widths<FORM, Widths::k32>(p);
    if (widths == Widths::k16) return forward_of_widths<FORM, Widths::k16>(p);
    if constexpr (FORM == Form::kAddNorm)
      if (widths == Widths::k16Stream32) return forward_of_widths<FORM, Widths::k16Stream32>(p);
    return forward_of_widths<FORM, Widths::k16StreamY32>(p);
  }
  constexpr Widths kAny = Widths::kAny;
  if (p.vectorized)
    return p.chunks == 0     ? forward_kernel<FORM, kAny, true, true, 0>
           : p.block_per_row ? forward_kernel<FORM, kAny, true, true, 4>
                             : forward_kernel<FORM, kAny, true, false, 4>;
  return p.chunks == 0     ? forward_kernel<FORM, kAny, false, true, 0>
         : p.block_per_row ? forward_kernel<FORM, kAny, false, true, 2>
                           : forward_kernel<FORM, kAny, false, false, 2>;
}

template <bool DGAMMA, Widths WIDTHS>
BackwardKernel backward_of_widths(const Plan& p) {
  if (p.block_per_row)
    return p.chunks == 1 ? backward_kernel<WIDTHS, true, true, 1, DGAMMA>
                         : backward_kernel<WIDTHS, true, true, 2, DGAMMA>;
  return p.chunks == 1   ? backward_kernel<WIDTHS, true, false, 1, DGAMMA>
         : p.chunks == 2 ? backward_kernel<WIDTHS, true, false, 2, DGAMMA>
         : p.chunks == 3 ? backward_kernel<WIDTHS, true, false, 3, DGAMMA>
                         : backward_kernel<WIDTHS, true, false, 4, DGAMMA>;
}

template <bool DGAMMA>
BackwardKernel backward_instance(const Plan& p, Widths widths) {
  if (p.fixed_widths) {
    if (widths == Widths::k32) return backward_of_widths<DGAMMA, Widths::k32>(p);
    if (widths == Widths::k16) return backward_of_widths<DGAMMA, Widths::k16>(p);
    if constexpr (!DGAMMA) {
      if (widths == Widths::k16Y32) return backward_of_widths<false, Widths::k16Y32>(p);
      if (widths == Widths::k16StreamY32) return backward_of_widths<false, Widths::k16StreamY32>(p);
    }
    return backward_of_widths<DGAMMA, Widths::k16Stream32>(p);
  }
  constexpr Widths kAny = Widths::kAny;
  if (p.vectorized)
    return p.chunks == 0     ? backward_kernel<kAny, true, true, 0, DGAMMA>
           : p.block_per_row ? backward_kernel<kAny, true, true, 4, DGAMMA>
                             : backward_kernel<kAny, true, false, 4, DGAMMA>;
  return p.chunks == 0     ? backward_kernel<kAny, false, true, 0, DGAMMA>
         : p.block_per_row ? backward_kernel<kAny, false, true, 2, DGAMMA>
                           : backward_kernel<kAny, false, false, 2, DGAMMA>;
}

template <class Operand>
bool same_type(const Operand& a, const Operand& b) {
  return a.data == nullptr || a.dtype == b.dtype;
}
bool same_types(const ForwardArgs& a, const ForwardArgs& b) {
  return same_type(a.x, b.x) && same_type(a.residual, b.residual) && same_type(a.y, b.y) &&
         same_type(a.z, b.z);
}
bool same_types(const BackwardArgs& a, const BackwardArgs& b) {
  return same_type(a.dy, b.dy) && same_type(a.dz, b.dz) && same_type(a.z, b.z) &&
         same_type(a.x, b.x) && same_type(a.dx, b.dx) && same_type(a.dresidual, b.dresidual);
}

// The first of `candidates` that all operands of a call agree with, whose types are then set; or
// kAny.
template <class Args>
Widths widths_of(Args& a, std::initializer_list<Widths> candidates) {
  for (Widths widths : candidates)
    for (DType narrow : {DType::kBF16, DType::kF16}) {
      Args typed = a;
      set_types(typed, widths, narrow);
      if (!same_types(a, typed)) continue;
      a = typed;
      return widths;
    }
  return Widths::kAny;
}

// Those that forward_instance and backward_instance know.
Widths forward_widths(Form form, ForwardArgs& a) {
  if (form == Form::kNormAdd) return widths_of(a, {Widths::k32, Widths::k16, Widths::k16StreamY32});
  return widths_of(a, {Widths::k32, Widths::k16, Widths::k16Stream32, Widths::k16StreamY32});
}
Widths backward_widths(bool dgamma, BackwardArgs& a) {
  if (dgamma) return widths_of(a, {Widths::k32, Widths::k16, Widths::k16Stream32});
  return widths_of(
      a, {Widths::k32, Widths::k16, Widths::k16Stream32, Widths::k16StreamY32, Widths::k16Y32});
}

// ---- Launchers

// Collects the operands of one call: their views, the checks they need, and whether 16-byte
// accesses fit them all.
class Operands {
 public:
  Operands(const char* op, const Tensor& x)
      : op_(op), C_(x.dim() > 0 ? x.size(x.dim() - 1) : 0), numel_(x.numel()) {
    VK_CHECK(C_ >= 1 && C_ <= INT32_MAX / 2, op_, "C must be from 1 to 2^30, got ", C_);
    rows_ = numel_ / C_;
    samples_ = x.dim() > 1 ? x.size(0) : 1;
  }

  int64_t rows() const { return rows_; }
  int64_t rows_per_sample() const {
    return samples_ == 0 ? 1 : std::max<int64_t>(rows_ / samples_, 1);
  }
  int C() const { return static_cast<int>(C_); }
  bool aligned() const { return aligned_; }

  RowsView rows(const OptTensor& t, const char* name) {
    if (!t.has_value()) return {nullptr, 0, DType::kF32};
    check_device(*t, name);
    VK_CHECK(t->numel() == numel_ && t->size(t->dim() - 1) == C_, op_, name,
             " must have the shape of x");
    const Rows view = as_rows(*t, op_, name);
    check_float(view.dtype, name);
    owners_.push_back(view.owner);
    note(view.data, view.stride * size_of(view.dtype));
    return {view.data, view.stride, view.dtype};
  }

  Parameter parameter(const OptTensor& t, const char* name) {
    if (!t.has_value()) return {nullptr, DType::kF32};
    check_device(*t, name);
    VK_CHECK(t->dim() == 1 && t->numel() == C_, op_, name, " must have shape (C,)");
    owners_.push_back(torch::stable::contiguous(*t));
    const DType dtype = dtype_of(*t, op_, name);
    check_float(dtype, name);
    note(owners_.back().const_data_ptr(), 0);
    return {owners_.back().const_data_ptr(), dtype};
  }

  const float* floats(const OptTensor& t, int64_t numel, const char* name) {
    if (!t.has_value()) return nullptr;
    check_device(*t, name);
    VK_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == numel && t->is_contiguous(),
             op_, name, " must be contiguous float32 with ", numel, " elements");
    return static_cast<const float*>(t->const_data_ptr());
  }
  const float* row_scale(const OptTensor& t) { return floats(t, samples_, "row_scale"); }

  Dropout dropout(const OptTensor& seed, double p) {
    if (p == 0.0) return {nullptr, 0, 1.0f};
    VK_CHECK(p > 0.0 && p < 1.0, op_, "dropout_p must be in [0, 1), got ", p);
    VK_CHECK(seed.has_value(), op_, "seed must be given when dropout_p > 0");
    check_device(*seed, "seed");
    VK_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op_,
             "seed must be one int64");
    return {static_cast<const int64_t*>(seed->const_data_ptr()),
            static_cast<uint64_t>(std::nearbyint(p * 0x1p32)), static_cast<float>(1.0 / (1.0 - p))};
  }

  // A new contiguous tensor and its view.
  Output output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype,
                Tensor* out) {
    *out = empty_like_shape(like, shape, dtype);
    const DType tag = dtype_of(dtype, op_, "an output's dtype");
    check_float(tag, "an output's dtype");
    note(out->const_data_ptr(), C_ * size_of(tag));
    return {out->mutable_data_ptr(), tag};
  }

 private:
  void check_device(const Tensor& t, const char* name) {
    VK_CHECK(Device::holds(t), op_, name, " is on another device than this kernel's");
  }
  void check_float(DType dtype, const char* name) {
    VK_CHECK(dtype != DType::kBool, op_, name, " must be float32, bfloat16 or float16, got bool");
  }
  void note(const void* data, int64_t row_bytes) {
    aligned_ = aligned_ && reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
  }

  const char* op_;
  int64_t C_, numel_, rows_ = 0, samples_ = 1;
  bool aligned_ = true;
  std::vector<Tensor> owners_;  // contiguous copies, alive until the launch
};

std::vector<int64_t> without_last(std::vector<int64_t> shape) {
  shape.pop_back();
  return shape;
}

add_layer_norm::Setting setting(const Device& device, Widths widths) {
  return {device.multiprocessors(), device.architecture(), branch_pieces(widths),
          stream_pieces(widths), y_pieces(widths)};
}

template <class Args>
void set_plan(Args& a, const Plan& p) {
  const int64_t step = p.blocks * p.rows_per_block();
  a.lanes = p.lanes;
  a.slots = p.slots;
  a.step_samples = step / a.rows_per_sample;
  a.step_rest = step % a.rows_per_sample;
}

template <Form FORM>
void launch_forward(const Device& device, Operands& operands, ForwardArgs& a) {
  a.rows = operands.rows();
  a.rows_per_sample = operands.rows_per_sample();
  a.C = operands.C();
  a.divisor = Divisor(a.C);
  const Widths widths = forward_widths(FORM, a);
  const Plan p = add_layer_norm::plan(a.rows, a.C, operands.aligned(), widths != Widths::kAny,
                                      Pass::kForward, setting(device, widths));
  set_plan(a, p);
  if (a.rows > 0)
    device.launch(forward_instance<FORM>(p, widths), dim3(static_cast<unsigned>(p.blocks)),
                  dim3(p.threads), p.shared_bytes, a);
}

// Launches the backward and, where a parameter's gradient is wanted, the sums over its blocks.
void launch_backward(Device& device, Operands& operands, BackwardArgs& a, const Tensor& like,
                     const OptTensor (&gradients)[3]) {
  a.rows = operands.rows();
  a.rows_per_sample = operands.rows_per_sample();
  a.C = operands.C();
  a.divisor = Divisor(a.C);
  const bool dgamma = gradients[2].has_value();
  const Widths widths = backward_widths(dgamma, a);
  const Plan p = add_layer_norm::plan(a.rows, a.C, operands.aligned(), widths != Widths::kAny,
                                      backward_pass(dgamma), setting(device, widths));
  set_plan(a, p);
  OptTensor scratch;
  FinishArgs finish{};
  bool any = false;
  for (int i = 0; i < 3; ++i) {
    if (!gradients[i].has_value()) continue;
    any = true;
    finish.out[i] = {gradients[i]->mutable_data_ptr(),
                     dtype_of(*gradients[i], "layer norm backward", "parameter")};
    finish.blocks[i] = i < 2 && a.dy.data == nullptr ? 0 : p.blocks;
  }
  if (any) {
    scratch = empty_like_shape(like, {3, p.blocks, a.C}, ScalarType::Float);
    a.partial = static_cast<float*>(scratch->mutable_data_ptr());
    finish.partial = a.partial;
    finish.stride = p.blocks * a.C;
    finish.columns = a.C;
  }
  const BackwardKernel kernel =
      dgamma ? backward_instance<true>(p, widths) : backward_instance<false>(p, widths);
  const dim3 grid(static_cast<unsigned>(p.blocks)), block(p.threads);
  const dim3 finish_grid((static_cast<unsigned>(a.C) + kWarp - 1) / kWarp, 3),
      finish_block(kWarp, kFinishRows);
  if (a.rows > 0 && any) {
    device.launch_leading(kernel, grid, block, p.shared_bytes, a);
    device.launch_dependent(finish_kernel, finish_grid, finish_block, 0, finish);
  } else if (a.rows > 0) {
    device.launch(kernel, grid, block, p.shared_bytes, a);
  } else if (any) {
    device.launch(finish_kernel, finish_grid, finish_block, 0, finish);
  }
}

std::tuple<Tensor, OptTensor, Tensor, Tensor> add_layer_norm_fwd(
    Tensor x, OptTensor residual, OptTensor weight, OptTensor bias, OptTensor gamma,
    OptTensor row_scale, OptTensor seed, double dropout_p, double eps, ScalarType out_dtype) {
  const Device device(x);
  Operands operands("add_layer_norm_fwd", x);
  VK_CHECK(
      residual.has_value() || (!gamma.has_value() && !row_scale.has_value() && dropout_p == 0.0),
      "add_layer_norm_fwd", "residual must be given when the branch is scaled or dropped");
  const std::vector<int64_t> shape = shape_of(x);
  Tensor y, z, mean = empty_like_shape(x, without_last(shape), ScalarType::Float),
               rstd = empty_like_shape(x, without_last(shape), ScalarType::Float);
  ForwardArgs a{};
  a.x = operands.rows(x, "x");
  a.residual = operands.rows(residual, "residual");
  a.weight = operands.parameter(weight, "weight");
  a.bias = operands.parameter(bias, "bias");
  a.gamma = operands.parameter(gamma, "gamma");
  a.row_scale = operands.row_scale(row_scale);
  a.dropout = operands.dropout(seed, dropout_p);
  a.y = operands.output(x, shape, out_dtype, &y);
  if (residual.has_value()) a.z = operands.output(*residual, shape, residual->scalar_type(), &z);
  a.mean = static_cast<float*>(mean.mutable_data_ptr());
  a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  a.eps = static_cast<float>(eps);
  launch_forward<Form::kAddNorm>(device, operands, a);
  return {y, residual.has_value() ? OptTensor(z) : OptTensor(), mean, rstd};
}

std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor> add_layer_norm_bwd(
    OptTensor dy, OptTensor dnew_residual, Tensor z, Tensor mean, Tensor rstd, OptTensor x,
    OptTensor weight, OptTensor bias, OptTensor gamma, OptTensor row_scale, OptTensor seed,
    double dropout_p, ScalarType x_dtype, std::vector<bool> output_mask) {
  const char* op = "add_layer_norm_bwd";
  Device device(z);
  Operands operands(op, z);
  VK_CHECK(output_mask.size() == 5, op, "output_mask must have 5 entries, got ",
           output_mask.size());
  VK_CHECK(!output_mask[4] || x.has_value(), op,
           "x must be given when the gradient of gamma is wanted");
  const std::vector<int64_t> shape = shape_of(z);
  BackwardArgs a{};
  a.dy = operands.rows(dy, "dy");
  a.dz = operands.rows(dnew_residual, "dnew_residual");
  a.z = operands.rows(z, "z");
  if (output_mask[4]) a.x = operands.rows(x, "x");
  a.mean = operands.floats(mean, operands.rows(), "mean");
  a.rstd = operands.floats(rstd, operands.rows(), "rstd");
  a.weight = operands.parameter(weight, "weight");
  a.gamma = operands.parameter(gamma, "gamma");
  a.row_scale = operands.row_scale(row_scale);
  a.dropout = operands.dropout(seed, dropout_p);
  Tensor dx, dresidual;
  if (output_mask[0]) a.dx = operands.output(z, shape, x_dtype, &dx);
  if (output_mask[1]) a.dresidual = operands.output(z, shape, z.scalar_type(), &dresidual);
  OptTensor gradients[3];
  const OptTensor* parameters[3] = {&weight, &bias, &gamma};
  for (int i = 0; i < 3; ++i) {
    if (!output_mask[2 + i]) continue;
    VK_CHECK(parameters[i]->has_value(), op,
             "output_mask asks for the gradient of a parameter that is None");
    gradients[i] =
        empty_like_shape(**parameters[i], {operands.C()}, (*parameters[i])->scalar_type());
  }
  launch_backward(device, operands, a, z, gradients);
  return {output_mask[0] ? OptTensor(dx) : OptTensor(),
          output_mask[1] ? OptTensor(dresidual) : OptTensor(), gradients[0], gradients[1],
          gradients[2]};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_add_fwd(Tensor x, Tensor residual, OptTensor weight,
                                                      OptTensor bias, OptTensor row_scale,
                                                      double eps) {
  const Device device(x);
  Operands operands("layer_norm_add_fwd", x);
  const std::vector<int64_t> shape = shape_of(x);
  Tensor out, mean = empty_like_shape(x, without_last(shape), ScalarType::Float),
              rstd = empty_like_shape(x, without_last(shape), ScalarType::Float);
  ForwardArgs a{};
  a.x = operands.rows(x, "x");
  a.residual = operands.rows(residual, "residual");
  a.weight = operands.parameter(weight, "weight");
  a.bias = operands.parameter(bias, "bias");
  a.row_scale = operands.row_scale(row_scale);
  a.y = operands.output(residual, shape, residual.scalar_type(), &out);
  a.mean = static_cast<float*>(mean.mutable_data_ptr());
  a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  a.eps = static_cast<float>(eps);
  launch_forward<Form::kNormAdd>(device, operands, a);
  return {out, mean, rstd};
}

std::tuple<OptTensor, OptTensor, OptTensor> layer_norm_add_bwd(Tensor dout, Tensor x, Tensor mean,
                                                               Tensor rstd, OptTensor weight,
                                                               OptTensor bias, OptTensor row_scale,
                                                               std::vector<bool> output_mask) {
  const char* op = "layer_norm_add_bwd";
  Device device(x);
  Operands operands(op, x);
  VK_CHECK(output_mask.size() == 3, op, "output_mask must have 3 entries, got ",
           output_mask.size());
  BackwardArgs a{};
  a.dy = operands.rows(dout, "dout");
  a.z = operands.rows(x, "x");
  a.mean = operands.floats(mean, operands.rows(), "mean");
  a.rstd = operands.floats(rstd, operands.rows(), "rstd");
  a.weight = operands.parameter(weight, "weight");
  a.row_scale = operands.row_scale(row_scale);
  a.scale_dy = true;
  Tensor dx;
  if (output_mask[0]) a.dx = operands.output(x, shape_of(x), x.scalar_type(), &dx);
  OptTensor gradients[3];
  const OptTensor* parameters[2] = {&weight, &bias};
  for (int i = 0; i < 2; ++i) {
    if (!output_mask[1 + i]) continue;
    VK_CHECK(parameters[i]->has_value(), op,
             "output_mask asks for the gradient of a parameter that is None");
    gradients[i] =
        empty_like_shape(**parameters[i], {operands.C()}, (*parameters[i])->scalar_type());
  }
  launch_backward(device, operands, a, x, gradients);
  return {output_mask[0] ? OptTensor(dx) : OptTensor(), gradients[0], gradients[1]};
}

}  // namespace
}  // namespace vitkernels

VK_CUDA_LIBRARY_IMPL(m) {
  m.impl("add_layer_norm_fwd.cuda", TORCH_BOX(&vitkernels::add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd.cuda", TORCH_BOX(&vitkernels::add_layer_norm_bwd));
  m.impl("layer_norm_add_fwd.cuda", TORCH_BOX(&vitkernels::layer_norm_add_fwd));
  m.impl("layer_norm_add_bwd.cuda", TORCH_BOX(&vitkernels::layer_norm_add_bwd));
}
