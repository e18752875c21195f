// Launchers of linear_gelu on the CPU: cheap checks, outputs, blocks of work, registration.
// Kernels: linear_gelu_cpu_kernels.cpp.
#include "linear_gelu/linear_gelu_cpu.h"

#include <algorithm>
#include <tuple>

#include "common/cpu_vec.h"
#include "common/scratch.h"
#include "common/stable.h"

namespace vitkernels {
namespace {

constexpr int64_t kBlockBytes = 384 << 10;  // of A in one block of rows: it stays in L2
constexpr int64_t kMinBlockRows = 48;       // fewer rows do not pay for reading all of B
constexpr int64_t kSlabRows = 4096;         // of x and dh that dweight sums up at a time
constexpr int64_t kChunkRows = 32;          // rows whose dbias is summed together...
constexpr int64_t kMaxChunks = 256;         // ...unless that makes more partial sums than this

constexpr int64_t kKeptBytes = 16 << 20;  // of a packed operand that stays allocated
constexpr int kPackedSlot = 1;

const LinearGeluTable& kernels() { return VK_PICK_TABLE(linear_gelu); }

MatrixArg matrix(const Rows& rows) {
  return {const_cast<void*>(rows.data), rows.stride, rows.dtype};
}

MatrixArg matrix(const Tensor& contiguous, int64_t columns, const char* op) {
  return {contiguous.mutable_data_ptr(), columns, dtype_of(contiguous, op, "output")};
}

MatrixArg rows_from(const MatrixArg& m, int64_t row) {
  return {static_cast<char*>(m.data) + row * m.stride * size_of(m.dtype), m.stride, m.dtype};
}

// The bias as fp32, up to whole vectors.
std::vector<float> padded_bias(const OptTensor& bias, int64_t N, const char* op) {
  std::vector<float> values;
  if (!bias.has_value()) return values;
  VK_CHECK(bias->dim() == 1 && bias->size(0) == N, op, "bias must have shape (", N, ",)");
  values.resize(static_cast<size_t>(kernels().padded_columns(N)));
  const int64_t step = bias->stride(0);
  VK_SWITCH_FLOAT(dtype_of(*bias, op, "bias"), {
    const scalar_t* source = static_cast<const scalar_t*>(bias->const_data_ptr());
    for (int64_t n = 0; n < N; ++n) values[n] = to_float(source[n * step]);
  });
  return values;
}

// Blocks of rows that fit in L2, as many as a multiple of the threads; where rows are too few for
// that, groups of columns too.
void set_blocks(ProductArgs* p, int64_t threads) {
  const int64_t row_bytes = std::max<int64_t>(1, p->K * size_of(p->dtype));
  const int64_t rows = std::max(kMinBlockRows, kBlockBytes / row_bytes);
  const int64_t blocks = (p->M + rows - 1) / rows;
  const int64_t most = std::max<int64_t>(blocks, p->M / kMinBlockRows);
  p->row_blocks = std::max<int64_t>(1, std::min(most, (blocks + threads - 1) / threads * threads));
  p->column_groups = 1;
  if (p->row_blocks % threads != 0)
    p->column_groups = std::clamp<int64_t>((threads + p->row_blocks - 1) / p->row_blocks, 1,
                                           std::max<int64_t>(1, kernels().panels(p->N)));
}

using ProductFn = void (*)(const ProductArgs&, int64_t, int64_t, void*);

void run_items(ProductFn kernel, const ProductArgs& p, int64_t items, int64_t scratch_bytes) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    kernel(p, begin, end, thread_scratch(scratch_bytes));
  });
}

void run_product(ProductArgs p, const Tensor& like) {
  if (p.M == 0 || p.N == 0) return;
  if (kernels().is_few_rows(p))
    return run_items(kernels().few_rows, p, kernels().panels(p.N), kernels().few_rows_scratch(p));
  set_blocks(&p, static_cast<int64_t>(torch::stable::get_num_threads()));
  const int64_t bytes = kernels().packed_bytes(p);
  OptTensor packed;
  if (bytes > kKeptBytes) {
    packed = empty_like_shape(like, {bytes}, ScalarType::Byte);
    p.packed_b = packed->mutable_data_ptr();
  } else {
    p.packed_b = thread_scratch<kPackedSlot>(bytes);
  }
  run_items(kernels().pack, p, kernels().panels(p.N), kernels().pack_scratch(p));
  run_items(kernels().product, p, p.row_blocks * p.column_groups, kernels().product_scratch(p));
}

