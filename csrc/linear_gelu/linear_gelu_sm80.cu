// Products of linear_gelu on tensor cores by mma.sync (sm_80): bf16 and fp16, both operands of the
// products' dtype, unit strides along multiples of 8 that begin on 16-byte lines.
//
// A block has 128 x 128 results (64 x 64 where those are too few for the machine), eight (four)
//   warps of 64 x 32 (32 x 32); 32 k at a time come by cp.async into four stages of shared memory.
//   An operand whose k run fastest lies as rows of 64 bytes, another as k's of 128-byte pieces of
//   its rows; ldmatrix reads either without bank conflicts, the second transposed.
// Results go through shared memory, over the stages, so that a warp writes whole lines.
// Floor: 312 TFLOP/s of an A100 give ViT-B's fc1 (238 GFLOP) 763 us; 128 x 128 has 64 FLOPs for
//   each byte of L2. An iteration of a warp: 32 mma, 12 ldmatrix, 4 cp.async.
// Grid: (tiles of M, tiles of N, pieces of K); 64 KB of shared memory, two blocks a multiprocessor.
// Not measured.
#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/swizzle.cuh"
#include "linear_gelu/linear_gelu_activation.cuh"
#include "linear_gelu/linear_gelu_cuda.h"
#include "linear_gelu/linear_gelu_plan.h"

namespace vitkernels::linear_gelu {
namespace {

constexpr int kStep = kSm80Tile.k;  // k of a stage

// ROWS rows of A (columns of B) and kStep k of one operand in shared memory.
template <Major MAJOR, int ROWS>
struct Stage {
  static constexpr int kBytes = ROWS * kStep * 2;
  static constexpr int kChunks = kBytes / 16;  // of 16 bytes
  static constexpr int kPanel = kStep * 128;   // kMN: 64 rows of all k

  // Of eight elements: k from `k` on of a row, or rows from `row` on of a k.
  static VK_DEVICE uint32_t at(int row, int k) {
    if (MAJOR == Major::kK) return swizzled(Swizzle::k64, static_cast<uint32_t>(row * 64 + k * 2));
    return static_cast<uint32_t>(row / 64 * kPanel) +
           swizzled(Swizzle::k128, static_cast<uint32_t>(k * 128 + row % 64 * 2));
  }

