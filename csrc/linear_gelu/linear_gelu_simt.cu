// The plain path of linear_gelu: any dtypes, any sizes, no tensor cores; and what every path
// shares: dh with dbias, sums of partial sums, rounding.
//
// product: a block has 128 x 128 results, a thread 8 x 8 of them in four quarters; 16 k at a time
//   come through registers into shared memory, [k][m] and [k][n], while the 16 before are
//   multiplied: 64 FMA for each four 16-byte loads of shared memory, sums of 64 k added up. fp32 at
//   60 TFLOP/s: ViT-B's fc1 (50,432 x 768 x 3072) is 238 GFLOP, 4 ms; it is for fp32, which tensor
//   cores would round.
// grad: a block has 256 columns of a run of rows, a warp a row at a time, a lane eight columns;
//   dy, h in, dh out: 6 bytes an element in 16 bits, 216 us for that fc1 at 4.3 TB/s.
// Nothing is added by atomics; partial sums are added in their order.
// Not measured.
#include "linear_gelu/linear_gelu_activation.cuh"
#include "linear_gelu/linear_gelu_cuda.h"
#include "linear_gelu/linear_gelu_plan.h"

namespace vitkernels::linear_gelu {
namespace {

constexpr int kThreads = 256;
constexpr int kPitch = kSimtTile.m + 4;  // floats; 16-byte lines, k's in other banks
constexpr int kRun = 64;
constexpr int kEach = kSimtTile.m * kSimtTile.k / kThreads;

// This thread's eight elements of 16 k of one operand: where, and their values.
template <Major MAJOR>
struct Loader {
  const Matrix& matrix;
  DType dtype;
  int64_t first, size, K;  // first row of A (column of B), how many there are, and the k

  VK_DEVICE int row(int i) const {
    const int thread = static_cast<int>(threadIdx.x);
    return MAJOR == Major::kK ? thread / kSimtTile.k + i * (kThreads / kSimtTile.k)
                              : thread % kSimtTile.m;
  }
  VK_DEVICE int k(int i) const {
    const int thread = static_cast<int>(threadIdx.x);
    return MAJOR == Major::kK ? thread % kSimtTile.k
                              : thread / kSimtTile.m + i * (kThreads / kSimtTile.m);
  }
  VK_DEVICE void load(int64_t from_k, float (&v)[kEach]) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t r = first + row(i), at = from_k + k(i);
      const int64_t index = MAJOR == Major::kK ? r * matrix.stride + at : at * matrix.stride + r;
      v[i] =
          r < size && at < K ? rounded(load_scalar(matrix.data, matrix.dtype, index), dtype) : 0.0f;
    }
  }
  VK_DEVICE void store(float* shared, const float (&v)[kEach]) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) shared[k(i) * kPitch + row(i)] = v[i];
  }
};

template <Major A_MAJOR, Major B_MAJOR>
__global__ void __launch_bounds__(kThreads) product_kernel(const __grid_constant__ ProductArgs a) {
  check_launch_bounds<kThreads>();
  VK_SHARED(float, a_tile, [kSimtTile.k * kPitch]);
  VK_SHARED(float, b_tile, [kSimtTile.k * kPitch]);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kSimtTile.m;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kSimtTile.n;
  const int64_t first_k = static_cast<int64_t>(blockIdx.z) * a.k_per_split;
  const int64_t last_k = first_k + a.k_per_split < a.K ? first_k + a.k_per_split : a.K;
  const Loader<A_MAJOR> load_a{a.a, a.dtype, first_row, a.M, last_k};
  const Loader<B_MAJOR> load_b{a.b, a.dtype, first_column, a.N, last_k};
  const int x = static_cast<int>(threadIdx.x) % 16 * 4, y = static_cast<int>(threadIdx.x) / 16 * 4;

  // Sums of kRun k's are added to the total: one chain over all k would err like their number.
  float total[8][8] = {}, sums[8][8] = {};
  int run = 0;
  float next_a[kEach], next_b[kEach];
  load_a.load(first_k, next_a);
  load_b.load(first_k, next_b);
  for (int64_t from = first_k; from < last_k; from += kSimtTile.k) {
    load_a.store(a_tile, next_a);
    load_b.store(b_tile, next_b);
    __syncthreads();
    if (from + kSimtTile.k < last_k) {
      load_a.load(from + kSimtTile.k, next_a);
      load_b.load(from + kSimtTile.k, next_b);
    }
#pragma unroll
    for (int k = 0; k < kSimtTile.k; ++k) {
      float va[8], vb[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        va[i] = a_tile[k * kPitch + y + i], va[4 + i] = a_tile[k * kPitch + 64 + y + i];
        vb[i] = b_tile[k * kPitch + x + i], vb[4 + i] = b_tile[k * kPitch + 64 + x + i];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(va[i], vb[j], sums[i][j]);
    }
    run += kSimtTile.k;
    if (run == kRun || from + kSimtTile.k >= last_k) {
      run = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) total[i][j] += sums[i][j], sums[i][j] = 0.0f;
    }
    __syncthreads();
  }

  const int64_t part = static_cast<int64_t>(blockIdx.z) * a.M;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t row = first_row + i / 4 * 64 + y + i % 4;
    if (row >= a.M) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int64_t column = first_column + j / 4 * 64 + x + j % 4;
      if (column >= a.N) continue;
      float v[1] = {total[i][j] + bias_at(a, static_cast<int>(column))};
      if (a.h.data != nullptr) store_scalar(a.h.data, a.h.dtype, row * a.h.stride + column, v[0]);
      if (a.y.data == nullptr) continue;
      activate(v, a.activation);
      store_scalar(a.y.data, a.y.dtype, (part + row) * a.y.stride + column, v[0]);
    }
  }
}

