// A box of a tensor between global memory and the shared memory of a block, as TMA copies it.
#pragma once

#include "common/tensor_layout.h"
#include "emulator/async_proxy.h"

namespace vitkernels::emulator {

struct TensorCopy {
  const void* data;
  TensorLayout layout;
  int element;  // bytes
  Swizzle swizzle;
  int at[5];
  uint32_t offset;  // of the box in shared memory

  size_t bytes() const {
    auto product = static_cast<size_t>(element);
    for (int i = 0; i < layout.rank; ++i) product *= static_cast<size_t>(layout.box[i]);
    return product;
  }
  // Calls element(where in shared memory, address in global memory or null outside the tensor) for
  // each element of the box.
  template <class Function>
  void for_each(Function element_function) const;
};

// To the same place in the shared memory of each block of the cluster whose bit is set, each with
// its own barrier.
void begin_load(const char* what, const TensorCopy& copy, uint64_t* barrier, unsigned blocks,
                Place place);
void begin_store(const TensorCopy& copy, Place place);

}  // namespace vitkernels::emulator
