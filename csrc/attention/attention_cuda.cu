// The launcher of attention's CUDA kernels: checks, views of the operands, the choice of the path,
// and registration. Kernels: attention_simt.cu, _sm80*.cu, _sm90*.cu.
#include "attention/attention_cuda.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention/attention_checks.h"

namespace vitkernels {
namespace {

using namespace attention;

// For sizes that are set already.
void set_options(Args* args, const OptTensor& bias, const OptTensor& key_padding_mask,
                 const OptTensor& seed, double scale, double dropout_p, const char* op) {
  set_masks(args, bias, key_padding_mask, scale, op);
  if (check_dropout(seed, dropout_p, op))
    args->dropout = {static_cast<const int64_t*>(seed->const_data_ptr()),
                     static_cast<uint64_t>(std::nearbyint(dropout_p * 0x1p32)),
                     static_cast<float>(1.0 / (1.0 - dropout_p))};
  const OptTensor* const operands[] = {&bias, &key_padding_mask, dropout_p > 0.0 ? &seed : &bias};
  for (const OptTensor* t : operands)
    VK_CHECK(!t->has_value() || Device::holds(**t), op,
             "bias, key_padding_mask and seed must be on the GPU");
}

void check_here(const Tensor& t, const char* op, const char* name) {
  VK_CHECK(Device::holds(t), op, name, " must be on the GPU");
  for (int64_t d = 0; d < t.dim(); ++d)
    VK_CHECK(t.size(d) <= INT32_MAX, op, name, " dimension ", d, " must be below 2^31, got ",
             t.size(d));
}

// The kernels of few tokens go first; where they refuse, those of many may serve.
bool is_long(const Args& args, int most_tokens) { return std::max(args.Nq, args.Nk) > most_tokens; }

void run_forward(const Device& device, const Tensor& like, const Args& args, const char* op) {
  if (args.B == 0) return;
  const bool long90 = is_long(args, 272);
  switch (choose_cuda_path(op, device.architecture(),
                           long90 ? sm90_long_refuses_forward(args) : sm90_refuses_forward(args),
                           sm80_refuses_forward(args))) {
    case CudaPath::kSm90:
      long90 ? forward_sm90_long(device, like, args) : forward_sm90(device, like, args);
      break;
    case CudaPath::kSm80:
      forward_sm80(device, like, args);
      break;
    default:
      forward_simt(device, like, args);
  }
}

// dbias of bias's shape and dtype; fills args' dbias fields and runs the backward.
OptTensor run_backward(const Device& device, const Tensor& like, Args* args, const OptTensor& bias,
                       bool want_dbias, const char* op) {
  OptTensor dbias;
  if (want_dbias) {
    VK_CHECK(bias.has_value() && args->bias.dtype != DType::kBool, op,
             "output_mask asks for dbias without a float bias");
    dbias = empty_like_shape(like, shape_of(*bias), bias->scalar_type());
    args->dbias = dbias->mutable_data_ptr();
    args->dbias_batch = static_cast<int>(bias->size(0));
    args->dbias_heads = static_cast<int>(bias->size(1));
    args->dbias_rows = static_cast<int>(bias->size(2));
    args->dbias_columns = static_cast<int>(bias->size(3));
    if (args->B == 0) torch::stable::zero_(*dbias);
  }
  const bool wanted = want_dbias || args->dq.data != nullptr || args->dk.data != nullptr ||
                      args->dv.data != nullptr;
  if (args->B == 0 || !wanted) return dbias;
  const bool long90 = is_long(*args, 256) || args->D > 64;
  switch (
      choose_cuda_path(op, device.architecture(),
                       long90 ? sm90_long_refuses_backward(*args) : sm90_refuses_backward(*args),
                       sm80_refuses_backward(*args))) {
    case CudaPath::kSm90:
      long90 ? backward_sm90_long(device, like, *args) : backward_sm90(device, like, *args);
      break;
    case CudaPath::kSm80:
      backward_sm80(device, like, *args);
      break;
    default:
      backward_simt(device, like, *args);
  }
  return dbias;
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, OptTensor bias,
                                         OptTensor key_padding_mask, OptTensor seed, double scale,
                                         double dropout_p) {
  const char* op = "attention_fwd";
  VK_CHECK(q.dim() == 4 && k.dim() == 4, op, "q, k and v must have 4 dimensions (B, N, H, D)");
  check_here(q, op, "q"), check_here(k, op, "k"), check_here(v, op, "v");
  const Device device(q);
  const int64_t B = q.size(0), Nq = q.size(1), H = q.size(2), D = q.size(3), Nk = k.size(1);
  check_like(k, {B, Nk, H, D}, q.scalar_type(), op, "k");
  check_like(v, {B, Nk, H, D}, q.scalar_type(), op, "v");
  Args args{};
  set_sizes(&args, B, H, Nq, Nk, D, dtype_of(q, op, "q"), op);
  set_options(&args, bias, key_padding_mask, seed, scale, dropout_p, op);
  Tensor owners[3];
  args.q = heads<HeadView>(q, &owners[0]);
  args.k = heads<HeadView>(k, &owners[1]);
  args.v = heads<HeadView>(v, &owners[2]);
  Tensor out = empty_like_shape(q, {B, Nq, H, D}, q.scalar_type());
  Tensor lse = empty_like_shape(q, {B, H, Nq}, ScalarType::Float);
  args.out = output_heads<HeadView>(out.mutable_data_ptr(), Nq, H * D, D);
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  run_forward(device, q, args, op);
  return {out, lse};
}

std::tuple<OptTensor, OptTensor, OptTensor, OptTensor> attention_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptTensor bias,
    OptTensor key_padding_mask, OptTensor seed, double scale, double dropout_p,
    std::vector<bool> output_mask) {
  const char* op = "attention_bwd";
  VK_CHECK(output_mask.size() == 4, op, "output_mask must have 4 entries, got ",
           output_mask.size());
  VK_CHECK(q.dim() == 4 && k.dim() == 4, op, "q, k and v must have 4 dimensions (B, N, H, D)");
  check_here(q, op, "q"), check_here(k, op, "k"), check_here(v, op, "v");
  check_here(dout, op, "dout"), check_here(out, op, "out"), check_here(lse, op, "lse");
  const Device device(q);
  const int64_t B = q.size(0), Nq = q.size(1), H = q.size(2), D = q.size(3), Nk = k.size(1);
  const ScalarType dtype = q.scalar_type();
  check_like(k, {B, Nk, H, D}, dtype, op, "k");
  check_like(v, {B, Nk, H, D}, dtype, op, "v");
  check_like(dout, {B, Nq, H, D}, dtype, op, "dout");
  check_like(out, {B, Nq, H, D}, dtype, op, "out");
  check_like(lse, {B, H, Nq}, ScalarType::Float, op, "lse");
  Args args{};
  set_sizes(&args, B, H, Nq, Nk, D, dtype_of(q, op, "q"), op);
  set_options(&args, bias, key_padding_mask, seed, scale, dropout_p, op);
  Tensor owners[5];
  args.q = heads<HeadView>(q, &owners[0]);
  args.k = heads<HeadView>(k, &owners[1]);
  args.v = heads<HeadView>(v, &owners[2]);
  args.out = heads<HeadView>(out, &owners[3]);
  args.dout = heads<HeadView>(dout, &owners[4]);
  const Tensor lse_contiguous = torch::stable::contiguous(lse);
  args.lse = const_cast<float*>(static_cast<const float*>(lse_contiguous.const_data_ptr()));
  OptTensor grads[3];
  HeadView* const views[3] = {&args.dq, &args.dk, &args.dv};
  for (int i = 0; i < 3; ++i) {
    if (!output_mask[i]) continue;
    const int64_t N = i == 0 ? Nq : Nk;
    grads[i] = empty_like_shape(q, {B, N, H, D}, dtype);
    *views[i] = output_heads<HeadView>(grads[i]->mutable_data_ptr(), N, H * D, D);
  }
  OptTensor dbias = run_backward(device, q, &args, bias, output_mask[3], op);
  return {grads[0], grads[1], grads[2], dbias};
}

std::tuple<Tensor, Tensor> attention_qkvpacked_fwd(Tensor qkv, int64_t num_heads, OptTensor bias,
                                                   OptTensor key_padding_mask, OptTensor seed,
                                                   double scale, double dropout_p) {
  const char* op = "attention_qkvpacked_fwd";
  check_here(qkv, op, "qkv");
  const Device device(qkv);
  Args args{};
  Tensor owner;
  set_packed(&args, qkv, num_heads, &owner, op);
  set_options(&args, bias, key_padding_mask, seed, scale, dropout_p, op);
  const int64_t row = static_cast<int64_t>(args.H) * args.D;
  Tensor out = empty_like_shape(qkv, {args.B, args.Nq, row}, qkv.scalar_type());
  Tensor lse = empty_like_shape(qkv, {args.B, args.H, args.Nq}, ScalarType::Float);
  args.out = output_heads<HeadView>(out.mutable_data_ptr(), args.Nq, row, args.D);
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  run_forward(device, qkv, args, op);
  return {out, lse};
}

std::tuple<OptTensor, OptTensor> attention_qkvpacked_bwd(Tensor dout, Tensor qkv, int64_t num_heads,
                                                         Tensor out, Tensor lse, OptTensor bias,
                                                         OptTensor key_padding_mask, OptTensor seed,
                                                         double scale, double dropout_p,
                                                         std::vector<bool> output_mask) {
  const char* op = "attention_qkvpacked_bwd";
  VK_CHECK(output_mask.size() == 2, op, "output_mask must have 2 entries, got ",
           output_mask.size());
  check_here(qkv, op, "qkv"), check_here(dout, op, "dout");
  check_here(out, op, "out"), check_here(lse, op, "lse");
  const Device device(qkv);
  Args args{};
  Tensor owners[3];
  set_packed(&args, qkv, num_heads, &owners[0], op);
  set_options(&args, bias, key_padding_mask, seed, scale, dropout_p, op);
  const int64_t row = static_cast<int64_t>(args.H) * args.D;
  check_like(dout, {args.B, args.Nq, row}, qkv.scalar_type(), op, "dout");
  check_like(out, {args.B, args.Nq, row}, qkv.scalar_type(), op, "out");
  check_like(lse, {args.B, args.H, args.Nq}, ScalarType::Float, op, "lse");
  args.dout = packed_heads<HeadView>(dout, 0, args.H, args.D, &owners[1]);
  args.out = packed_heads<HeadView>(out, 0, args.H, args.D, &owners[2]);
  const Tensor lse_contiguous = torch::stable::contiguous(lse);
  args.lse = const_cast<float*>(static_cast<const float*>(lse_contiguous.const_data_ptr()));
  OptTensor dqkv;
  if (output_mask[0]) {
    dqkv = empty_like_shape(qkv, {args.B, args.Nq, 3 * row}, qkv.scalar_type());
    char* data = static_cast<char*>(dqkv->mutable_data_ptr());
    HeadView* const views[3] = {&args.dq, &args.dk, &args.dv};
    for (int i = 0; i < 3; ++i)
      *views[i] =
          output_heads<HeadView>(data + i * row * size_of(args.dtype), args.Nq, 3 * row, args.D);
  }
  OptTensor dbias = run_backward(device, qkv, &args, bias, output_mask[1], op);
  return {dqkv, dbias};
}

}  // namespace
}  // namespace vitkernels

VK_CUDA_LIBRARY_IMPL(m) {
  m.impl("attention_fwd.cuda", TORCH_BOX(&vitkernels::attention_fwd));
  m.impl("attention_bwd.cuda", TORCH_BOX(&vitkernels::attention_bwd));
  m.impl("attention_qkvpacked_fwd.cuda", TORCH_BOX(&vitkernels::attention_qkvpacked_fwd));
  m.impl("attention_qkvpacked_bwd.cuda", TORCH_BOX(&vitkernels::attention_qkvpacked_bwd));
}