  // Begins to copy it from row `first` and k `from`; zeros beyond `rows` and `last`.
  static VK_DEVICE void load(char* stage, const Matrix& m, int64_t first, int64_t rows,
                             int64_t from, int64_t last) {
    for (int i = static_cast<int>(threadIdx.x); i < kChunks; i += static_cast<int>(blockDim.x)) {
      const int row = MAJOR == Major::kK ? i / (kStep / 8) : i % (ROWS / 8) * 8;
      const int k = MAJOR == Major::kK ? i % (kStep / 8) * 8 : i / (ROWS / 8);
      const bool inside = first + row < rows && from + k < last;
      const int64_t r = inside ? first + row : 0, at_k = inside ? from + k : 0;
      const int64_t index = MAJOR == Major::kK ? r * m.stride + at_k : at_k * m.stride + r;
      copy_async<16>(stage + at(row, k), static_cast<const char*>(m.data) + 2 * index,
                     inside ? 16 : 0);
    }
  }
};

template <Major MAJOR, int ROWS>
VK_DEVICE void load_a(FragmentA& a, const char* stage, int row, int k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (MAJOR == Major::kK)
    load_matrices(a.r, stage + Stage<MAJOR, ROWS>::at(row + lane % 16, k + lane / 16 * 8));
  else
    load_matrices_transposed(
        a.r, stage + Stage<MAJOR, ROWS>::at(row + lane / 8 % 2 * 8, k + lane / 16 * 8 + lane % 8));
}

// Of 16 columns.
template <Major MAJOR, int ROWS>
VK_DEVICE void load_b(FragmentB (&b)[2], const char* stage, int column, int k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t r[4];
  if constexpr (MAJOR == Major::kK)
    load_matrices(
        r, stage + Stage<MAJOR, ROWS>::at(column + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
  else
    load_matrices_transposed(
        r, stage + Stage<MAJOR, ROWS>::at(column + lane / 16 * 8, k + lane / 8 % 2 * 8 + lane % 8));
  b[0] = {{r[0], r[1]}}, b[1] = {{r[2], r[3]}};
}

// What a block of a kernel is: SMALL has the small tile.
template <bool SMALL>
struct Shape {
  static constexpr Tile kTile = SMALL ? kSm80Small : kSm80Tile;
  static constexpr int kRows = SMALL ? 32 : 64, kColumns = 32;  // of a warp
  static constexpr int kWarpsM = kTile.m / kRows, kWarpsN = kTile.n / kColumns;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
};

template <DType TYPE, Major A_MAJOR, Major B_MAJOR, bool SMALL>
__global__ void __launch_bounds__(Shape<SMALL>::kThreads, 2)
    product_kernel(const __grid_constant__ ProductArgs a) {
  check_launch_bounds<Shape<SMALL>::kThreads>();
  using S = Shape<SMALL>;
  constexpr int kFragmentsM = S::kRows / 16, kFragmentsN = S::kColumns / 8;
  using StageA = Stage<A_MAJOR, S::kTile.m>;
  using StageB = Stage<B_MAJOR, S::kTile.n>;
  constexpr int kStageBytes = StageA::kBytes + StageB::kBytes;
  VK_SWIZZLED_SHARED(char, memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * S::kTile.m;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * S::kTile.n;
  const int64_t first_k = static_cast<int64_t>(blockIdx.z) * a.k_per_split;
  const int64_t last_k = first_k + a.k_per_split < a.K ? first_k + a.k_per_split : a.K;
  const int steps = static_cast<int>((last_k - first_k + kStep - 1) / kStep);

  const auto load = [&](int step) {
    if (step < steps) {
      char* const stage = memory + step % kSm80Stages * kStageBytes;
      const int64_t k = first_k + static_cast<int64_t>(step) * kStep;
      StageA::load(stage, a.a, first_row, a.M, k, last_k);
      StageB::load(stage + StageA::kBytes, a.b, first_column, a.N, k, last_k);
    }
    commit_copies();  // a group a step, empty ones too: the wait counts groups
  };
  const int row = warp / S::kWarpsN * S::kRows, column = warp % S::kWarpsN * S::kColumns;
  FragmentC sums[kFragmentsM][kFragmentsN] = {};
#pragma unroll
  for (int step = 0; step < kSm80Stages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kSm80Stages - 2>();
    __syncthreads();
    load(step + kSm80Stages - 1);  // over the stage of the step before, which all have read
    const char* const stage = memory + step % kSm80Stages * kStageBytes;
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      FragmentA fa[kFragmentsM];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
        load_a<A_MAJOR, S::kTile.m>(fa[i], stage, row + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kFragmentsN; j += 2) {
        FragmentB fb[2];
        load_b<B_MAJOR, S::kTile.n>(fb, stage + StageA::kBytes, column + 8 * j, k);
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
          mma_m16n8k16<TYPE>(sums[i][j], fa[i], fb[0]);
          mma_m16n8k16<TYPE>(sums[i][j + 1], fa[i], fb[1]);
        }
      }
    }
  }
  wait_copies<0>();

  // v[i] of each fragment: columns c and c + 1 of rows r and r + 8.
#pragma unroll
  for (int j = 0; j < kFragmentsN; ++j) {
    const int c = static_cast<int>(first_column) + column + 8 * j + fragment_c_column(lane, 0);
    const float low = bias_at(a, c), high = bias_at(a, c + 1);
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
      sums[i][j].v[0] += low, sums[i][j].v[1] += high;
      sums[i][j].v[2] += low, sums[i][j].v[3] += high;
    }
  }
  const int64_t part = static_cast<int64_t>(blockIdx.z) * a.M;
  constexpr int kPitch = (S::kTile.n + 8) * 2;  // bytes: rows begin in other banks
  const auto write = [&](const Out& out) {
    if (out.dtype != TYPE || a.N % 8 != 0) {  // partial sums and other dtypes
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const int64_t r = first_row + row + 16 * i + fragment_c_row(lane, v);
            const int64_t c = first_column + column + 8 * j + fragment_c_column(lane, v);
            if (r < a.M && c < a.N)
              store_scalar(out.data, out.dtype, (part + r) * out.stride + c, sums[i][j].v[v]);
          }
      return;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
        for (int v = 0; v < 4; v += 2)
          *reinterpret_cast<uint32_t*>(memory + (row + 16 * i + fragment_c_row(lane, v)) * kPitch +
                                       (column + 8 * j + fragment_c_column(lane, v)) * 2) =
              pack<TYPE>(sums[i][j].v[v], sums[i][j].v[v + 1]);
    __syncthreads();
    constexpr int kChunks = S::kTile.n / 8;
    for (int i = static_cast<int>(threadIdx.x); i < S::kTile.m * kChunks; i += S::kThreads) {
      const int64_t r = first_row + i / kChunks, c = first_column + i % kChunks * 8;
      if (r < a.M && c < a.N)
        store_16(static_cast<char*>(out.data) + 2 * (r * out.stride + c),
                 *reinterpret_cast<const uint4*>(memory + i / kChunks * kPitch + i % kChunks * 16));
    }
  };
  if (a.h.data != nullptr) write(a.h);
  if (a.y.data == nullptr) return;
  if (a.activation != Activation::kIdentity) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) activate(sums[i][j].v, a.activation);
  }
  write(a.y);
}

