// Launchers of add_layer_norm and layer_norm_add on the CPU: cheap checks, outputs, fixed chunks of
// rows, registration.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "add_layer_norm/add_layer_norm_cpu.h"
#include "common/layer_norm_launch.h"

namespace vitkernels {
namespace {

const AddLayerNormTable& kernels() { return VK_PICK_TABLE(add_layer_norm); }

struct Parameters {
  FloatParameter weight, bias, gamma, row_scale;
  OptTensor mean, rstd;
};

BranchArgs branch_args(const OptTensor& gamma, const OptTensor& row_scale, const OptTensor& seed,
                       double dropout_p, const Tensor& x, int64_t rows, const char* op,
                       Parameters* owners) {
  const int64_t C = x.size(x.dim() - 1), B = x.size(0);
  BranchArgs branch{};
  branch.gamma = as_float(gamma, C, op, "gamma", &owners->gamma);
  branch.row_scale = as_float(row_scale, B, op, "row_scale", &owners->row_scale);
  branch.rows_per_sample = B == 0 ? 1 : std::max<int64_t>(1, rows / B);
  VK_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, "dropout_p must be in [0, 1), got ", dropout_p);
  if (dropout_p > 0.0) {
    VK_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
             "seed must be one int64 when dropout_p > 0");
    branch.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    branch.threshold = static_cast<uint64_t>(std::nearbyint(dropout_p * 4294967296.0));
    branch.dropout_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  }
  return branch;
}

void check_same_shape(const Tensor& a, const Tensor& b, const char* op, const char* name) {
  VK_CHECK(shape_of(a) == shape_of(b), op, name, " must have the shape of the other activations");
}

std::vector<int64_t> rows_shape(const Tensor& x) {
  std::vector<int64_t> shape = shape_of(x);
  shape.pop_back();
  return shape;
}

