// The emulator's twin of csrc/common/launch.cuh: CPU tensors, no stream, kernels run to their end
// at once.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

#include "common/platform.cuh"
#include "emulator/dependent_launch.h"

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

  template <class... Parameters, class... Arguments>
  void launch_cluster(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block,
                      size_t shared_bytes, const Arguments&... arguments) const {
    emulator::launch(kernel, {grid, block, shared_bytes, static_cast<unsigned>(cluster)},
                     arguments...);
  }

  // Kept until launch_dependent, which must follow.
  template <class... Parameters, class... Arguments>
  void launch_leading(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                      const Arguments&... arguments) {
    const std::tuple<std::decay_t<Parameters>...> copies(arguments...);
    leading_ = std::make_unique<emulator::LeadingGrid>(
        [=] { emulator::run({grid, block, shared_bytes}, [&] { std::apply(kernel, copies); }); });
  }
  template <class... Parameters, class... Arguments>
  void launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                        const Arguments&... arguments) {
    const std::tuple<std::decay_t<Parameters>...> copies(arguments...);
    const auto leading = std::move(leading_);
    emulator::run_dependent(*leading, {grid, block, shared_bytes},
                            [&] { std::apply(kernel, copies); });
  }

 private:
  std::unique_ptr<emulator::LeadingGrid> leading_;
};

}  // namespace vitkernels
