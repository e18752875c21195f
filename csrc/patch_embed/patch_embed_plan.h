// Launch settings of patch_embed's CUDA kernels: plain host arithmetic, so that tests read them
// without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/pair_plan.h"

namespace vitkernels::patch_embed {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The columns of a row as 16-bit products see them: segments of one scale, each padded to whole
// steps: 16 columns of sm_80, 64 of sm_90 (fewer, by a branch around a wgmma, make ptxas serialize
// all of them). Without mean and std all channels are one segment (14 x 14: 588 -> 592 or 640),
// else each is one (3 * 196 -> 3 * 208 or 3 * 256), between which the fp32 sums are rescaled.
struct Padded {
  int segments, used, length;  // each segment's columns before and after padding

  constexpr int columns() const { return segments * length; }
  constexpr int steps() const { return length / 16; }
  constexpr int tiles() const { return (length + 63) / 64; }  // of a segment, 64 columns each
};
constexpr Padded padded(int channels, int pixels, bool normalized, int step) {
  const int segments = normalized ? channels : 1, used = normalized ? pixels : channels * pixels;
  return {segments, used, (used + step - 1) / step * step};
}
constexpr int kMostColumns = 4096;  // padded: of which shared memory holds the places

// Parts of a sum over `steps`, of each of so many tiles; steps of a part. `blocks` work at a time:
// the split with which the last of them ends first, where writing a part and adding it later cost
// as much as kPartSteps steps; of equals the one with fewest parts.
struct Split {
  int splits, steps;
};
constexpr int kMostSplits = 64, kPartSteps = 5;
inline Split split(int64_t tiles, int64_t steps, int64_t blocks) {
  tiles = std::max<int64_t>(tiles, 1), steps = std::max<int64_t>(steps, 1);
  int64_t best_time = INT64_MAX;
  Split best{};
  for (int64_t parts = 1; parts <= std::min<int64_t>(steps, kMostSplits); ++parts) {
    const int64_t each = divide_up(steps, parts), splits = divide_up(steps, each);
    const int64_t time = divide_up(tiles * splits, blocks) * (each + kPartSteps);
    if (time < best_time) {
      best_time = time;
      best = {static_cast<int>(splits), static_cast<int>(each)};
    }
  }
  return best;
}

namespace simt {
constexpr int kThreads = 256, kTile = 64, kDepth = 16;
constexpr int kBlocks = 4;  // that share a multiprocessor
}  // namespace simt

namespace sm80 {
constexpr int kThreads = 256, kTile = 128, kDepth = 64;
constexpr int kBlocks = 1;                      // on a multiprocessor: two would spill
constexpr int kTileBytes = kTile * kDepth * 2;  // of one operand

// Two stages of A and B, then the places of the pixels.
inline int64_t shared_bytes(int places) { return 4 * kTileBytes + 4 * int64_t{places}; }
}  // namespace sm80

namespace sm90 {
constexpr int kThreads = 384;  // two warpgroups multiply, one gathers
constexpr int kRows = 128, kDepth = 64, kStages = 4;
constexpr int kRowBytes = kRows * kDepth * 2;
constexpr int kWayOutColumns = 32, kWayOutStride = 36;  // floats
constexpr int kWayOutBytes = 16 * kWayOutStride * 4;    // of a warp

struct Plan {
  int width;      // columns of a tile of tokens
  int pair;       // blocks with the same columns of neighbouring rows of tiles
  int64_t items;  // tiles, as many at a time as a pair has
  int64_t blocks, shared_bytes;
};

constexpr int64_t shared_bytes(int width, int places) {
  return kStages * (kRowBytes + width * kDepth * 2) + 8 * kWayOutBytes + 4 * int64_t{places} + 128;
}

// The width that leaves the fewest columns empty; of equals the widest, which reads pixels least.
inline int width_for(int D) {
  int best = 256;
  for (const int width : {192, 128})
    if (divide_up(D, width) * width < divide_up(D, best) * best) best = width;
  return best;
}

inline Plan plan(int rows, int D, int places, int multiprocessors) {
  const int width = width_for(D);
  const int64_t down = divide_up(rows, kRows);
  const int pair = blocks_of_pair(down, multiprocessors);
  const int64_t items = divide_up(down, pair) * divide_up(D, width);
  return {width, pair, items, std::min<int64_t>(items, multiprocessors / pair) * pair,
          shared_bytes(width, places)};
}

// ---- Backward

// Rows go by groups of 64, of which one box brings the gradients: `patches` neighbours, a power of
// two, of each of 64 / patches images. The order of the rows is free, so that no box needs to cross
// from one image to the next.
constexpr int kGroup = 64;
struct Groups {
  int patches, images;  // of a group
  int across;           // groups side by side in an image
  int count;
};

// The groups with the fewest rows that do not exist; of equals the one with most neighbours.
inline Groups groups(int B, int N) {
  Groups best{};
  for (int patches = kGroup; patches > 0; patches /= 2) {
    const int images = kGroup / patches;
    const int64_t across = divide_up(N, patches), count = across * divide_up(B, images);
    if (best.count == 0 || count < best.count)
      best = {patches, images, static_cast<int>(across), static_cast<int>(count)};
  }
  return best;
}

constexpr int kPanelBytes = kGroup * kDepth * 2;  // a box of 64 x 64
constexpr int kTileColumns = 128;                 // columns of a patch

// `panels` of A of 64 rows each, two of B, in kStages stages.
constexpr int64_t product_bytes(int panels) {
  return int64_t{kStages} * (panels + kTileColumns / 64) * kPanelBytes;
}

// Blocks with the same rows of gradients, and neighbouring columns of a patch.
inline int pair_of(int columns, int multiprocessors) {
  return multiprocessors >= 2 && divide_up(columns, kTileColumns) % 2 == 0 ? 2 : 1;
}

struct DWeightPlan {
  int features;  // of a tile: 128 or 256
  int pair;
  int64_t tiles;
  Split split;  // of the groups
  int64_t shared_bytes;
};
inline DWeightPlan dweight_plan(const Groups& groups, int D, int columns, int multiprocessors) {
  DWeightPlan p{};
  // The wide tile, which gathers each pixel half as often, where at most a sixth of it is empty.
  p.features = divide_up(D, 256) * 256 * 6 <= int64_t{D} * 7 ? 256 : 128;
  p.pair = pair_of(columns, multiprocessors);
  p.tiles = divide_up(D, p.features) * divide_up(columns, kTileColumns);
  p.split = split(p.tiles, groups.count, multiprocessors);
  p.shared_bytes = product_bytes(p.features / 64) + 4 * kTileColumns + 128;
  return p;
}

struct DImagesPlan {
  int pair;
  int64_t tiles, blocks, shared_bytes;  // tiles of four groups
};
inline DImagesPlan dimages_plan(const Groups& groups, int columns, int multiprocessors) {
  const int64_t tiles = divide_up(groups.count, 4) * divide_up(columns, kTileColumns);
  const int pair = pair_of(columns, multiprocessors);
  return {pair, tiles, std::min<int64_t>(tiles, multiprocessors / pair * pair),
          product_bytes(4) + 8 * kWayOutBytes + 128};
}
}  // namespace sm90

}  // namespace vitkernels::patch_embed
