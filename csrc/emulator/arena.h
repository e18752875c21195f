// Shared memory of a block: the dynamic part, then static arrays as they are met, each with a guard
// behind it.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/sanitizer.h"

namespace vitkernels::emulator {

struct Arena {
  static constexpr size_t kBytes = 512 << 10;
  static constexpr size_t kGuardBytes = 64;
  static constexpr unsigned char kPoison = 0xFF;

  struct Array {
    const void* key;
    size_t offset, bytes;
  };

  char* base = nullptr;
  size_t dynamic_bytes = 0, used = 0, static_bytes = 0;
  std::vector<Array> arrays;

  void open(char* memory, size_t dynamic) {
    base = memory;
    arrays.clear();
    used = static_bytes = 0;
    dynamic_bytes = dynamic;
    poison(base, kBytes);
    take(dynamic);
  }

  void* find(const void* key) const {
    for (const Array& array : arrays)
      if (array.key == key) return base + array.offset;
    return nullptr;
  }

  void* add(const void* key, size_t bytes) {
    static_bytes += bytes;
    arrays.push_back({key, take(bytes), bytes});
    return base + arrays.back().offset;
  }

  bool holds(const void* address, size_t bytes) const {
    const auto* p = static_cast<const char*>(address);
    const auto inside = [&](size_t offset, size_t size) {
      return p >= base + offset && p + bytes <= base + offset + size;
    };
    bool found = inside(0, dynamic_bytes);
    for (const Array& array : arrays) found |= inside(array.offset, array.bytes);
    return found;
  }

  // What was written behind an array, or nothing.
  std::string overrun() const {
    std::string found = overrun(0, dynamic_bytes, "dynamic");
    for (const Array& array : arrays)
      if (found.empty()) found = overrun(array.offset, array.bytes, "static");
    return found;
  }

 private:
  // Where the bytes begin; they and their guard are 0xFF.
  size_t take(size_t bytes) {
    const size_t offset = used;
    used += (bytes + 127) / 128 * 128 + kGuardBytes * 2;
    unpoison(base + offset, used - offset);
    std::memset(base + offset, kPoison, used - offset);
    poison(base + offset + bytes, used - offset - bytes);
    return offset;
  }

  std::string overrun(size_t offset, size_t bytes, const char* which) const {
    const char* end = base + offset + bytes;
    for (size_t i = 0; i < kGuardBytes; ++i)
      if (static_cast<unsigned char>(end[i]) != kPoison)
        return "written " + std::to_string(i) + " bytes past the end of " + which +
               " shared memory of " + std::to_string(bytes) + " bytes";
    return "";
  }
};

}  // namespace vitkernels::emulator
