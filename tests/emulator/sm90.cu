// The kernels of tile_sm90.cuh for the GPU, without bugs: tests/test_emulator_sass.py looks at what
// nvcc makes of them. The host code of tensor maps is compiled with them.
#include "tile_sm90.cuh"

namespace vitkernels {

#define PRODUCT(TYPE, N, SWIZZLE, A_MAJOR, B_MAJOR, SOURCE)                                        \
  template __global__ void product_kernel<TYPE, N, SWIZZLE, A_MAJOR, B_MAJOR, SOURCE, Bug::kNone>( \
      const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, const uint16_t*,       \
      float*, int, int)

PRODUCT(DType::kBF16, 64, Swizzle::k128, Major::kK, Major::kK, Source::kTma);
PRODUCT(DType::kBF16, 64, Swizzle::kNone, Major::kMN, Major::kMN, Source::kTma);
PRODUCT(DType::kF16, 8, Swizzle::k32, Major::kK, Major::kK, Source::kTma);
PRODUCT(DType::kF16, 136, Swizzle::k64, Major::kK, Major::kMN, Source::kRegisters);
PRODUCT(DType::kBF16, 256, Swizzle::k128, Major::kK, Major::kK, Source::kRegisters);
PRODUCT(DType::kBF16, 64, Swizzle::k128, Major::kK, Major::kK, Source::kStores);

template __global__ void pipeline_kernel<>(const __grid_constant__ TensorMap,
                                           const __grid_constant__ TensorMap, float*, int);
template __global__ void store_kernel<>(const float*, const __grid_constant__ TensorMap,
                                        const __grid_constant__ TensorMap);

#define COPY(RANK)                                                                     \
  template __global__ void copy_tensor_kernel<RANK>(const __grid_constant__ TensorMap, \
                                                    const __grid_constant__ TensorMap, \
                                                    Coordinates, Coordinates, int, char*)
COPY(2);
COPY(3);
COPY(4);
COPY(5);

// Every N of the instruction table, one product each.
template <int N>
__global__ void every_n_kernel(float* c) {
  VK_SWIZZLED_SHARED(char, tile);
  float sums[N / 2];
  const WgmmaOperand operand = wgmma_operand<Swizzle::k128>(tile, 16, 1024);
  wgmma_fence();
  wgmma<DType::kBF16>(sums, operand, operand, false);
  wgmma_commit();
  wgmma_wait<0>(sums);
  store_accumulators(c, sums, N, 64, N);
}
#define EIGHT_N(N)                                         \
  template __global__ void every_n_kernel<N>(float*);      \
  template __global__ void every_n_kernel<N + 8>(float*);  \
  template __global__ void every_n_kernel<N + 16>(float*); \
  template __global__ void every_n_kernel<N + 24>(float*); \
  template __global__ void every_n_kernel<N + 32>(float*); \
  template __global__ void every_n_kernel<N + 40>(float*); \
  template __global__ void every_n_kernel<N + 48>(float*); \
  template __global__ void every_n_kernel<N + 56>(float*)
EIGHT_N(8);
EIGHT_N(72);
EIGHT_N(136);
EIGHT_N(200);

// Host code that a launcher would call.
TensorMap matrix_map(const void* data, int rows, int columns) {
  return make_tensor_map(data, DType::kBF16, {2, {columns, rows}, {1, columns}, {64, 64}},
                         Swizzle::k128);
}

}  // namespace vitkernels
