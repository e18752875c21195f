// Boxes of a tensor between global and shared memory, copied by the tensor memory accelerator
// (sm_90). The emulator's twin is csrc/emulator/common/tma.cuh.
//
// A box lies in shared memory row after row, innermost dimension first, without gaps, swizzled as
// its map says. What lies outside the tensor is loaded as zeros and not stored.
//
// References: [P] PTX ISA, instruction named.
#pragma once

#include <cuda.h>

#include "common/mbarrier.cuh"
#include "common/tensor_layout.h"

namespace vitkernels {

// A kernel takes it by value: const __grid_constant__ TensorMap map.
struct TensorMap {
  CUtensorMap map;
};

// Host code. Throws std::runtime_error. The driver's function is found at run time, so that nothing
// links with libcuda.
inline TensorMap make_tensor_map(const void* data, DType dtype, const TensorLayout& layout,
                                 Swizzle swizzle) {
  check_tensor_layout(data, dtype, layout, swizzle);
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("tensor map: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint64_t sizes[5], strides[4];
  cuuint32_t box[5];
  const cuuint32_t every_element[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < layout.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(layout.sizes[i]);
    box[i] = static_cast<cuuint32_t>(layout.box[i]);
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(layout.strides[i] * size_of(dtype));
  }
  TensorMap out;
  const CUresult result =
      encode(&out.map,
             dtype == DType::kF32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
             : dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                     : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             static_cast<cuuint32_t>(layout.rank), const_cast<void*>(data), sizes, strides, box,
             every_element, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
             : swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
             : swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                       : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("tensor map: cuTensorMapEncodeTiled gave error " +
                             std::to_string(static_cast<int>(result)));
  return out;
}

// Makes what ordinary stores of this thread have written to shared memory visible to TMA and wgmma
// [P: membar, fence.proxy.async]. Every thread that wrote calls it, then a barrier, then the copy
// or product.
VK_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Begins to load the box at these coordinates, which may be negative; its bytes, all of the box's,
// come to the barrier [P: cp.async.bulk.tensor]. The target is on a 128-byte line, swizzled at a
// multiple of the swizzle's period. One thread.
template <int RANK>
VK_DEVICE void tma_load(void* to_shared, const TensorMap& map, MBarrier* barrier,
                        const int (&at)[RANK]) {
  static_assert(RANK >= 2 && RANK <= 5, "2 to 5 dimensions");
  const uint32_t to = shared_address(to_shared), by = shared_address(barrier);
  if constexpr (RANK == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(by), "r"(at[0]), "r"(at[1])
        : "memory");
  else if constexpr (RANK == 3)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"(&map), "r"(by), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  else if constexpr (RANK == 4)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(&map), "r"(by), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
        "l"(&map), "r"(by), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
}

// Begins to store a box [P: cp.async.bulk.tensor]. One thread, the one that commits and waits.
template <int RANK>
VK_DEVICE void tma_store(const TensorMap& map, const void* from_shared, const int (&at)[RANK]) {
  static_assert(RANK >= 2 && RANK <= 5, "2 to 5 dimensions");
  const uint32_t from = shared_address(from_shared);
  if constexpr (RANK == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
            &map),
        "r"(from), "r"(at[0]), "r"(at[1])
        : "memory");
  else if constexpr (RANK == 3)
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], "
        "[%1];" ::"l"(&map),
        "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  else if constexpr (RANK == 4)
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], "
        "[%1];" ::"l"(&map),
        "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], "
        "[%1];" ::"l"(&map),
        "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
}

// Makes one group of the thread's stores since the last one [P: cp.async.bulk.commit_group].
VK_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all groups but the newest PENDING have read shared memory, which may then be written
// again or given up [P: cp.async.bulk.wait_group.read].
template <int PENDING>
VK_DEVICE void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Waits until they have written global memory too [P: cp.async.bulk.wait_group].
template <int PENDING>
VK_DEVICE void wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace vitkernels
