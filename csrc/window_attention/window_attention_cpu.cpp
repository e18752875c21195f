// Launchers of window_attention on the CPU: cheap checks, outputs, work items, registration.
// Kernels: window_attention_cpu_kernels.cpp.
#include "window_attention/window_attention_cpu.h"

#include <cmath>
#include <tuple>

#include "common/scratch.h"
#include "window_attention/window_attention_checks.h"

namespace vitkernels {
namespace {

using namespace window_attention;

constexpr int kSharedSlot = 1;

bool is_cpu(const Tensor& t) { return t.is_cpu(); }

const WindowAttentionTable& kernels() { return VK_PICK_TABLE(window_attention); }

void run_items(void (*kernel)(const WindowAttentionArgs&, int64_t, int64_t, void*),
               const WindowAttentionArgs& args, int64_t items, int64_t scratch_bytes) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, thread_scratch(scratch_bytes));
  });
}

// `owner` holds the copy where one had to be made.
MapView map_of(const Tensor& t, Tensor* owner) {
  *owner = t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
  return {owner->const_data_ptr(), owner->stride(0), owner->stride(1), owner->stride(2)};
}

void set_options(WindowAttentionArgs* args, const Options& o, const char* op) {
  set_parameters(args, o, is_cpu, "the CPU", op);
  if (check_dropout(o, is_cpu, "the CPU", op)) {
    args->dropout = true;
    args->seed = static_cast<uint64_t>(*static_cast<const int64_t*>(o.seed->const_data_ptr()));
    args->threshold = static_cast<uint64_t>(std::nearbyint(o.dropout_p * 4294967296.0));
    args->keep_scale = static_cast<float>(1.0 / (1.0 - o.dropout_p));
  }
}

// Sizes and options are set; makes what all windows share.
void prepare(WindowAttentionArgs* args) {
  const int64_t bytes = kernels().shared_floats(*args) * static_cast<int64_t>(sizeof(float));
  args->shared = static_cast<float*>(thread_scratch<kSharedSlot>(bytes));
  kernels().prepare(*args);
}

std::vector<int64_t> map_shape(const WindowAttentionArgs& args, int64_t parts) {
  return {args.B, args.H, args.W, parts * args.heads * args.D};
}

std::vector<int64_t> lse_shape(const WindowAttentionArgs& args) {
  return {args.B, args.map_windows(), args.heads, args.tokens()};
}

std::tuple<Tensor, Tensor> window_attention_fwd(Tensor qkv, Tensor bias_table,
                                                OptTensor logit_scale, OptTensor seed,
                                                int64_t window_h, int64_t window_w, int64_t shift_h,
                                                int64_t shift_w, int64_t num_heads, double scale,
                                                double dropout_p) {
  const char* op = "window_attention_fwd";
  const Options options{bias_table, logit_scale, seed,      window_h, window_w,
                        shift_h,    shift_w,     num_heads, scale,    dropout_p};
  WindowAttentionArgs args{};
  set_sizes(&args, qkv, options, is_cpu, "the CPU", op);
  set_options(&args, options, op);
  Tensor owner;
  args.qkv = map_of(qkv, &owner);
  Tensor out = empty_like_shape(qkv, map_shape(args, 1), qkv.scalar_type());
  Tensor lse = empty_like_shape(qkv, lse_shape(args), ScalarType::Float);
  if (args.B == 0) return {out, lse};
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  prepare(&args);
  run_items(kernels().forward, args, args.windows() * args.head_groups(),
            kernels().forward_scratch(args));
  return {out, lse};
}

std::tuple<OptTensor, OptTensor, OptTensor> window_attention_bwd(
    Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor bias_table, OptTensor logit_scale,
    OptTensor seed, int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w,
    int64_t num_heads, double scale, double dropout_p, std::vector<bool> output_mask) {
  const char* op = "window_attention_bwd";
  VK_CHECK(output_mask.size() == 3, op, "output_mask must have 3 entries, got ",
           output_mask.size());
  const Options options{bias_table, logit_scale, seed,      window_h, window_w,
                        shift_h,    shift_w,     num_heads, scale,    dropout_p};
  WindowAttentionArgs args{};
  set_sizes(&args, qkv, options, is_cpu, "the CPU", op);
  set_options(&args, options, op);
  check_like(dout, map_shape(args, 1), qkv.scalar_type(), is_cpu, "the CPU", op, "dout");
  check_like(out, map_shape(args, 1), qkv.scalar_type(), is_cpu, "the CPU", op, "out");
  check_like(lse, lse_shape(args), ScalarType::Float, is_cpu, "the CPU", op, "lse");
  VK_CHECK(!output_mask[2] || logit_scale.has_value(), op,
           "output_mask asks for dlogit_scale without a logit_scale");
  Tensor owners[2];
  args.qkv = map_of(qkv, &owners[0]);
  args.dout = map_of(dout, &owners[1]);
  const Tensor lse_contiguous = torch::stable::contiguous(lse);
  args.lse = const_cast<float*>(static_cast<const float*>(lse_contiguous.const_data_ptr()));
  OptTensor dqkv, dbias_table, dlogit_scale;
  if (output_mask[0]) {
    dqkv = empty_like_shape(qkv, map_shape(args, 3), qkv.scalar_type());
    args.dqkv = dqkv->mutable_data_ptr();
  }
  if (output_mask[1]) {
    dbias_table = empty_like_shape(qkv, shape_of(bias_table), bias_table.scalar_type());
    args.dbias_table = dbias_table->mutable_data_ptr();
  }
  if (output_mask[2]) {
    dlogit_scale = empty_like_shape(qkv, shape_of(*logit_scale), logit_scale->scalar_type());
    args.dlogit_scale = dlogit_scale->mutable_data_ptr();
  }
  if (!output_mask[0] && !output_mask[1] && !output_mask[2])
    return {dqkv, dbias_table, dlogit_scale};
  const Tensor partials =
      empty_like_shape(qkv, {args.chunks(), kernels().partial_floats(args)}, ScalarType::Float);
  args.partials = static_cast<float*>(partials.mutable_data_ptr());
  if (args.B > 0) {
    prepare(&args);
    run_items(kernels().backward, args, args.chunks() * args.head_groups(),
              kernels().backward_scratch(args));
  }
  kernels().reduce(args);
  return {dqkv, dbias_table, dlogit_scale};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&vitkernels::window_attention_fwd));
  m.impl("window_attention_fwd.cpu", TORCH_BOX(&vitkernels::window_attention_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&vitkernels::window_attention_bwd));
  m.impl("window_attention_bwd.cpu", TORCH_BOX(&vitkernels::window_attention_bwd));
}
