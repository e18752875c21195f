// Launchers of attention on the CPU: cheap checks, outputs, work items, registration. Kernels:
// attention_cpu_kernels.cpp.
#include "attention/attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/scratch.h"
#include "common/stable.h"

namespace vitkernels {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kDbiasItems = 32;  // work items wanted when dbias has fewer slices than that

const AttentionTable& kernels() { return VK_PICK_TABLE(attention); }

void run_items(void (*kernel)(const AttentionArgs&, int64_t, int64_t, void*),
               const AttentionArgs& args, int64_t items, int64_t scratch_bytes) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, thread_scratch(scratch_bytes));
  });
}

// (B, N, H, D) with unit stride along D; `owner` holds the copy where one had to be made.
HeadView heads(const Tensor& t, Tensor* owner) {
  *owner = t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
  return {const_cast<void*>(owner->const_data_ptr()), owner->stride(0), owner->stride(1),
          owner->stride(2)};
}

// The heads `which` (0 = q, 1 = k, 2 = v) of a packed (B, N, 3 * H * D) tensor, or of (B, N, H * D)
// with which = 0.
HeadView packed_heads(const Tensor& t, int64_t which, int64_t H, int64_t D, Tensor* owner) {
  *owner = t.size(2) == 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t);
  char* data = static_cast<char*>(const_cast<void*>(owner->const_data_ptr()));
  return {data + which * H * D * size_of(dtype_of(t, "attention_qkvpacked", "qkv")),
          owner->stride(0), owner->stride(1), D};
}

HeadView output_heads(void* data, int64_t N, int64_t row, int64_t D) {
  return {data, N * row, row, D};
}

void check_like(const Tensor& t, const std::vector<int64_t>& shape, ScalarType dtype,
                const char* op, const char* name) {
  VK_CHECK(shape_of(t) == shape, op, name, " has the wrong shape");
  VK_CHECK(t.scalar_type() == dtype, op, name, " has the wrong dtype");
}

void set_sizes(AttentionArgs* args, int64_t B, int64_t H, int64_t Nq, int64_t Nk, int64_t D,
               DType dtype, const char* op) {
  VK_CHECK(H >= 1 && Nq >= 1 && Nk >= 1, op, "expected at least one head, query and key");
  VK_CHECK(D >= 1 && D <= kMaxHeadDim, op, "head dim must be in [1, ", kMaxHeadDim, "], got ", D);
  args->B = B, args->H = H, args->Nq = Nq, args->Nk = Nk, args->D = D, args->dtype = dtype;
}

// bias, key_padding_mask, dropout and scale, for sizes that are set already.
void set_options(AttentionArgs* args, const OptTensor& bias, const OptTensor& key_padding_mask,
                 const OptTensor& seed, double scale, double dropout_p, const char* op) {
  args->scale = static_cast<float>(scale);
  if (bias.has_value()) {
    VK_CHECK(bias->dim() == 4, op, "bias must have 4 dimensions, got ", bias->dim());
    const int64_t full[4] = {args->B, args->H, args->Nq, args->Nk};
    int64_t strides[4];
    for (int d = 0; d < 4; ++d) {
      VK_CHECK(bias->size(d) == 1 || bias->size(d) == full[d], op, "bias dimension ", d,
               " must be 1 or ", full[d], ", got ", bias->size(d));
      strides[d] = bias->size(d) == 1 ? 0 : bias->stride(d);
    }
    args->bias = {bias->const_data_ptr(),
                  strides[0],
                  strides[1],
                  strides[2],
                  strides[3],
                  float_or_bool_dtype_of(*bias, op, "bias")};
  }
  if (key_padding_mask.has_value()) {
    check_like(*key_padding_mask, {args->B, args->Nk}, ScalarType::Bool, op, "key_padding_mask");
    args->padding = static_cast<const uint8_t*>(key_padding_mask->const_data_ptr());
    args->padding_batch = key_padding_mask->stride(0);
    args->padding_column = key_padding_mask->stride(1);
  }
  VK_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, "dropout_p must be in [0, 1), got ", dropout_p);
  if (dropout_p > 0.0) {
    VK_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
             "seed must be one int64 when dropout_p > 0");
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
  args.q = heads(q, &owners[0]);
  args.k = heads(k, &owners[1]);
  args.v = heads(v, &owners[2]);
  Tensor out = empty_like_shape(q, {B, Nq, H, D}, q.scalar_type());
  Tensor lse = empty_like_shape(q, {B, H, Nq}, ScalarType::Float);
  args.out = output_heads(out.mutable_data_ptr(), Nq, H * D, D);
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
  args.q = heads(q, &owners[0]);
  args.k = heads(k, &owners[1]);
  args.v = heads(v, &owners[2]);
  args.out = heads(out, &owners[3]);
  args.dout = heads(dout, &owners[4]);
  const Tensor lse_contiguous = torch::stable::contiguous(lse);
  args.lse = const_cast<float*>(static_cast<const float*>(lse_contiguous.const_data_ptr()));
  OptTensor grads[3];
  HeadView* const views[3] = {&args.dq, &args.dk, &args.dv};
  for (int i = 0; i < 3; ++i) {
    if (!output_mask[i]) continue;
    const int64_t N = i == 0 ? Nq : Nk;
    grads[i] = empty_like_shape(q, {B, N, H, D}, dtype);
    *views[i] = output_heads(grads[i]->mutable_data_ptr(), N, H * D, D);
  }
  OptTensor dbias = run_backward(&args, q, bias, output_mask[3], op);
  return {grads[0], grads[1], grads[2], dbias};
}

// Sizes and q, k, v of a packed tensor.
void set_packed(AttentionArgs* args, const Tensor& qkv, int64_t num_heads, Tensor* owner,
                const char* op) {
  VK_CHECK(qkv.dim() == 3, op, "qkv must have 3 dimensions (B, N, 3 * H * D)");
  VK_CHECK(num_heads >= 1 && qkv.size(2) % (3 * num_heads) == 0, op,
           "qkv's last dimension must be a multiple of 3 * num_heads");
  const int64_t N = qkv.size(1), D = qkv.size(2) / (3 * num_heads);
  set_sizes(args, qkv.size(0), num_heads, N, N, D, dtype_of(qkv, op, "qkv"), op);
  HeadView* const views[3] = {&args->q, &args->k, &args->v};
  for (int i = 0; i < 3; ++i)
    *views[i] = packed_heads(i == 0 ? qkv : *owner, i, num_heads, D, owner);
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
  args.out = output_heads(out.mutable_data_ptr(), args.Nq, row, args.D);
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
  args.dout = packed_heads(dout, 0, args.H, args.D, &owners[1]);
  args.out = packed_heads(out, 0, args.H, args.D, &owners[2]);
  const Tensor lse_contiguous = torch::stable::contiguous(lse);
  args.lse = const_cast<float*>(static_cast<const float*>(lse_contiguous.const_data_ptr()));
  OptTensor dqkv;
  if (output_mask[0]) {
    dqkv = empty_like_shape(qkv, {args.B, args.Nq, 3 * row}, qkv.scalar_type());
    char* data = static_cast<char*>(dqkv->mutable_data_ptr());
    HeadView* const views[3] = {&args.dq, &args.dk, &args.dv};
    for (int i = 0; i < 3; ++i)
      *views[i] = output_heads(data + i * row * size_of(args.dtype), args.Nq, 3 * row, args.D);
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
