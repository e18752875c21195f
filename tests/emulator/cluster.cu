// The kernels of cluster_sm90.cuh for the GPU, without bugs: tests/test_emulator_sass.py looks at
// what nvcc makes of them.
#include "cluster_sm90.cuh"

namespace vitkernels {

template __global__ void share_kernel<>(const __grid_constant__ TensorMap, float*, int*, int, int);

}  // namespace vitkernels
