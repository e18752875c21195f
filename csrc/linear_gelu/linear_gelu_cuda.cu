// The launcher of linear_gelu's CUDA kernels: checks, views of the operands, the choice of each
// product's path, and registration. Kernels: linear_gelu_simt.cu, _sm80.cu, _sm90.cu.
#include "linear_gelu/linear_gelu_cuda.h"

#include <optional>
#include <tuple>

#include "linear_gelu/linear_gelu_plan.h"

namespace vitkernels {
namespace {

using namespace linear_gelu;

Activation activation_of(int64_t activation, const char* op) {
  VK_CHECK(activation >= 0 && activation <= 3, op,
           "activation must be 0 (identity), 1 (erf), 2 (tanh) or 3 (quick), got ", activation);
  return static_cast<Activation>(activation);
}

Out out_of(const Tensor& t, int64_t columns, const char* op) {
  return {t.mutable_data_ptr(), columns, dtype_of(t, op, "output")};
}

// One call: its operands as rows, rounded to the dtype of its products where tensor cores want it.
class Call {
 public:
  Call(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& bias,
       int64_t activation, ScalarType dtype)
      : device(x), activation(activation_of(activation, op)), op_(op), scalar_type_(dtype) {
    this->dtype = dtype_of(dtype, op, "out_dtype");
    VK_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op, "x must be (..., K) with K >= 1");
    K = x.size(x.dim() - 1);
    M = x.numel() / K;
    VK_CHECK(weight.dim() == 2 && weight.size(1) == K && weight.size(0) >= 1, op,
             "weight must have shape (N, ", K, ") with N >= 1");
    N = weight.size(0);
    VK_CHECK(N <= INT32_MAX / 2 && K <= INT32_MAX / 2, op, "N and K must be below 2^30, got ", N,
             " and ", K);
    VK_CHECK(M <= int64_t{INT32_MAX} * 64, op, "x must have fewer than 2^37 rows, got ", M);
    this->x = rows(x, "x");
    this->weight = rows(weight, "weight");
    if (!bias.has_value()) return;
    check_device(*bias, "bias");
    VK_CHECK(bias->dim() == 1 && bias->size(0) == N, op, "bias must have shape (", N, ",)");
    owners_.push_back(torch::stable::contiguous(*bias));
    bias_ = owners_.back().const_data_ptr();
    bias_dtype_ = dtype_of(*bias, op, "bias");
  }

  std::vector<int64_t> output_shape(const Tensor& x) const {
    std::vector<int64_t> shape = shape_of(x);
    shape.back() = N;
    return shape;
  }

  Matrix rows(const Tensor& t, const char* name) {
    check_device(t, name);
    const Rows view = as_rows(t, op_, name);
    owners_.push_back(view.owner);
    return {view.data, view.stride, view.dtype};
  }

  Tensor scratch(const std::vector<int64_t>& shape, ScalarType type) {
    owners_.push_back(empty_like_shape(owners_.front(), shape, type));
    return owners_.back();
  }

  // The operand in the products' dtype, which it then stays in: 16-bit tensor cores take nothing
  // else.
  const Matrix& in_dtype(Matrix& m, int64_t rows, int64_t columns) {
    if (m.dtype == dtype || dtype == DType::kF32 || rows == 0) return m;
    const Out out = out_of(scratch({rows, columns}, scalar_type_), columns, op_);
    round_all(device, m, rows, columns, out);
    return m = {out.data, columns, dtype};
  }

  ProductArgs product(const Matrix& a, Major a_major, const Matrix& b, Major b_major, int64_t M,
                      int64_t N, int64_t K) const {
    ProductArgs p{};
    p.a = a, p.b = b, p.a_major = a_major, p.b_major = b_major;
    p.M = M, p.N = static_cast<int>(N), p.K = K;
    p.dtype = dtype;
    p.splits = 1, p.k_per_split = K;
    return p;
  }

  ProductArgs forward() {
    ProductArgs p =
        product(in_dtype(x, M, K), Major::kK, in_dtype(weight, N, K), Major::kK, M, N, K);
    p.bias = bias_, p.bias_dtype = bias_dtype_;
    p.activation = activation;
    return p;
  }

  void run(ProductArgs p, bool may_split = false) {
    if (p.M == 0) return;
    const CudaPath path =
        choose_cuda_path(op_, device.architecture(), sm90_refuses(p), sm80_refuses(p));
    const Tile tile = path == CudaPath::kSm90   ? kSm90Tile
                      : path == CudaPath::kSm80 ? kSm80Tile
                                                : kSimtTile;
    const Out result = p.y;
    if (may_split) {
      const Splits s =
          splits(tile, p.M, p.N, p.K, device.multiprocessors(), path == CudaPath::kSm80 ? 2 : 1);
      p.splits = s.count, p.k_per_split = s.k;
      if (s.count > 1) p.y = out_of(scratch({s.count, p.M, p.N}, ScalarType::Float), p.N, op_);
    }
    switch (path) {
      case CudaPath::kSm90:
        product_sm90(device, p);
        break;
      case CudaPath::kSm80:
        product_sm80(device, p);
        break;
      default:
        product_simt(device, p);
    }
    if (p.splits > 1)
      sum_partials(device, static_cast<const float*>(p.y.data), p.splits, p.M * p.N, result);
  }