Activation activation_of(int64_t activation, const char* op) {
  VK_CHECK(activation >= 0 && activation <= 3, op,
           "activation must be 0 (identity), 1 (erf), 2 (tanh) or 3 (quick), got ", activation);
  return static_cast<Activation>(activation);
}

// h = x W^T + bias in the compute dtype; the caller adds what becomes of it.
struct Linear {
  Rows x, weight;
  std::vector<float> bias;
  ProductArgs product;

  Linear(const Tensor& x_tensor, const Tensor& weight_tensor, const OptTensor& bias_tensor,
         ScalarType dtype, const char* op)
      : x(as_rows(x_tensor, op, "x")), weight(as_rows(weight_tensor, op, "weight")), product{} {
    const int64_t K = x_tensor.size(x_tensor.dim() - 1);
    VK_CHECK(weight_tensor.dim() == 2 && weight_tensor.size(1) == K, op,
             "weight must have shape (N, ", K, ")");
    product.M = x.rows, product.N = weight_tensor.size(0), product.K = K;
    product.dtype = dtype_of(dtype, op, "out_dtype");
    bias = padded_bias(bias_tensor, product.N, op);
    product.a = matrix(x);
    product.b = matrix(weight);
    product.b_transposed = true;
    product.bias = bias.empty() ? nullptr : bias.data();
    product.first_slab = product.last_slab = true;
  }
};

std::vector<int64_t> output_shape(const Tensor& x, int64_t N) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = N;
  return shape;
}

std::tuple<Tensor, OptTensor> linear_gelu_fwd(Tensor x, Tensor weight, OptTensor bias,
                                              int64_t activation, bool save_preactivation,
                                              ScalarType out_dtype) {
  const char* op = "linear_gelu_fwd";
  Linear linear(x, weight, bias, out_dtype, op);
  ProductArgs& p = linear.product;
  p.activation = activation_of(activation, op);
  const std::vector<int64_t> shape = output_shape(x, p.N);
  Tensor y = empty_like_shape(x, shape, out_dtype);
  p.out = matrix(y, p.N, op);
  OptTensor preactivation;
  if (save_preactivation && p.activation != Activation::kIdentity) {
    preactivation = empty_like_shape(x, shape, out_dtype);
    p.preactivation = matrix(*preactivation, p.N, op);
  }
  run_product(p, x);
  return {y, preactivation};
}

// dh = dy * activation'(h) over fixed chunks of rows, each with its own sum for dbias.
void run_grad(GradArgs g, int64_t rows, const OptTensor& dbias, const Tensor& like,
              const char* op) {
  const int64_t chunk = std::max(kChunkRows, (rows + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = (rows + chunk - 1) / chunk;
  OptTensor partials;
  float* sums = nullptr;
  if (dbias.has_value()) {
    partials = empty_like_shape(like, {chunks, g.N}, ScalarType::Float);
    sums = static_cast<float*>(partials->mutable_data_ptr());
  }
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      GradArgs mine = g;
      if (sums != nullptr) {
        mine.dbias_sum = sums + i * g.N;
        std::fill_n(mine.dbias_sum, g.N, 0.0f);
      }
      kernels().grad(mine, i * chunk, std::min(rows, (i + 1) * chunk));
    }
  });
  if (dbias.has_value()) kernels().sum_partials(sums, chunks, g.N, matrix(*dbias, g.N, op));
}

