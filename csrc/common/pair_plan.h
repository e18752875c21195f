// When blocks work in pairs (common/pair.cuh): plain host arithmetic.
#pragma once

#include <cstdint>

namespace vitkernels {

// Blocks of a cluster where two tiles next to each other share an operand: 2, but for one block
// alone where more than a sixteenth of the tiles would be empty.
constexpr int blocks_of_pair(int64_t tiles, int multiprocessors) {
  return multiprocessors >= 2 && (tiles % 2 == 0 || tiles >= 16) ? 2 : 1;
}

}  // namespace vitkernels