  const Device device;
  const Activation activation;
  DType dtype;
  int64_t M, N, K;
  Matrix x, weight;

 private:
  void check_device(const Tensor& t, const char* name) {
    VK_CHECK(Device::holds(t), op_, name, " must be on the GPU");
  }

  const char* op_;
  ScalarType scalar_type_;
  const void* bias_ = nullptr;
  DType bias_dtype_ = DType::kF32;
  std::vector<Tensor> owners_;  // dense copies and scratch, alive until the launch
};

std::tuple<Tensor, OptTensor> linear_gelu_fwd(Tensor x, Tensor weight, OptTensor bias,
                                              int64_t activation, bool save_preactivation,
                                              ScalarType out_dtype) {
  const char* op = "linear_gelu_fwd";
  VK_CHECK(Device::holds(x), op, "x must be on the GPU");
  Call call(op, x, weight, bias, activation, out_dtype);
  Tensor y = empty_like_shape(x, call.output_shape(x), out_dtype);
  OptTensor h;
  if (save_preactivation && call.activation != Activation::kIdentity)
    h = empty_like_shape(x, call.output_shape(x), out_dtype);
  ProductArgs p = call.forward();
  p.y = out_of(y, call.N, op);
  if (h.has_value()) p.h = out_of(*h, call.N, op);
  call.run(p);
  return {y, h};
}

std::tuple<OptTensor, OptTensor, OptTensor> linear_gelu_bwd(Tensor dy, Tensor x, Tensor weight,
                                                            OptTensor bias, OptTensor preactivation,
                                                            int64_t activation,
                                                            std::vector<bool> output_mask) {
  const char* op = "linear_gelu_bwd";
  VK_CHECK(output_mask.size() == 3, op, "output_mask must have 3 entries, got ",
           output_mask.size());
  VK_CHECK(Device::holds(x), op, "x must be on the GPU");
  const ScalarType dtype = dy.scalar_type();
  Call call(op, x, weight, bias, activation, dtype);
  const int64_t M = call.M, N = call.N, K = call.K;
  VK_CHECK(shape_of(dy) == call.output_shape(x), op, "dy must have the shape of y");
  OptTensor dx, dweight, dbias;
  if (output_mask[0]) dx = empty_like_shape(x, shape_of(x), x.scalar_type());
  if (output_mask[1]) dweight = empty_like_shape(weight, {N, K}, weight.scalar_type());
  if (output_mask[2]) {
    VK_CHECK(bias.has_value(), op, "bias must be given for its gradient");
    dbias = empty_like_shape(*bias, {N}, bias->scalar_type());
  }
  if (M == 0) {
    for (OptTensor* t : {&dweight, &dbias})
      if (t->has_value()) torch::stable::zero_(**t);
    return {dx, dweight, dbias};
  }
  const bool products = output_mask[0] || output_mask[1];
  if (!products && !output_mask[2]) return {dx, dweight, dbias};

  const bool curved = call.activation != Activation::kIdentity;
  GradArgs g{};
  g.dy = call.rows(dy, "dy");
  g.rows = M, g.N = static_cast<int>(N), g.activation = call.activation;
  Matrix dh = g.dy;
  if (curved) {
    if (preactivation.has_value()) {
      VK_CHECK(shape_of(*preactivation) == shape_of(dy) && preactivation->scalar_type() == dtype,
               op, "preactivation must have the shape and dtype of dy");
      g.h = call.rows(*preactivation, "preactivation");
    } else {
      ProductArgs p = call.forward();
      p.h = out_of(call.scratch({M, N}, dtype), N, op);
      g.h = {p.h.data, N, call.dtype};
      call.run(p);
    }
    if (products) {
      g.dh = out_of(call.scratch({M, N}, dtype), N, op);
      dh = {g.dh.data, N, call.dtype};
    }
  }
  if (dbias.has_value() || curved) {
    const GradPlan plan = grad_plan(M, N, call.device.multiprocessors());
    g.rows_per_program = plan.rows_per_program;
    if (dbias.has_value())
      g.partial = static_cast<float*>(
          call.scratch({plan.programs, N}, ScalarType::Float).mutable_data_ptr());
    grad_simt(call.device, g, plan.programs);
    if (dbias.has_value())
      sum_partials(call.device, g.partial, plan.programs, N, out_of(*dbias, N, op));
  }
  if (dx.has_value()) {
    ProductArgs p =
        call.product(dh, Major::kK, call.in_dtype(call.weight, N, K), Major::kMN, M, K, N);
    p.y = out_of(*dx, K, op);
    call.run(p);
  }
  if (dweight.has_value()) {
    ProductArgs p = call.product(dh, Major::kMN, call.in_dtype(call.x, M, K), Major::kMN, N, K, M);
    p.y = out_of(*dweight, K, op);
    call.run(p, true);
  }
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace vitkernels

VK_CUDA_LIBRARY_IMPL(m) {
  m.impl("linear_gelu_fwd.cuda", TORCH_BOX(&vitkernels::linear_gelu_fwd));
  m.impl("linear_gelu_bwd.cuda", TORCH_BOX(&vitkernels::linear_gelu_bwd));
}
