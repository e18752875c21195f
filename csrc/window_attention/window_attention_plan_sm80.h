// Launch settings of window_attention_sm80*.cu: plain host arithmetic, so that tests read them
// without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::window_attention::sm80 {

constexpr int kThreads = 128;  // four warps of 16 query rows each
constexpr int kTile = 64;      // rows and columns of the padded scores

// Blocks on a multiprocessor, which bound the registers; sm_80 has shared memory for three of the
// forward.
constexpr int forward_blocks(bool cosine) { return cosine ? 3 : 4; }
constexpr int kBackwardBlocks = 2;

// Bytes of dynamic shared memory, in this order. Forward: q, k and v twice, the bias. Backward: q,
// k, v, dout and lse twice, the bias, P and dS in 16 bits. Both: the tokens' places, the inverse
// lengths of q and k.
constexpr int64_t tile_bytes(int D) { return kTile * 2 * D; }
constexpr int64_t kScoreBytes = kTile * kTile * 4, kHalfScoreBytes = kTile * kTile * 2;
constexpr int64_t kRowBytes = kTile * 4;
constexpr int64_t forward_shared(int D) { return 6 * tile_bytes(D) + kScoreBytes + 3 * kRowBytes; }
constexpr int64_t backward_shared(int D) {
  return 8 * tile_bytes(D) + kScoreBytes + 2 * kHalfScoreBytes + 5 * kRowBytes;
}

struct Plan {
  int64_t groups;  // of windows: each block has one head and windows of one group
  int64_t blocks;
  int64_t shared_bytes;
};

// Enough blocks to fill the device once, which then stay; groups of (almost) as many windows each.
inline Plan plan(int64_t windows, int heads, int D, int multiprocessors, bool cosine,
                 bool backward) {
  const int64_t resident = multiprocessors * (backward ? kBackwardBlocks : forward_blocks(cosine));
  const int64_t most = std::min(windows, std::max<int64_t>(resident / heads, 1));
  const int64_t each = (windows + most - 1) / most, groups = (windows + each - 1) / each;
  return {groups, groups * heads, backward ? backward_shared(D) : forward_shared(D)};
}

}  // namespace vitkernels::window_attention::sm80