// dweight = dh^T x, a slab of rows at a time: a packed slab of x and a block of dh^T stay in cache.
void run_dweight(ProductArgs p, const Tensor& like) {
  const int64_t rows = p.K, slabs = std::max<int64_t>(1, (rows + kSlabRows - 1) / kSlabRows);
  OptTensor sums;
  if (slabs > 1) {
    sums = empty_like_shape(like, {p.M, p.N}, ScalarType::Float);
    p.sums = static_cast<float*>(sums->mutable_data_ptr());
  }
  const MatrixArg a = p.a, b = p.b;
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int64_t first = slab * kSlabRows;
    p.K = std::min(rows, first + kSlabRows) - first;
    p.a = rows_from(a, first);
    p.b = rows_from(b, first);
    p.first_slab = slab == 0;
    p.last_slab = slab == slabs - 1;
    run_product(p, like);
  }
}

std::tuple<OptTensor, OptTensor, OptTensor> linear_gelu_bwd(Tensor dy, Tensor x, Tensor weight,
                                                            OptTensor bias, OptTensor preactivation,
                                                            int64_t activation,
                                                            std::vector<bool> output_mask) {
  const char* op = "linear_gelu_bwd";
  VK_CHECK(output_mask.size() == 3, op, "output_mask must have 3 entries, got ",
           output_mask.size());
  const ScalarType dtype = dy.scalar_type();
  Linear linear(x, weight, bias, dtype, op);
  const ProductArgs& forward = linear.product;
  const int64_t M = forward.M, N = forward.N, K = forward.K;
  VK_CHECK(shape_of(dy) == output_shape(x, N), op, "dy must have the shape of y");
  OptTensor dx, dweight, dbias;
  if (output_mask[0]) dx = empty_like_shape(x, shape_of(x), x.scalar_type());
  if (output_mask[1]) dweight = empty_like_shape(weight, {N, K}, weight.scalar_type());
  if (output_mask[2]) {
    VK_CHECK(bias.has_value(), op, "bias must be given for its gradient");
    dbias = empty_like_shape(*bias, {N}, bias->scalar_type());
  }

  const Rows dy_rows = as_rows(dy, op, "dy");
  GradArgs g{};
  g.N = N;
  g.dtype = dy_rows.dtype;
  g.activation = activation_of(activation, op);
  g.dy = matrix(dy_rows);
  MatrixArg dh = g.dy;
  OptTensor dh_owner, h_owner;
  std::optional<Rows> h;
  const bool curved = g.activation != Activation::kIdentity,
             products = output_mask[0] || output_mask[1];
  if (curved && (products || output_mask[2])) {
    if (preactivation.has_value()) {
      VK_CHECK(shape_of(*preactivation) == shape_of(dy) && preactivation->scalar_type() == dtype,
               op, "preactivation must have the shape and dtype of dy");
      h_owner = *preactivation;
    } else {
      h_owner = empty_like_shape(x, {M, N}, dtype);
      ProductArgs p = forward;
      p.preactivation = matrix(*h_owner, N, op);
      run_product(p, x);
    }
    h = as_rows(*h_owner, op, "preactivation");
    g.preactivation = matrix(*h);
    if (products) {
      dh_owner = empty_like_shape(x, {M, N}, dtype);
      g.dh = dh = matrix(*dh_owner, N, op);
    }
  }
  if (dbias.has_value() || (curved && products)) run_grad(g, M, dbias, x, op);

  ProductArgs p{};
  p.dtype = g.dtype;
  p.a = dh;
  p.first_slab = p.last_slab = true;
  if (dx.has_value()) {  // (M, K) = dh (M, N) * weight (N, K)
    p.M = M, p.N = K, p.K = N;
    p.b = forward.b;
    p.out = matrix(*dx, K, op);
    run_product(p, x);
  }
  if (dweight.has_value()) {  // (N, K) = dh^T (N, M) * x (M, K)
    p.M = N, p.N = K, p.K = M;
    p.a_transposed = true;
    p.b = forward.a;
    p.out = matrix(*dweight, K, op);
    run_dweight(p, x);
  }
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("linear_gelu_fwd", TORCH_BOX(&linear_gelu_fwd));
  m.impl("linear_gelu_fwd.cpu", TORCH_BOX(&linear_gelu_fwd));
  m.impl("linear_gelu_bwd", TORCH_BOX(&linear_gelu_bwd));
  m.impl("linear_gelu_bwd.cpu", TORCH_BOX(&linear_gelu_bwd));
}
