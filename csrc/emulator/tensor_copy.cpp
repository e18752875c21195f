#include "emulator/tensor_copy.h"

#include <cstring>

namespace vitkernels::emulator {

template <class Function>
void TensorCopy::for_each(Function element_function) const {
  const auto count = static_cast<uint32_t>(bytes() / static_cast<size_t>(element));
  int index[5] = {};
  for (uint32_t i = 0; i < count; ++i) {
    int64_t position = 0;
    bool inside = true;
    for (int d = 0; d < layout.rank; ++d) {
      const int64_t coordinate = static_cast<int64_t>(at[d]) + index[d];
      inside &= coordinate >= 0 && coordinate < layout.sizes[d];
      position += coordinate * layout.strides[d];
    }
    const uint32_t linear = offset + i * static_cast<uint32_t>(element);
    element_function(swizzled(swizzle, linear),
                     inside ? static_cast<const char*>(data) + position * element : nullptr);
    for (int d = 0; d < layout.rank && ++index[d] == layout.box[d]; ++d) index[d] = 0;
  }
}

void begin_load(const char* what, const TensorCopy& copy, uint64_t* barrier, unsigned blocks,
                Place place) {
  const Unwatched emulator;
  const uint32_t offset = shared_offset(what, barrier, 8, 8, place);
  for (int rank = 0; blocks >> rank != 0; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    AsyncProxy& proxy = async_proxy_of(what, rank, place);
    const auto perform = [copy, &proxy] {
      copy.for_each([&](uint32_t shared, const char* global) {
        const char zero[4] = {};
        proxy.write(shared, global != nullptr ? global : zero, static_cast<size_t>(copy.element));
      });
    };
    proxy.begin_load(offset, copy.offset, copy.bytes(), perform, place);
  }
}

void begin_store(const TensorCopy& copy, Place place) {
  const Unwatched emulator;
  async_proxy().check_published("tma_store", copy.offset, copy.bytes(), place);
  const auto* shared = static_cast<const char*>(shared_base()) + copy.offset;
  const std::vector<char> as_issued(shared, shared + copy.bytes());
  running->stores.add([copy, shared, as_issued, place] {
    const Unwatched emulator;
    if (std::memcmp(shared, as_issued.data(), as_issued.size()) != 0)
      fail("shared memory was written before a tma_store had read it", place);
    copy.for_each([&](uint32_t from, const char* global) {
      if (global != nullptr)
        std::memcpy(const_cast<char*>(global), as_issued.data() + (from - copy.offset),
                    static_cast<size_t>(copy.element));
    });
  });
  running->place = place;  // what an end of the thread without a wait is reported at
}

}  // namespace vitkernels::emulator
