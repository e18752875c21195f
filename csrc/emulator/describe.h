// Places and threads in words, for error messages.
#pragma once

#include <string>
#include <vector>

#include "emulator/emulator.h"

namespace vitkernels::emulator {

inline std::string text(const Index3& i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

inline std::string text(const Place& place) {
  return std::string(place.file) + ":" + std::to_string(place.line);
}

// "0-31,64" for a sorted list of thread numbers.
inline std::string ranges(const std::vector<int>& ids) {
  std::string out;
  for (size_t i = 0; i < ids.size();) {
    size_t j = i;
    while (j + 1 < ids.size() && ids[j + 1] == ids[j] + 1) ++j;
    out += (out.empty() ? "" : ",") + std::to_string(ids[i]);
    if (j > i) out += "-" + std::to_string(ids[j]);
    i = j + 1;
  }
  return out;
}

}  // namespace vitkernels::emulator
