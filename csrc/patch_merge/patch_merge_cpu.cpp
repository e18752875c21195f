// Launchers of patch_merge_layer_norm on the CPU: cheap checks, outputs, fixed chunks of rows,
// registration.
#include "patch_merge/patch_merge_cpu.h"

#include <tuple>

#include "common/layer_norm_launch.h"

namespace vitkernels {
namespace {

const PatchMergeTable& kernels() { return VK_PICK_TABLE(patch_merge); }

struct Parameters {
  FloatParameter weight, bias;
  OptTensor mean, rstd;
};

MapArg map_of(const Tensor& t, void* data, const char* op, const char* name) {
  return {data,        t.size(1),   t.size(2),   t.size(3),
          t.stride(0), t.stride(1), t.stride(2), dtype_of(t, op, name)};
}

// x as it lies, unless its channels are not contiguous; `owner` keeps a copy alive.
MapArg read_map(const Tensor& x, const char* op, OptTensor* owner) {
  VK_CHECK(x.dim() == 4, op, "x must be (B, H, W, C), got ", x.dim(), " dimensions");
  VK_CHECK(x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1, op, "x must have H, W, C >= 1, got ",
           x.size(1), ", ", x.size(2), ", ", x.size(3));
  const bool dense = x.size(3) == 1 || x.stride(3) == 1;
  *owner = dense ? x : torch::stable::contiguous(x);
  return map_of(**owner, const_cast<void*>((*owner)->const_data_ptr()), op, "x");
}

std::vector<int64_t> rows_shape(const Tensor& x, const MapArg& map) {
  return {x.size(0), map.rows_h(), map.rows_w()};
}

std::tuple<Tensor, Tensor, Tensor> patch_merge_layer_norm_fwd(Tensor x, OptTensor weight,
                                                              OptTensor bias, double eps,
                                                              ScalarType out_dtype) {
  const char* op = "patch_merge_layer_norm_fwd";
  dtype_of(out_dtype, op, "out_dtype");
  OptTensor owner;
  Parameters owners;
  MergeForwardArgs args{};
  args.x = read_map(x, op, &owner);
  const int64_t columns = 4 * args.x.C, rows = x.size(0) * args.x.rows_h() * args.x.rows_w();
  std::vector<int64_t> shape = rows_shape(x, args.x);
  Tensor mean = empty_like_shape(x, shape, ScalarType::Float);
  Tensor rstd = empty_like_shape(x, shape, ScalarType::Float);
  shape.push_back(columns);
  Tensor y = empty_like_shape(x, shape, out_dtype);
  args.y = output(y, columns, op);
  args.weight = as_float_or(weight, 1.0f, columns, op, "weight", &owners.weight);
  args.bias = as_float_or(bias, 0.0f, columns, op, "bias", &owners.bias);
  args.mean = static_cast<float*>(mean.mutable_data_ptr());
  args.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  args.eps = static_cast<float>(eps);
  torch::stable::parallel_for(0, rows, rows_per_thread(columns), [&](int64_t begin, int64_t end) {
    kernels().forward(args, begin, end);
  });
  return {y, mean, rstd};
}

std::tuple<OptTensor, OptTensor, OptTensor> patch_merge_layer_norm_bwd(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, OptTensor weight, OptTensor bias,
    std::vector<bool> output_mask) {
  const char* op = "patch_merge_layer_norm_bwd";
  VK_CHECK(output_mask.size() == 3, op, "output_mask must have 3 entries, got ",
           output_mask.size());
  OptTensor owner, dx;
  Parameters owners;
  MergeBackwardArgs args{};
  args.x = read_map(x, op, &owner);
  const int64_t columns = 4 * args.x.C, rows = x.size(0) * args.x.rows_h() * args.x.rows_w();
  std::vector<int64_t> shape = rows_shape(x, args.x);
  shape.push_back(columns);
  VK_CHECK(shape_of(dy) == shape, op, "dy must have the shape of y, (B, ceil(H / 2), ceil(W / 2), ",
           columns, ")");
  const Rows dy_rows = as_rows(dy, op, "dy");
  if (output_mask[0]) {
    dx = empty_like_shape(x, shape_of(x), x.scalar_type());
    args.dx = map_of(*dx, dx->mutable_data_ptr(), op, "dx");
  }
  const OptTensor sums[2] = {parameter_grad(output_mask[1], weight, columns, op, "weight"),
                             parameter_grad(output_mask[2], bias, columns, op, "bias")};
  args.dy = arg(dy_rows);
  args.weight = as_float_or(weight, 1.0f, columns, op, "weight", &owners.weight);
  args.mean = statistics(mean, rows, op, "mean", &owners.mean);
  args.rstd = statistics(rstd, rows, op, "rstd", &owners.rstd);
  const auto chunk = [&](int64_t begin, int64_t end, float* const(&partial)[2]) {
    MergeBackwardArgs mine = args;
    mine.dweight = partial[0];
    mine.dbias = partial[1];
    kernels().backward(mine, begin, end);
  };
  sum_over_rows(rows, columns, x, sums, op, chunk, kernels().sum_partials);
  return {dx, sums[0], sums[1]};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("patch_merge_layer_norm_fwd", TORCH_BOX(&patch_merge_layer_norm_fwd));
  m.impl("patch_merge_layer_norm_fwd.cpu", TORCH_BOX(&patch_merge_layer_norm_fwd));
  m.impl("patch_merge_layer_norm_bwd", TORCH_BOX(&patch_merge_layer_norm_bwd));
  m.impl("patch_merge_layer_norm_bwd.cpu", TORCH_BOX(&patch_merge_layer_norm_bwd));
}
