// Launch settings of attention_sm90_long.cu (forward) and attention_sm90_long_backward.cu: plain
// host arithmetic, so that tests read them without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/attention_plan_sm90.h"

namespace vitkernels::attention::sm90_long {

constexpr int kGroups = 2;  // warpgroups that multiply 64 query rows each; one more has the loader
constexpr int kLongThreads = 128 * (kGroups + 1);
constexpr int kConsumerRegisters = 240, kLoaderRegisters = 24;  // of a thread
constexpr int kMostTiles = 4;
constexpr int64_t kLongBarrierBytes = 8 * (2 * kGroups + 4 * kMostTiles);

constexpr int padded_width(int D) { return std::max(64, sm90::padded_width(D)); }

constexpr int tiles_of(int n, int tile) { return (n + tile - 1) / tile; }

// ---- Forward

// Keys of a product. For head dims to 64 without bias, masks and dropout there are two instances:
// that with which fewer columns are computed in vain.
constexpr int kNarrow = 152, kWide = 176;
constexpr int forward_keys(int width, int Nk, bool general) {
  const int narrow = tiles_of(Nk, kNarrow) * kNarrow, wide = tiles_of(Nk, kWide) * kWide;
  return general || width > 64 || narrow < wide ? kNarrow : kWide;
}

// Sums over keys go in steps of 16.
constexpr int stage_rows(int keys) { return sm90::round_up(keys, 16); }
constexpr int64_t stage_bytes(int width, int keys) {
  return sm90::tile_bytes(stage_rows(keys), width);
}

struct ForwardPlan {
  int width, keys;  // the instance
  int items;        // of a head: 128 query rows each
  int tiles;        // of keys
  int stages;       // tiles of K, and of V, in shared memory
  int64_t shared_bytes, blocks;
};

inline ForwardPlan forward_plan(int64_t B, int H, int Nq, int Nk, int D, bool general,
                                int multiprocessors) {
  ForwardPlan p{};
  p.width = padded_width(D);
  p.keys = forward_keys(p.width, Nk, general);
  p.items = tiles_of(Nq, kGroups * sm90::kTile);
  p.tiles = tiles_of(Nk, p.keys);
  const int64_t queries = kGroups * sm90::tile_bytes(sm90::kTile, p.width) + kLongBarrierBytes;
  const int64_t stage = 2 * stage_bytes(p.width, p.keys);
  p.stages =
      static_cast<int>(std::min<int64_t>((sm90::kSharedLimit - queries) / stage, kMostTiles));
  p.shared_bytes = queries + p.stages * stage;
  p.blocks = std::min<int64_t>(B * H * p.items, multiprocessors);
  return p;
}

}  // namespace vitkernels::attention::sm90_long
