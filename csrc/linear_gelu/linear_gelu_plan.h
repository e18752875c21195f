// Launch settings of linear_gelu's CUDA kernels: plain host arithmetic, so that tests read them
// without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/pair_plan.h"

namespace vitkernels::linear_gelu {

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- A product's tile, of any path

struct Tile {
  int m, n, k;
};

constexpr Tile kSimtTile = {128, 128, 16};
constexpr Tile kSm80Tile = {128, 128, 32};
constexpr Tile kSm80Small = {64, 64, 32};
constexpr Tile kSm90Tile = {128, 128, 64};
constexpr int kSm80Stages = 4;
constexpr int kSm90Stages = 4;
constexpr int kMostSplits = 8;

constexpr int64_t tiles(const Tile& tile, int64_t M, int64_t N) {
  return ceil_divide(M, tile.m) * ceil_divide(N, tile.n);
}

// The small tile where the large one leaves multiprocessors without work.
constexpr bool takes_small(int64_t M, int64_t N, int multiprocessors) {
  return 2 * tiles(kSm80Tile, M, N) <= multiprocessors;
}

// ---- Pieces of the sum over k, of dweight: its k are all rows of the batch

struct Splits {
  int count;
  int64_t k;  // of each, a multiple of the tile's
};

// As many as make the waves of `residents` blocks a multiprocessor fullest; each costs a pass over
// the partial sums, which counts like `kPass` k of a wave.
inline Splits splits(const Tile& tile, int64_t M, int64_t N, int64_t K, int multiprocessors,
                     int residents) {
  constexpr int64_t kPass = 64;
  const int64_t steps = ceil_divide(K, tile.k), slots = int64_t{multiprocessors} * residents;
  Splits best{1, steps * tile.k};
  int64_t least = ceil_divide(tiles(tile, M, N), slots) * steps * tile.k;
  for (int count = 2; count <= kMostSplits && count <= steps; ++count) {
    const int64_t k = ceil_divide(steps, count) * tile.k;
    if (ceil_divide(K, k) != count) continue;  // a piece without work
    const int64_t cost = ceil_divide(tiles(tile, M, N) * count, slots) * k + count * kPass;
    if (cost < least) least = cost, best = {count, k};
  }
  return best;
}

// ---- dh and dbias

constexpr int kGradColumns = 256, kGradRows = 8;  // of a block: 8 elements a thread

struct GradPlan {
  int64_t rows_per_program, programs;
};

// About eight blocks on each multiprocessor.
inline GradPlan grad_plan(int64_t rows, int64_t N, int multiprocessors) {
  const int64_t most =
      std::max<int64_t>(1, 8 * int64_t{multiprocessors} / ceil_divide(N, kGradColumns));
  const int64_t each = ceil_divide(ceil_divide(rows, most), kGradRows) * kGradRows;
  return {each, ceil_divide(rows, each)};
}

// ---- sm_90: blocks that stay, in pairs with tiles of the same columns one below the other, but
// where more than a sixteenth of the tiles would be empty

struct Sm90Plan {
  int cluster;        // blocks
  int rows, columns;  // of tiles: M's a cluster at a time, N's
  int items, blocks;  // of all pieces of K
};

inline Sm90Plan sm90_plan(int64_t M, int64_t N, int splits, int multiprocessors) {
  const auto down = static_cast<int>(ceil_divide(M, kSm90Tile.m));
  Sm90Plan p{};
  p.cluster = blocks_of_pair(down, multiprocessors);
  p.rows = static_cast<int>(ceil_divide(down, p.cluster));
  p.columns = static_cast<int>(ceil_divide(N, kSm90Tile.n));
  p.items = p.rows * p.columns * splits;
  p.blocks = std::min(p.items, multiprocessors / p.cluster) * p.cluster;
  return p;
}

// Shared memory.

// Stages of A and B, then a buffer of the results of each of two warpgroups, then barriers.
constexpr int sm90_stage_bytes() { return (kSm90Tile.m + kSm90Tile.n) * kSm90Tile.k * 2; }
constexpr int sm90_result_bytes() { return kSm90Tile.m * kSm90Tile.n * 2; }
constexpr int sm90_shared_bytes() {
  return kSm90Stages * sm90_stage_bytes() + 2 * sm90_result_bytes() + 2 * kSm90Stages * 8;
}
static_assert(sm90_shared_bytes() <= 232448, "shared memory of an sm_90 block");

// ---- sm_80: shared memory

constexpr int sm80_shared_bytes(const Tile& tile) {
  const int stages = kSm80Stages * (tile.m + tile.n) * tile.k * 2;
  const int results = tile.m * (tile.n + 8) * 2;
  return stages > results ? stages : results;
}
static_assert(2 * sm80_shared_bytes(kSm80Tile) <= 166912, "two blocks of an sm_80 multiprocessor");

}  // namespace vitkernels::linear_gelu