void run_forward(const NormForwardArgs& args, int64_t rows,
                 void (*kernel)(const NormForwardArgs&, int64_t, int64_t)) {
  torch::stable::parallel_for(0, rows, rows_per_thread(args.C),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// `outputs` are dweight, dbias and dgamma.
void run_backward(const NormBackwardArgs& args, int64_t rows, const Tensor& like,
                  const OptTensor (&outputs)[3], const char* op) {
  const auto chunk = [&](int64_t begin, int64_t end, float* const(&sums)[3]) {
    NormBackwardArgs mine = args;
    mine.dweight = sums[0];
    mine.dbias = sums[1];
    mine.dgamma = sums[2];
    kernels().backward(mine, begin, end);
  };
  sum_over_rows(rows, args.C, like, outputs, op, chunk, kernels().sum_partials);
}

std::tuple<Tensor, OptTensor, Tensor, Tensor> add_layer_norm_fwd(
    Tensor x, OptTensor residual, OptTensor weight, OptTensor bias, OptTensor gamma,
    OptTensor row_scale, OptTensor seed, double dropout_p, double eps, ScalarType out_dtype) {
  const char* op = "add_layer_norm_fwd";
  const Rows x_rows = as_rows(x, op, "x");
  const int64_t C = x.size(x.dim() - 1);
  Parameters owners;
  NormForwardArgs args{};
  Tensor y = empty_like_shape(x, shape_of(x), out_dtype);
  Tensor mean = empty_like_shape(x, rows_shape(x), ScalarType::Float);
  Tensor rstd = empty_like_shape(x, rows_shape(x), ScalarType::Float);
  OptTensor z;
  std::optional<Rows> residual_rows;
  VK_CHECK(residual.has_value() || (!gamma.has_value() && !row_scale.has_value() && dropout_p == 0),
           op, "residual must be given when the branch is scaled or dropped");
  if (residual.has_value()) {
    check_same_shape(x, *residual, op, "residual");
    residual_rows = as_rows(*residual, op, "residual");
    z = empty_like_shape(x, shape_of(x), residual->scalar_type());
    args.residual = arg(*residual_rows);
    args.z = output(*z, C, op);
  }
  args.x = arg(x_rows);
  args.y = output(y, C, op);
  args.weight = as_float_or(weight, 1.0f, C, op, "weight", &owners.weight);
  args.bias = as_float_or(bias, 0.0f, C, op, "bias", &owners.bias);
  args.mean = static_cast<float*>(mean.mutable_data_ptr());
  args.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  args.branch = branch_args(gamma, row_scale, seed, dropout_p, x, x_rows.rows, op, &owners);
  args.C = C;
  args.eps = static_cast<float>(eps);
  run_forward(args, x_rows.rows, kernels().forward);
  return {y, z, mean, rstd};
}

std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor> add_layer_norm_bwd(
    OptTensor dy, OptTensor dnew_residual, Tensor z, Tensor mean, Tensor rstd, OptTensor x,
    OptTensor weight, OptTensor bias, OptTensor gamma, OptTensor row_scale, OptTensor seed,
    double dropout_p, ScalarType x_dtype, std::vector<bool> output_mask) {
  const char* op = "add_layer_norm_bwd";
  VK_CHECK(output_mask.size() == 5, op, "output_mask must have 5 entries, got ",
           output_mask.size());
  const int64_t C = z.size(z.dim() - 1);
  const Rows z_rows = as_rows(z, op, "z");
  Parameters owners;
  NormBackwardArgs args{};
  std::optional<Rows> dy_rows, dz_rows, x_rows;
  OptTensor dx, dresidual;
  if (output_mask[0]) dx = empty_like_shape(z, shape_of(z), x_dtype);
  if (output_mask[1]) dresidual = empty_like_shape(z, shape_of(z), z.scalar_type());
  const OptTensor sums[3] = {parameter_grad(output_mask[2], weight, C, op, "weight"),
                             parameter_grad(output_mask[3], bias, C, op, "bias"),
                             parameter_grad(output_mask[4], gamma, C, op, "gamma")};
  if (dy.has_value()) {
    check_same_shape(z, *dy, op, "dy");
    dy_rows = as_rows(*dy, op, "dy");
    args.dy = arg(*dy_rows);
  }
  if (dnew_residual.has_value()) {
    check_same_shape(z, *dnew_residual, op, "dnew_residual");
    const bool ready = dnew_residual->scalar_type() == z.scalar_type();
    const Tensor dz = ready ? *dnew_residual : torch::stable::to(*dnew_residual, z.scalar_type());
    dz_rows = as_rows(dz, op, "dnew_residual");
    args.dz = arg(*dz_rows);
  }
  if (sums[2].has_value()) {
    VK_CHECK(x.has_value(), op, "x must be given for the gradient of gamma");
    check_same_shape(z, *x, op, "x");
    x_rows = as_rows(*x, op, "x");
    VK_CHECK(x->scalar_type() == x_dtype, op, "x must have x_dtype");
    args.x = arg(*x_rows);
  }
  args.z = arg(z_rows);
  args.dx = dx.has_value() ? output(*dx, C, op) : absent(dtype_of(x_dtype, op, "x_dtype"));
  args.dresidual = dresidual.has_value() ? output(*dresidual, C, op) : absent();
  args.weight = as_float_or(weight, 1.0f, C, op, "weight", &owners.weight);
  args.mean = statistics(mean, z_rows.rows, op, "mean", &owners.mean);
  args.rstd = statistics(rstd, z_rows.rows, op, "rstd", &owners.rstd);
  args.branch = branch_args(gamma, row_scale, seed, dropout_p, z, z_rows.rows, op, &owners);
  args.C = C;
  run_backward(args, z_rows.rows, z, sums, op);
  return {dx, dresidual, sums[0], sums[1], sums[2]};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_add_fwd(Tensor x, Tensor residual, OptTensor weight,
                                                      OptTensor bias, OptTensor row_scale,
                                                      double eps) {
  const char* op = "layer_norm_add_fwd";
  check_same_shape(x, residual, op, "residual");
  const int64_t C = x.size(x.dim() - 1);
  const Rows x_rows = as_rows(x, op, "x"), residual_rows = as_rows(residual, op, "residual");
  Parameters owners;
  Tensor out = empty_like_shape(x, shape_of(x), residual.scalar_type());
  Tensor mean = empty_like_shape(x, rows_shape(x), ScalarType::Float);
  Tensor rstd = empty_like_shape(x, rows_shape(x), ScalarType::Float);
  NormForwardArgs args{};
  args.x = arg(x_rows);
  args.residual = arg(residual_rows);
  args.y = output(out, C, op);
  args.weight = as_float_or(weight, 1.0f, C, op, "weight", &owners.weight);
  args.bias = as_float_or(bias, 0.0f, C, op, "bias", &owners.bias);
  args.mean = static_cast<float*>(mean.mutable_data_ptr());
  args.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  args.branch =
      branch_args(std::nullopt, row_scale, std::nullopt, 0.0, x, x_rows.rows, op, &owners);
  args.C = C;
  args.eps = static_cast<float>(eps);
  run_forward(args, x_rows.rows, kernels().post_forward);
  return {out, mean, rstd};
}

std::tuple<OptTensor, OptTensor, OptTensor> layer_norm_add_bwd(Tensor dout, Tensor x, Tensor mean,
                                                               Tensor rstd, OptTensor weight,
                                                               OptTensor bias, OptTensor row_scale,
                                                               std::vector<bool> output_mask) {
  const char* op = "layer_norm_add_bwd";
  VK_CHECK(output_mask.size() == 3, op, "output_mask must have 3 entries, got ",
           output_mask.size());
  check_same_shape(x, dout, op, "dout");
  const int64_t C = x.size(x.dim() - 1);
  const Rows x_rows = as_rows(x, op, "x"), dout_rows = as_rows(dout, op, "dout");
  Parameters owners;
  OptTensor dx, dweight, dbias;
  if (output_mask[0]) dx = empty_like_shape(x, shape_of(x), x.scalar_type());
  dweight = parameter_grad(output_mask[1], weight, C, op, "weight");
  dbias = parameter_grad(output_mask[2], bias, C, op, "bias");
  NormBackwardArgs args{};
  args.dy = arg(dout_rows);
  args.z = arg(x_rows);
  args.dx = dx.has_value() ? output(*dx, C, op) : absent(x_rows.dtype);
  args.weight = as_float_or(weight, 1.0f, C, op, "weight", &owners.weight);
  args.mean = statistics(mean, x_rows.rows, op, "mean", &owners.mean);
  args.rstd = statistics(rstd, x_rows.rows, op, "rstd", &owners.rstd);
  args.branch =
      branch_args(std::nullopt, row_scale, std::nullopt, 0.0, x, x_rows.rows, op, &owners);
  args.dy_row_scale = args.branch.row_scale;
  args.branch.row_scale = nullptr;  // the factor acts on dout, not on dx
  args.C = C;
  run_backward(args, x_rows.rows, x, {dweight, dbias, std::nullopt}, op);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_fwd.cpu", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
  m.impl("add_layer_norm_bwd.cpu", TORCH_BOX(&add_layer_norm_bwd));
  m.impl("layer_norm_add_fwd", TORCH_BOX(&layer_norm_add_fwd));
  m.impl("layer_norm_add_fwd.cpu", TORCH_BOX(&layer_norm_add_fwd));
  m.impl("layer_norm_add_bwd", TORCH_BOX(&layer_norm_add_bwd));
  m.impl("layer_norm_add_bwd.cpu", TORCH_BOX(&layer_norm_add_bwd));
}
