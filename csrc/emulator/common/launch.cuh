// The emulator's twin of csrc/common/launch.cuh: CPU tensors, no stream, kernels run to their end
// at once.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/platform.cuh"

#define VK_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m)

namespace vitkernels {

class Device {
 public:
  explicit Device(const torch::stable::Tensor&) {}

  static bool holds(const torch::stable::Tensor& t) { return t.is_cpu(); }
  int multiprocessors() const { return emulator::settings().multiprocessors; }
  int architecture() const { return emulator::settings().architecture; }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              const Arguments&... arguments) const {
    emulator::launch(kernel, {grid, block, shared_bytes}, arguments...);
  }
};

}  // namespace vitkernels
