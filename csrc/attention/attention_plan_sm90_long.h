// Launch settings of attention_sm90_long.cu (forward), attention_sm90_long_backward.cu and
// attention_sm90_long_dbias.cu: plain host arithmetic, so that tests read them without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/attention_plan_sm90.h"

namespace vitkernels::attention::sm90_long {

constexpr int kGroups = 2;  // warpgroups that multiply 64 query rows each; one more has the loader
constexpr int kLongThreads = 128 * (kGroups + 1);
constexpr int kConsumerRegisters = 240, kLoaderRegisters = 24;  // of a thread, without tails
constexpr int kMostTiles = 4;
constexpr int64_t kLongBarrierBytes = 8 * (2 * kGroups + 4 * kMostTiles);

constexpr int long_width(int D) { return std::max(64, sm90::padded_width(D)); }

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

// Up to 16 query rows past whole tiles of 64 are tails, of 8 rows each, which three warps beside
// the loader compute: a tail beside an item of two whole tiles, so there must be as many of these.
constexpr int kTailRows = 8, kMostTails = 2;
constexpr int kTailShares = 3;  // warps, each with a share of every tile's keys
// Wider heads leave too few registers.
constexpr bool takes_tails(int width, bool general) { return width <= (general ? 64 : 80); }
constexpr int tails_of(int Nq) {
  const int tails = tiles_of(Nq % sm90::kTile, kTailRows);
  return tails <= kMostTails && tails <= Nq / (kGroups * sm90::kTile) ? tails : 0;
}
// Which tail a head's item has, or none. Heads take turns in which items have them, so that blocks,
// which go through items in steps of the grid, get as many each.
constexpr int kNoTail = kMostTails;
constexpr int tail_of(int tails, int whole_items, int head, int item) {
  if (tails == 0 || item >= whole_items) return kNoTail;
  const int turn = (item + head / whole_items) % whole_items;
  return turn < tails ? turn : kNoTail;
}

// Of a thread that multiplies, and of any other: together the 3 * 168 of the start.
constexpr int forward_registers(int width, bool general) {
  return takes_tails(width, general) ? 200 : kConsumerRegisters;
}
constexpr int tail_registers(int width, bool general) {
  return 3 * 168 - kGroups * forward_registers(width, general);
}

// What two of the tails' warps hand to the third: sums, maxima and sums of exponentials.
constexpr int handed_bytes(int width) { return 32 * 16 * (width / 16 + 1); }  // by one of them

struct ForwardPlan {
  int width, keys;  // the instance
  int rows, tails;  // query rows in tiles of 64; tails of 8 rows behind them
  int items;        // of a head: 128 query rows each
  int tiles;        // of keys
  int stages;       // tiles of K, and of V, in shared memory
  int64_t shared_bytes, blocks;
};

inline ForwardPlan forward_plan(int64_t B, int H, int Nq, int Nk, int D, bool general,
                                int multiprocessors) {
  ForwardPlan p{};
  p.width = long_width(D);
  p.keys = forward_keys(p.width, Nk, general);
  p.tails = takes_tails(p.width, general) ? tails_of(Nq) : 0;
  p.rows = p.tails > 0 ? Nq / sm90::kTile * sm90::kTile : Nq;
  p.items = tiles_of(p.rows, kGroups * sm90::kTile);
  p.tiles = tiles_of(Nk, p.keys);
  const int64_t others = kGroups * sm90::tile_bytes(sm90::kTile, p.width) + kLongBarrierBytes +
                         (p.tails > 0 ? (kTailShares - 1) * handed_bytes(p.width) : 0);
  const int64_t stage = 2 * stage_bytes(p.width, p.keys);
  p.stages = static_cast<int>(std::min<int64_t>((sm90::kSharedLimit - others) / stage, kMostTiles));
  p.shared_bytes = others + p.stages * stage;
  p.blocks = std::min<int64_t>(B * H * p.items, multiprocessors);
  return p;
}

// ---- Backward

// Columns of a product: keys, or queries in the pass by key, which has two sums in registers.
constexpr int backward_columns(int width, bool by_key) {
  if (!by_key) return width <= 80 ? 128 : 96;
  return width <= 80 ? 80 : width == 96 ? 64 : 48;
}

// Rows of a head in the table of what each query needs: as many as either pass reads.
constexpr int stats_rows(int Nq, int width) {
  const int columns = backward_columns(width, true);
  return std::max(tiles_of(Nq, columns) * columns, tiles_of(Nq, sm90::kTile) * sm90::kTile);
}

struct BackwardPlan {
  int items;   // of a head: 128 rows each
  int tiles;   // of the other side's columns
  int stages;  // pairs of tiles in shared memory
  int stats_rows;
  int64_t shared_bytes, blocks;
  bool general;  // bias, padding mask or dropout
};

inline BackwardPlan backward_plan(int64_t B, int H, int Nq, int Nk, int D, bool by_key,
                                  int multiprocessors) {
  BackwardPlan p{};
  const int width = long_width(D), columns = backward_columns(width, by_key);
  p.items = tiles_of(by_key ? Nk : Nq, kGroups * sm90::kTile);
  p.tiles = tiles_of(by_key ? Nq : Nk, columns);
  p.stats_rows = stats_rows(Nq, width);
  const int64_t rows = 2 * kGroups * sm90::tile_bytes(sm90::kTile, width) + kLongBarrierBytes;
  const int64_t stage = 2 * sm90::tile_bytes(columns, width);
  p.stages = static_cast<int>(std::min<int64_t>((sm90::kSharedLimit - rows) / stage, kMostTiles));
  p.shared_bytes = rows + p.stages * stage;
  p.blocks = std::min<int64_t>(B * H * p.items, multiprocessors);
  return p;
}

// ---- Gradient of the bias

constexpr int kBiasColumns = 96;  // keys of a product

struct BiasPlan {
  int items, tiles;  // of a matrix: 128 queries x 96 keys each
  int all;           // items of every matrix
  int stages;        // pairs of a batch item and a head whose rows are in shared memory
  int stats_rows;
  int64_t shared_bytes, blocks;
};

inline int64_t bias_items(int64_t matrices, int Nq, int Nk) {
  return matrices * tiles_of(Nq, kGroups * sm90::kTile) * tiles_of(Nk, kBiasColumns);
}

inline BiasPlan bias_plan(int64_t matrices, int Nq, int Nk, int D, int multiprocessors) {
  BiasPlan p{};
  const int width = long_width(D);
  p.items = tiles_of(Nq, kGroups * sm90::kTile);
  p.tiles = tiles_of(Nk, kBiasColumns);
  p.all = static_cast<int>(bias_items(matrices, Nq, Nk));
  p.stats_rows = stats_rows(Nq, width);
  const int64_t stage =
      2 * (kGroups * sm90::tile_bytes(sm90::kTile, width) + sm90::tile_bytes(kBiasColumns, width));
  p.stages = static_cast<int>(
      std::min<int64_t>((sm90::kSharedLimit - kLongBarrierBytes) / stage, kMostTiles));
  p.shared_bytes = p.stages * stage + kLongBarrierBytes;
  p.blocks = std::min<int64_t>(p.all, multiprocessors);
  return p;
}

}  // namespace vitkernels::attention::sm90_long
