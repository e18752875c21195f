// The launcher of window_attention's CUDA kernels: checks, views of the operands, the choice of the
// path, and registration. Kernels: window_attention_simt.cu, _sm80.cu, _sm90.cu.
#include "window_attention/window_attention_cuda.h"

#include <cmath>
#include <tuple>

#include "window_attention/window_attention_checks.h"

namespace vitkernels {
namespace {

using namespace window_attention;

constexpr char kPlace[] = "the GPU";

bool is_here(const Tensor& t) { return Device::holds(t); }

// `owner` holds the copy where one had to be made.
MapView map_of(const Tensor& t, Tensor* owner) {
  *owner = t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
  return {const_cast<void*>(owner->const_data_ptr()), owner->stride(0), owner->stride(1),
          owner->stride(2)};
}

// Sizes, parameters and options of either direction.
Args args_of(const Device& device, const Tensor& qkv, const Options& o, Tensor* owner,
             const char* op) {
  Args args{};
  args.architecture = device.architecture();
  set_sizes(&args, qkv, o, is_here, kPlace, op);
  for (int d = 0; d < 4; ++d)
    VK_CHECK(qkv.size(d) <= INT32_MAX, op, "qkv dimension ", d, " must be below 2^31, got ",
             qkv.size(d));
  set_parameters(&args, o, is_here, kPlace, op);
  if (check_dropout(o, is_here, kPlace, op))
    args.dropout = {static_cast<const int64_t*>(o.seed->const_data_ptr()),
                    static_cast<uint64_t>(std::nearbyint(o.dropout_p * 0x1p32)),
                    static_cast<float>(1.0 / (1.0 - o.dropout_p))};
  args.qkv = map_of(qkv, owner);
  return args;
}

std::vector<int64_t> map_shape(const Args& args, int64_t parts) {
  return {args.B, args.H, args.W, parts * args.heads * args.D};
}

std::vector<int64_t> lse_shape(const Args& args) {
  return {args.B, args.map_windows(), args.heads, args.tokens()};
}

std::tuple<Tensor, Tensor> window_attention_fwd(Tensor qkv, Tensor bias_table,
                                                OptTensor logit_scale, OptTensor seed,
                                                int64_t window_h, int64_t window_w, int64_t shift_h,
                                                int64_t shift_w, int64_t num_heads, double scale,
                                                double dropout_p) {
  const char* op = "window_attention_fwd";
  const Device device(qkv);
  const Options options{bias_table, logit_scale, seed,      window_h, window_w,
                        shift_h,    shift_w,     num_heads, scale,    dropout_p};
  Tensor owner_of_qkv, owner_of_out;
  Args args = args_of(device, qkv, options, &owner_of_qkv, op);
  Tensor out = empty_like_shape(qkv, map_shape(args, 1), qkv.scalar_type());
  Tensor lse = empty_like_shape(qkv, lse_shape(args), ScalarType::Float);
  args.out = map_of(out, &owner_of_out);
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (args.B == 0) return {out, lse};
  switch (choose_cuda_path(op, device.architecture(), sm90_refuses_forward(args),
                           sm80_refuses_forward(args))) {
    case CudaPath::kSm90:
      forward_sm90(device, qkv, args);
      break;
    case CudaPath::kSm80:
      forward_sm80(device, qkv, args);
      break;
    default:
      forward_simt(device, qkv, args);
  }
  return {out, lse};
}

std::tuple<OptTensor, OptTensor, OptTensor> window_attention_bwd(
    Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor bias_table, OptTensor logit_scale,
    OptTensor seed, int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w,
    int64_t num_heads, double scale, double dropout_p, std::vector<bool> output_mask) {
  const char* op = "window_attention_bwd";
  VK_CHECK(output_mask.size() == 3, op, "output_mask must have 3 entries, got ",
           output_mask.size());
  VK_CHECK(!output_mask[2] || logit_scale.has_value(), op,
           "output_mask asks for dlogit_scale without a logit_scale");
  const Device device(qkv);
  const Options options{bias_table, logit_scale, seed,      window_h, window_w,
                        shift_h,    shift_w,     num_heads, scale,    dropout_p};
  Tensor owners[4];
  Args args = args_of(device, qkv, options, &owners[0], op);
  check_like(dout, map_shape(args, 1), qkv.scalar_type(), is_here, kPlace, op, "dout");
  check_like(out, map_shape(args, 1), qkv.scalar_type(), is_here, kPlace, op, "out");
  check_like(lse, lse_shape(args), ScalarType::Float, is_here, kPlace, op, "lse");
  args.dout = map_of(dout, &owners[1]);
  args.out = map_of(out, &owners[2]);
  const Tensor lse_contiguous = torch::stable::contiguous(lse);
  args.lse = const_cast<float*>(static_cast<const float*>(lse_contiguous.const_data_ptr()));
  OptTensor dqkv, dbias_table, dlogit_scale;
  if (output_mask[0]) {
    dqkv = empty_like_shape(qkv, map_shape(args, 3), qkv.scalar_type());
    args.dqkv = map_of(*dqkv, &owners[3]);
  }
  if (output_mask[1]) {
    dbias_table = empty_like_shape(qkv, shape_of(bias_table), bias_table.scalar_type());
    args.dbias_table = dbias_table->mutable_data_ptr();
    if (args.B == 0) torch::stable::zero_(*dbias_table);
  }
  if (output_mask[2]) {
    dlogit_scale = empty_like_shape(qkv, shape_of(*logit_scale), logit_scale->scalar_type());
    args.dlogit_scale = dlogit_scale->mutable_data_ptr();
    if (args.B == 0) torch::stable::zero_(*dlogit_scale);
  }
  const bool wanted = output_mask[0] || output_mask[1] || output_mask[2];
  if (args.B == 0 || !wanted) return {dqkv, dbias_table, dlogit_scale};
  switch (choose_cuda_path(op, device.architecture(), sm90_refuses_backward(args),
                           sm80_refuses_backward(args))) {
    case CudaPath::kSm90:
      backward_sm90(device, qkv, args);
      break;
    case CudaPath::kSm80:
      backward_sm80(device, qkv, args);
      break;
    default:
      backward_simt(device, qkv, args);
  }
  return {dqkv, dbias_table, dlogit_scale};
}

}  // namespace
}  // namespace vitkernels

VK_CUDA_LIBRARY_IMPL(m) {
  m.impl("window_attention_fwd.cuda", TORCH_BOX(&vitkernels::window_attention_fwd));
  m.impl("window_attention_bwd.cuda", TORCH_BOX(&vitkernels::window_attention_bwd));
}
