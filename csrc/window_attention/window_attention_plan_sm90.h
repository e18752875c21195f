// Launch settings of window_attention_sm90*.cu and the order of a window's tokens there: plain host
// arithmetic, so that tests read it without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::window_attention::sm90 {

constexpr int kRows = 64;  // rows and columns of the padded scores

// Warpgroups of a block that compute, each with windows of its own; one more moves the windows.
constexpr int kForwardGroups = 3, kBackwardGroups = 2;
constexpr int kForwardThreads = (kForwardGroups + 1) * 128;
constexpr int kBackwardThreads = (kBackwardGroups + 1) * 128;

// Registers of a thread that computes, of one that moves: together those of a multiprocessor.
constexpr int kForwardRegisters[2] = {152, 56}, kBackwardRegisters[2] = {224, 56};

// Windows in the shared memory of a warpgroup: one is computed, the others are under way.
constexpr int kForwardStages = 4, kBackwardStages = 4;

// ---- The order of tokens

// Tokens that lie together in the unshifted map, row by row from (y, x) of the window on.
struct Part {
  int row;  // of the tile, where the first of them is: a multiple of 8, for the swizzle
  int y, x, height, width;
};

// A shift cuts each window, whether its map wraps there or not, into the same two or four parts:
// each is a box for TMA. Rows of a tile that no part covers stay zero.
struct Order {
  Part parts[4];
  int count;
  int rows;               // through the last token
  uint32_t below, right;  // bit g: rows 8 g to 8 g + 7 are beyond the seam, if the window has it
};

inline Order order_of(int Wh, int Ww, int shift_h, int shift_w) {
  Order order = {};
  int row = 0;
  for (int below = 0; below < (shift_h > 0 ? 2 : 1); ++below)
    for (int right = 0; right < (shift_w > 0 ? 2 : 1); ++right) {
      const Part part = {row, below ? Wh - shift_h : 0, right ? Ww - shift_w : 0,
                         below ? shift_h : Wh - shift_h, right ? shift_w : Ww - shift_w};
      order.parts[order.count++] = part;
      order.rows = row + part.height * part.width;
      for (; row < order.rows; row += 8) {
        if (row >= kRows) continue;  // refused
        order.below |= static_cast<uint32_t>(below) << row / 8;
        order.right |= static_cast<uint32_t>(right) << row / 8;
      }
    }
  return order;
}

// Key columns that are computed.
inline int keys_of(const Order& order) { return order.rows <= 56 ? 56 : 64; }

// ---- Launches

// Bytes of dynamic shared memory. Of each warpgroup, forward: q, k and v of each stage; backward:
// q, k, v and dout of each stage, P and dS in 16 bits. Then of each warpgroup the inverse lengths
// of q and k, twice, and two barriers a stage; of the block the token of a row, backward also the
// row of a token.
constexpr int tile_bytes(int D) { return kRows * 2 * D; }
constexpr int kScoreBytes = kRows * kRows * 2, kRowBytes = kRows * 4;
constexpr int64_t forward_shared(int D) {
  return kForwardGroups * (kForwardStages * (3 * tile_bytes(D) + 16) + 4 * kRowBytes) + kRowBytes;
}
constexpr int64_t backward_shared(int D) {
  return kBackwardGroups *
             (kBackwardStages * (4 * tile_bytes(D) + 16) + 2 * kScoreBytes + 4 * kRowBytes) +
         2 * kRowBytes;
}

struct Plan {
  int64_t groups;  // of windows: each warpgroup has one head and windows of one group
  int64_t blocks;
  int busy;  // warpgroups of a block that have windows
  int64_t shared_bytes;
};

// Enough warpgroups to fill the device once, which then stay; groups of (almost) as many windows
// each. Neighbouring warpgroups have the heads of the same windows, so that their pieces of a
// pixel, 2 D bytes, are fetched together.
inline Plan plan(int64_t windows, int heads, int D, int multiprocessors, bool backward) {
  const int in_block = backward ? kBackwardGroups : kForwardGroups;
  const int64_t resident = static_cast<int64_t>(multiprocessors) * in_block;
  const int64_t most = std::min(windows, std::max<int64_t>(resident / heads, 1));
  const int64_t each = (windows + most - 1) / most, groups = (windows + each - 1) / each;
  const int64_t workers = groups * heads;
  const int64_t busy =
      std::min<int64_t>((workers + multiprocessors - 1) / multiprocessors, in_block);
  return {groups, (workers + busy - 1) / busy, static_cast<int>(busy),
          backward ? backward_shared(D) : forward_shared(D)};
}

}  // namespace vitkernels::window_attention::sm90