// ---- Host

bool fits(const Matrix& m, int64_t columns, DType dtype) {
  return m.dtype == dtype && columns % 8 == 0 && m.stride % 8 == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

template <DType TYPE, bool SMALL>
void launch(const Device& device, const ProductArgs& a) {
  using S = Shape<SMALL>;
  auto kernel = product_kernel<TYPE, Major::kK, Major::kK, SMALL>;
  if (a.b_major == Major::kMN)
    kernel = a.a_major == Major::kK ? product_kernel<TYPE, Major::kK, Major::kMN, SMALL>
                                    : product_kernel<TYPE, Major::kMN, Major::kMN, SMALL>;
  const dim3 grid(static_cast<unsigned>(ceil_divide(a.M, S::kTile.m)),
                  static_cast<unsigned>(ceil_divide(a.N, S::kTile.n)),
                  static_cast<unsigned>(a.splits));
  device.launch(kernel, grid, dim3(S::kThreads), sm80_shared_bytes(S::kTile), a);
}

template <DType TYPE>
void launch(const Device& device, const ProductArgs& a) {
  if (a.splits == 1 && takes_small(a.M, a.N, device.multiprocessors()))
    launch<TYPE, true>(device, a);
  else
    launch<TYPE, false>(device, a);
}

}  // namespace

Refusal sm80_refuses(const ProductArgs& a) {
  if (a.dtype == DType::kF32) return "tensor cores would round fp32";
  if (!fits(a.a, a.a_major == Major::kK ? a.K : a.M, a.dtype) ||
      !fits(a.b, a.b_major == Major::kK ? a.K : a.N, a.dtype))
    return "it takes rows of a multiple of 8 elements on 16-byte lines";
  if (a.N > 64 * 65535) return "it takes up to 4,194,240 columns";
  return "";
}

void product_sm80(const Device& device, const ProductArgs& a) {
  if (a.dtype == DType::kBF16)
    launch<DType::kBF16>(device, a);
  else
    launch<DType::kF16>(device, a);
}

}  // namespace vitkernels::linear_gelu
