// Launch settings of attention_simt.cu: plain host arithmetic.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::attention::simt {

constexpr int kThreads = 256;  // 16 x 16 threads, each with 4 x 4 elements of a tile
constexpr int kTile = 64;      // queries and keys of a tile

constexpr int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

// Kernels walk over their items in steps of the grid.
constexpr unsigned grid(int64_t items) {
  return static_cast<unsigned>(std::min<int64_t>(items, INT32_MAX));
}

// Instances hold 64, 128 or 256 columns of a result in registers.
constexpr int column_chunks(int D) { return D <= 64 ? 1 : D <= 128 ? 2 : 4; }

}  // namespace vitkernels::attention::simt
