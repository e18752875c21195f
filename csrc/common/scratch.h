// Scratch memory of launchers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace vitkernels {

struct FreeScratch {
  void operator()(void* p) const { std::free(p); }
};

// Scratch of the calling thread, 64-byte aligned, kept between calls: fresh pages cost more than
// the kernel of a small problem. It stays valid until the thread asks for the same slot again.
template <int slot = 0>
void* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<void, FreeScratch> memory;
  thread_local int64_t held = 0;
  if (bytes > held) {
    memory.reset();
    held = 0;
    const size_t size = static_cast<size_t>((bytes + 4095) / 4096 * 4096);
    memory.reset(std::aligned_alloc(64, size));
    if (memory == nullptr) throw std::bad_alloc();
    held = static_cast<int64_t>(size);
  }
  return memory.get();
}

}  // namespace vitkernels
