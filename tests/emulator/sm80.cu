// The kernels of tile_sm80.cuh for the GPU, without bugs: tests/test_emulator_sass.py looks at what
// nvcc makes of them.
#include "tile_sm80.cuh"

namespace vitkernels {

template __global__ void product_kernel<DType::kBF16, false>(const uint16_t*, const uint16_t*,
                                                             float*, int, int, int);
template __global__ void product_kernel<DType::kBF16, true>(const uint16_t*, const uint16_t*,
                                                            float*, int, int, int);
template __global__ void product_kernel<DType::kF16, true>(const uint16_t*, const uint16_t*, float*,
                                                           int, int, int);
template __global__ void mma_kernel<DType::kBF16>(const uint32_t*, const uint32_t*, float*);
template __global__ void mma_kernel<DType::kF16>(const uint32_t*, const uint32_t*, float*);
template __global__ void load_matrices_kernel<1, false>(const uint16_t*, uint32_t*);
template __global__ void load_matrices_kernel<2, false>(const uint16_t*, uint32_t*);
template __global__ void load_matrices_kernel<4, false>(const uint16_t*, uint32_t*);
template __global__ void load_matrices_kernel<1, true>(const uint16_t*, uint32_t*);
template __global__ void load_matrices_kernel<2, true>(const uint16_t*, uint32_t*);
template __global__ void load_matrices_kernel<4, true>(const uint16_t*, uint32_t*);
template __global__ void copy_async_kernel<4>(const char*, const int*, char*);
template __global__ void copy_async_kernel<8>(const char*, const int*, char*);
template __global__ void copy_async_kernel<16>(const char*, const int*, char*);
template __global__ void pairs_kernel<Bug::kNone>(int, int*);

}  // namespace vitkernels
