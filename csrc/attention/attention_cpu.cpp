// Launchers of attention on the CPU: cheap checks, outputs, work items, registration. Kernels:
// attention_cpu_kernels.cpp.
#include "attention/attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention/attention_checks.h"
#include "common/scratch.h"

namespace vitkernels {
namespace {

using namespace attention;

constexpr int64_t kDbiasItems = 32;  // work items wanted when dbias has fewer slices than that

const AttentionTable& kernels() { return VK_PICK_TABLE(attention); }

void run_items(void (*kernel)(const AttentionArgs&, int64_t, int64_t, void*),
               const AttentionArgs& args, int64_t items, int64_t scratch_bytes) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, thread_scratch(scratch_bytes));
  });
}

// bias, key_padding_mask, dropout and scale, for sizes that are set already.
void set_options(AttentionArgs* args, const OptTensor& bias, const OptTensor& key_padding_mask,
                 const OptTensor& seed, double scale, double dropout_p, const char* op) {
  set_masks(args, bias, key_padding_mask, scale, op);
  if (check_dropout(seed, dropout_p, op)) {
    args->dropout = true;
    args->seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    args->threshold = static_cast<uint64_t>(std::nearbyint(dropout_p * 4294967296.0));
    args->keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  }
}

void run_forward(const AttentionArgs& args) {
  run_items(kernels().forward, args, args.B * args.H * kernels().query_blocks(args),
            kernels().forward_scratch(args));
}

// dbias of bias's shape and dtype; fills args' dbias fields and runs the backward. Without dbias a
// work item is one head; with it, one slice of dbias or one of `chunks` fixed parts of the heads
// that a slice sums over.
OptTensor run_backward(AttentionArgs* args, const Tensor& like, const OptTensor& bias,
                       bool want_dbias, const char* op) {
  if (!want_dbias) {
    if (args->dq.data != nullptr || args->dk.data != nullptr || args->dv.data != nullptr)
      run_items(kernels().backward, *args, args->B * args->H, kernels().backward_scratch(*args));
    return std::nullopt;
  }
  VK_CHECK(bias.has_value() && args->bias.dtype != DType::kBool, op,
           "output_mask asks for dbias without a float bias");
  Tensor dbias = empty_like_shape(like, shape_of(*bias), bias->scalar_type());
  args->dbias = dbias.mutable_data_ptr();
  args->dbias_dtype = args->bias.dtype;
  args->dbias_rows = bias->size(2);
  args->dbias_columns = bias->size(3);
  args->sum_batch = bias->size(0) == 1;
  args->sum_head = bias->size(1) == 1;
  const int64_t slices = bias->size(0) * bias->size(1),
                members = args->B * args->H / std::max<int64_t>(1, slices);
  args->chunks = std::max<int64_t>(
      1, std::min(members, (kDbiasItems + slices - 1) / std::max<int64_t>(1, slices)));
  std::optional<Tensor> partials;
  if (args->chunks > 1) {
    partials = empty_like_shape(
        like, {slices * args->chunks, args->dbias_rows, args->dbias_columns}, ScalarType::Float);
    args->dbias_partial = static_cast<float*>(partials->mutable_data_ptr());
  }
  run_items(kernels().backward, *args, slices * args->chunks, kernels().backward_scratch(*args));
  if (args->chunks > 1) {
    const auto reduce = kernels().reduce_dbias;
    torch::stable::parallel_for(0, slices, 1,
                                [&](int64_t begin, int64_t end) { reduce(*args, begin, end); });
  }
  return dbias;
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, OptTensor bias,
                                         OptTensor key_padding_mask, OptTensor seed, double scale,
                                         double dropout_p) {
  const char* op = "attention_fwd";
  VK_CHECK(q.dim() == 4 && k.dim() == 4, op, "q, k and v must have 4 dimensions (B, N, H, D)");
  const int64_t B = q.size(0), Nq = q.size(1), H = q.size(2), D = q.size(3), Nk = k.size(1);
  check_like(k, {B, Nk, H, D}, q.scalar_type(), op, "k");
  check_like(v, {B, Nk, H, D}, q.scalar_type(), op, "v");
  AttentionArgs args{};
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
  run_forward(args);
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
  const int64_t B = q.size(0), Nq = q.size(1), H = q.size(2), D = q.size(3), Nk = k.size(1);
  const ScalarType dtype = q.scalar_type();
  check_like(k, {B, Nk, H, D}, dtype, op, "k");
  check_like(v, {B, Nk, H, D}, dtype, op, "v");
  check_like(dout, {B, Nq, H, D}, dtype, op, "dout");
  check_like(out, {B, Nq, H, D}, dtype, op, "out");
  check_like(lse, {B, H, Nq}, ScalarType::Float, op, "lse");
  AttentionArgs args{};
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
  OptTensor dbias = run_backward(&args, q, bias, output_mask[3], op);
  return {grads[0], grads[1], grads[2], dbias};
}

std::tuple<Tensor, Tensor> attention_qkvpacked_fwd(Tensor qkv, int64_t num_heads, OptTensor bias,
                                                   OptTensor key_padding_mask, OptTensor seed,
                                                   double scale, double dropout_p) {
  const char* op = "attention_qkvpacked_fwd";
  AttentionArgs args{};
  Tensor owner;
  set_packed(&args, qkv, num_heads, &owner, op);
  set_options(&args, bias, key_padding_mask, seed, scale, dropout_p, op);
  const int64_t row = args.H * args.D;
  Tensor out = empty_like_shape(qkv, {args.B, args.Nq, row}, qkv.scalar_type());
  Tensor lse = empty_like_shape(qkv, {args.B, args.H, args.Nq}, ScalarType::Float);
  args.out = output_heads<HeadView>(out.mutable_data_ptr(), args.Nq, row, args.D);
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  run_forward(args);
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
  AttentionArgs args{};
  Tensor owners[3];
  set_packed(&args, qkv, num_heads, &owners[0], op);
  set_options(&args, bias, key_padding_mask, seed, scale, dropout_p, op);
  const int64_t row = args.H * args.D;
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
  OptTensor dbias = run_backward(&args, qkv, bias, output_mask[1], op);
  return {dqkv, dbias};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&vitkernels::attention_fwd));
  m.impl("attention_fwd.cpu", TORCH_BOX(&vitkernels::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&vitkernels::attention_bwd));
  m.impl("attention_bwd.cpu", TORCH_BOX(&vitkernels::attention_bwd));
  m.impl("attention_qkvpacked_fwd", TORCH_BOX(&vitkernels::attention_qkvpacked_fwd));
  m.impl("attention_qkvpacked_fwd.cpu", TORCH_BOX(&vitkernels::attention_qkvpacked_fwd));
  m.impl("attention_qkvpacked_bwd", TORCH_BOX(&vitkernels::attention_qkvpacked_bwd));
  m.impl("attention_qkvpacked_bwd.cpu", TORCH_BOX(&vitkernels::attention_qkvpacked_bwd));
}
