// How a launcher meets the GPU: device guard, stream, launch, registration. The emulator's twin is
// csrc/emulator/common/launch.cuh.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "common/platform.cuh"

// At the bottom of a .cu file: VK_CUDA_LIBRARY_IMPL(m) { m.impl("op.cuda", TORCH_BOX(&op)); }
#define VK_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m)

namespace vitkernels {

// Makes the tensor's device current for as long as it lives, and knows its current stream.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount,
                                          t.get_device_index()));
    int major = 0, minor = 0;
    STD_CUDA_CHECK(
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device_index()));
    STD_CUDA_CHECK(
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, t.get_device_index()));
    architecture_ = 10 * major + minor;
  }

  static bool holds(const torch::stable::Tensor& t) { return t.is_cuda(); }
  int multiprocessors() const { return multiprocessors_; }
  // 10 * major + minor of the compute capability.
  int architecture() const { return architecture_; }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              const Arguments&... arguments) const {
    allow_shared(kernel, shared_bytes);
    kernel<<<grid, block, shared_bytes, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // In clusters of so many blocks, of which the grid's x is a multiple (sm_90)
  // [G: "Thread Block Clusters"].
  template <class... Parameters, class... Arguments>
  void launch_cluster(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block,
                      size_t shared_bytes, const Arguments&... arguments) const {
    allow_shared(kernel, shared_bytes);
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = static_cast<unsigned>(cluster);
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
    launch_with(kernel, grid, block, shared_bytes, size, 1, arguments...);
  }

  // Two launches, of which the second may begin while the first ends, where the architecture can
  // (csrc/common/dependent_launch.cuh): it calls wait_for_grid_before() before it reads what the
  // first wrote [G: "Programmatic Dependent Launch and Synchronization"].
  template <class... Parameters, class... Arguments>
  void launch_leading(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                      const Arguments&... arguments) {
    launch(kernel, grid, block, shared_bytes, arguments...);
  }
  template <class... Parameters, class... Arguments>
  void launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                        const Arguments&... arguments) {
    // Code for an older architecture, compiled for this one by the driver, does not wait.
    cudaFuncAttributes code{};
    STD_CUDA_CHECK(cudaFuncGetAttributes(&code, kernel));
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    launch_with(kernel, grid, block, shared_bytes, early,
                architecture_ >= 90 && code.ptxVersion >= 90 ? 1 : 0, arguments...);
  }

 private:
  // More than 48 KB only by request [G: "cudaFuncAttributeMaxDynamicSharedMemorySize"].
  template <class... Parameters>
  static void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
    if (bytes > 48 << 10)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(bytes)));
  }

  template <class... Parameters, class... Arguments>
  void launch_with(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaLaunchAttribute attribute, unsigned attributes,
                   const Arguments&... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = attributes;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 0, architecture_ = 0;
};

}  // namespace vitkernels
