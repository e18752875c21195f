// The kernels of cluster_sm90.cuh for tests/test_emulator_cluster.py, each with a C function that
// launches it and returns null or the error.
#include "cluster_sm90.cuh"
#include "exports.h"

using namespace vitkernels;

namespace {

TensorMap map_of(const uint16_t* data, int rows, int box_rows) {
  return make_tensor_map(data, DType::kBF16, {2, {64, rows}, {1, 64}, {64, box_rows}},
                         Swizzle::kNone);
}

// What the emulator refuses in a cluster of two; 4: what it reports of both blocks.
__global__ void misuse_kernel(int kind, const __grid_constant__ TensorMap map) {
  VK_SWIZZLED_SHARED(char, box);
  VK_SHARED(MBarrier, barrier, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
  }
  cluster_sync();
  if (threadIdx.x != 0 || cluster_rank() != 0) return;
  if (kind == 0) tma_load_multicast(box, map, barrier, {0, 0}, 5);
  if (kind == 1) mbarrier_arrive_at(barrier, 2);
  if (kind == 2) cluster_sync(), mbarrier_arrive_at(barrier, 1);  // the others have exited
  if (kind == 3) tma_load_multicast(box + 64, map, barrier, {0, 0}, 3);
  if (kind == 4) mbarrier_wait(barrier, 0);
}

template <ClusterBug BUG>
const char* share(const uint16_t* data, float* out, int* ranks, int size, int steps, int blocks) {
  return guarded([&] {
    emulator::launch(share_kernel<BUG>,
                     {static_cast<unsigned>(blocks), 64, 2 * 8192, static_cast<unsigned>(size)},
                     map_of(data, blocks / size * steps * 64, 64 / size), out, ranks, size, steps);
  });
}

}  // namespace

EXPORT share(int bug, const uint16_t* data, float* out, int* ranks, int size, int steps,
             int blocks) {
  constexpr decltype(&share<ClusterBug::kNone>) kKernels[] = {
      share<ClusterBug::kNone>, share<ClusterBug::kBegin>, share<ClusterBug::kEnd>,
      share<ClusterBug::kOwnStage>, share<ClusterBug::kInitFence>};
  return kKernels[bug](data, out, ranks, size, steps, blocks);
}

EXPORT misuse(int kind, const uint16_t* data, int blocks, int size) {
  return guarded([&] {
    emulator::launch(misuse_kernel,
                     {static_cast<unsigned>(blocks), 32, 8320, static_cast<unsigned>(size)}, kind,
                     map_of(data, 64, 64));
  });
}
