// The emulator's twin of csrc/common/tma.cuh. A load is performed when no thread can go on, a store
// when its thread waits for it.
//
// References: [P] PTX ISA, instruction named.
#pragma once

#include "common/mbarrier.cuh"
#include "common/tensor_layout.h"
#include "emulator/tensor_copy.h"

namespace vitkernels {

struct alignas(64) TensorMap {
  const void* data;
  TensorLayout layout;
  DType dtype;
  Swizzle swizzle;
};

inline TensorMap make_tensor_map(const void* data, DType dtype, const TensorLayout& layout,
                                 Swizzle swizzle) {
  check_tensor_layout(data, dtype, layout, swizzle);
  return {data, layout, dtype, swizzle};
}

// [P: membar, fence.proxy.async]
inline void fence_proxy_async() { emulator::async_proxy().publish_shared(); }

namespace emulator {
template <int RANK>
TensorCopy tensor_copy(const char* what, const TensorMap& map, const void* shared,
                       const int (&at)[RANK], Place place) {
  static_assert(RANK >= 2 && RANK <= 5, "2 to 5 dimensions");
  if (map.layout.rank != RANK)
    fail(std::string(what) + " with " + std::to_string(RANK) + " coordinates of a tensor of " +
             std::to_string(map.layout.rank) + " dimensions",
         place);
  TensorCopy copy{map.data, map.layout, static_cast<int>(size_of(map.dtype)), map.swizzle, {}, 0};
  for (int i = 0; i < RANK; ++i) copy.at[i] = at[i];
  const auto period = static_cast<size_t>(swizzle_period(map.swizzle));
  copy.offset = shared_offset(what, shared, copy.bytes(), period < 128 ? 128 : period, place);
  return copy;
}
}  // namespace emulator

// [P: cp.async.bulk.tensor]
template <int RANK>
void tma_load(void* to_shared, const TensorMap& map, MBarrier* barrier, const int (&at)[RANK],
              VkPlace place = VkPlace::here()) {
  emulator::begin_load("tma_load", emulator::tensor_copy("tma_load", map, to_shared, at, place),
                       &barrier->state, 1u << emulator::cluster_rank(), place);
}
template <int RANK>
void tma_store(const TensorMap& map, const void* from_shared, const int (&at)[RANK],
               VkPlace place = VkPlace::here()) {
  emulator::begin_store(emulator::tensor_copy("tma_store", map, from_shared, at, place), place);
}

// [P: cp.async.bulk.commit_group, cp.async.bulk.wait_group]
inline void commit_stores() { emulator::running->stores.commit(); }
template <int PENDING>
void wait_stores_read() {
  emulator::running->stores.wait(PENDING);
}
template <int PENDING>
void wait_stores() {
  emulator::running->stores.wait(PENDING);
}

}  // namespace vitkernels
