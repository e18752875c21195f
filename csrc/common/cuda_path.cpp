#include "common/cuda_path.h"

#include <atomic>

namespace vitkernels {
namespace {

std::atomic<int> forced{0};

}  // namespace

CudaPath forced_cuda_path() { return static_cast<CudaPath>(forced.load()); }

}  // namespace vitkernels

int vitkernels_force_cuda_path(int path) {
  return path >= 0 && path <= 3 ? vitkernels::forced.exchange(path) : vitkernels::forced.load();
}
