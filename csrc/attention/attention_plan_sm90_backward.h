// Launch settings of attention_sm90_backward.cu: plain host arithmetic, so that tests read them
// without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::attention::sm90_backward {

constexpr int kMaxTokens = 256;  // queries, and keys
constexpr int kMaxHeadDim = 64;
constexpr int kTile = 64;                // rows of a wgmma; keys of a panel of scores
constexpr int kSharedLimit = 227 << 10;  // of a block, bytes
constexpr int kBarrierBytes = 64;

constexpr bool serves(int Nq, int Nk, int D) {
  return Nq <= kMaxTokens && Nk <= kMaxTokens && D <= kMaxHeadDim && D % 8 == 0;
}

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// The tokens that an instance's products cover: columns of a wgmma, a multiple of 8.
constexpr int kWidths[] = {64, 144, 200, 208, 256};
constexpr int width_for(int tokens) {
  for (const int width : kWidths)
    if (width >= tokens) return width;
  return 0;
}

// Head dims of windows have an instance of their own where windows are of that size.
constexpr int depth_for(int width, int D) {
  return D <= 32 && width != 200 && width != 208 ? 32 : 64;
}

// Of a block: a tile each, but four share their registers in two. Up to 64 tokens, several blocks
// have room on a multiprocessor.
constexpr int warpgroups(int width) { return width <= kTile ? 1 : width <= 3 * kTile ? 3 : 2; }
constexpr int resident_blocks(int width) { return width <= kTile ? 4 : 1; }

// Shared memory, in bytes: tiles of q, k, dout, v and the next item's q, the scores, the barriers.
// Sums over tokens go in steps of 16, so tiles have as many rows.
struct Layout {
  int rows;
  bool
      late_v;  // no room for five tiles: v takes that of q, which comes again, and q is not doubled
  int narrow;  // columns of the last panel of scores where they are 16, else 0
  int k, dout, v, next_q, scores, barriers, bytes;
};

constexpr Layout layout(int width, int depth) {
  Layout l{};
  l.rows = round_up(width, 16);
  l.narrow = l.rows % kTile == 16 ? 16 : 0;
  const int columns = l.rows % kTile == 16 ? l.rows : round_up(width, kTile);
  const int tile = l.rows * 2 * depth, scores = columns * l.rows * 2;
  l.late_v = 5 * tile + scores + kBarrierBytes > kSharedLimit;
  l.k = tile;
  l.dout = 2 * tile;
  l.v = l.late_v ? 0 : 3 * tile;
  l.next_q = l.late_v ? 0 : 4 * tile;
  l.scores = (l.late_v ? 3 : 5) * tile;
  l.barriers = l.scores + scores;
  l.bytes = l.barriers + kBarrierBytes;
  return l;
}

// Products read 64 rows: those of the last tile of a layout are its last 64, and a warp whose rows
// another tile has as well leaves them to it.
constexpr int first_row(int tile, int rows) {
  return tile * kTile + kTile > rows ? rows - kTile : tile * kTile;
}

// A float bias whose gradient is not wanted, is one matrix for all batch items, or one for each.
enum class Bias : int { kNone, kConstant, kShared, kPerItem };

struct Plan {
  int width, depth;
  int64_t groups;  // of batch items: blocks / H where a block must keep its head
  int64_t blocks;
  int64_t matrices;  // of dS in scratch memory
};

// Blocks stay and go from item to item. To add up dbias, all items of a block have one head.
inline Plan plan(int64_t B, int H, int Nq, int Nk, int D, int multiprocessors, Bias bias) {
  const int width = width_for(std::max(Nq, Nk));
  Plan p{width, depth_for(width, D), 1, 0, 0};
  const int64_t resident = int64_t{multiprocessors} * resident_blocks(p.width);
  if (bias == Bias::kShared) {
    p.groups = std::min(B, std::max<int64_t>(resident / H, 1));
    p.blocks = p.matrices = p.groups * H;
  } else {
    p.blocks = std::min(B * H, resident);
    p.matrices = bias == Bias::kPerItem ? B * H : 0;
  }
  return p;
}

// One matrix of dS in scratch memory lies as the threads hold it.
constexpr int64_t matrix_floats(int width) { return int64_t{round_up(width, kTile)} * width; }

// Where the thread that has element (i, j) keeps it: four of its own to 16 bytes, neighbouring
// threads side by side.
constexpr int64_t place_of_score(int width, int i, int j) {
  const int lane = i % 8 * 4 + j % 8 / 2, thread = i % kTile / 16 * 32 + lane;
  const int64_t fragment = int64_t{i / kTile} * (width / 8) + j / 8;
  return (fragment * 128 + thread) * 4 + i % 16 / 8 * 2 + j % 2;
}

}  // namespace vitkernels::attention::sm90_backward