// ---- dh and the partial sums of dbias

template <bool VEC>
__global__ void __launch_bounds__(kThreads) grad_kernel(const __grid_constant__ GradArgs a) {
  check_launch_bounds<kThreads>();
  VK_SHARED(float, sums, [kGradRows][kGradColumns]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kGradColumns;
  const int64_t program = blockIdx.y;
  const int64_t first = program * a.rows_per_program;
  const int64_t last = first + a.rows_per_program < a.rows ? first + a.rows_per_program : a.rows;
  const int64_t left = a.N - first_column;
  const Columns<VEC> columns(0, lane, kWarp,
                             left < kGradColumns ? static_cast<int>(left) : kGradColumns);

  float total[8] = {};
  for (int64_t row = first + warp; row < last; row += kGradRows) {
    const Raw8 raw_dy = load_raw(element(a.dy.data, row * a.dy.stride + first_column, a.dy.dtype),
                                 a.dy.dtype, columns);
    Raw8 raw_h = {};
    if (a.h.data != nullptr)
      raw_h = load_raw(element(a.h.data, row * a.h.stride + first_column, a.h.dtype), a.h.dtype,
                       columns);
    float g[8];
    to_floats(raw_dy, a.dy.dtype, g);
    if (a.h.data != nullptr) {
      float h[8];
      to_floats(raw_h, a.h.dtype, h);
#pragma unroll
      for (int j = 0; j < 8; ++j)  // what is not there adds nothing, whatever its bits
        g[j] = columns.holds(j) ? g[j] * derivative(h[j], a.activation) : 0.0f;
    }
    if (a.dh.data != nullptr)
      store(element(a.dh.data, row * a.dh.stride + first_column, a.dh.dtype), a.dh.dtype, columns,
            g);
#pragma unroll
    for (int j = 0; j < 8; ++j) total[j] += g[j];
  }
  if (a.partial == nullptr) return;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int column = columns[j];
    sums[warp][column] = columns.holds(j) ? total[j] : 0.0f;
  }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column >= left) return;
  float sum = 0.0f;
  for (int i = 0; i < kGradRows; ++i) sum += sums[i][column];
  a.partial[program * a.N + first_column + column] = sum;
}

// ---- Sums of partial sums: 32 elements and ROWS threads for each, every ROWS-th partial sum

template <int ROWS>
__global__ void __launch_bounds__(kWarp* ROWS)
    sum_kernel(const float* partial, int64_t count, int64_t size, Out out) {
  check_launch_bounds<kWarp * ROWS>();
  VK_SHARED(float, sums, [ROWS][kWarp]);
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarp + x;
  float sum = 0.0f;
  if (at < size)
    for (int64_t i = y; i < count; i += ROWS) sum += partial[i * size + at];
  sums[y][x] = sum;
  __syncthreads();
  if (y != 0 || at >= size) return;
  for (int i = 1; i < ROWS; ++i) sum += sums[i][x];
  store_scalar(out.data, out.dtype, at, sum);
}

__global__ void __launch_bounds__(kThreads)
    round_kernel(Matrix in, int64_t rows, int64_t columns, Out out) {
  check_launch_bounds<kThreads>();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= rows * columns) return;
  const int64_t row = divide(at, columns);
  store_scalar(out.data, out.dtype, at,
               load_scalar(in.data, in.dtype, row * in.stride + at - row * columns));
}

bool on_lines(const void* data, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

}  // namespace

void product_simt(const Device& device, const ProductArgs& a) {
  const dim3 grid(static_cast<unsigned>(ceil_divide(a.M, kSimtTile.m)),
                  static_cast<unsigned>(ceil_divide(a.N, kSimtTile.n)),
                  static_cast<unsigned>(a.splits));
  auto kernel = product_kernel<Major::kK, Major::kK>;
  if (a.b_major == Major::kMN)
    kernel = a.a_major == Major::kK ? product_kernel<Major::kK, Major::kMN>
                                    : product_kernel<Major::kMN, Major::kMN>;
  device.launch(kernel, grid, dim3(kThreads), 0, a);
}

void grad_simt(const Device& device, const GradArgs& a, int64_t programs) {
  const bool vectorized = a.N % 8 == 0 && on_lines(a.dy.data, a.dy.stride, a.dy.dtype) &&
                          (a.h.data == nullptr || on_lines(a.h.data, a.h.stride, a.h.dtype)) &&
                          (a.dh.data == nullptr || on_lines(a.dh.data, a.dh.stride, a.dh.dtype));
  const dim3 grid(static_cast<unsigned>(ceil_divide(a.N, kGradColumns)),
                  static_cast<unsigned>(programs));
  device.launch(vectorized ? grad_kernel<true> : grad_kernel<false>, grid, dim3(kThreads), 0, a);
}

void sum_partials(const Device& device, const float* partial, int64_t count, int64_t size,
                  const Out& out) {
  const dim3 grid(static_cast<unsigned>(ceil_divide(size, kWarp)));
  if (count <= 2 * kMostSplits)
    device.launch(sum_kernel<4>, grid, dim3(kWarp, 4), 0, partial, count, size, out);
  else
    device.launch(sum_kernel<16>, grid, dim3(kWarp, 16), 0, partial, count, size, out);
}

void round_all(const Device& device, const Matrix& in, int64_t rows, int64_t columns,
               const Out& out) {
  device.launch(round_kernel, dim3(static_cast<unsigned>(ceil_divide(rows * columns, kThreads))),
                dim3(kThreads), 0, in, rows, columns, out);
}

}  // namespace vitkernels::linear_gelu
