// Launch settings of window_attention_simt.cu: plain host arithmetic, so that tests read them
// without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::window_attention {

constexpr int kSimtWarps = 8, kSimtThreads = 32 * kSimtWarps;
constexpr int kTile = 32;  // tokens of a window in shared memory at a time, one for each lane
constexpr int kForwardRows = 16;  // rows of scores in shared memory, two for each warp
constexpr int kBackwardRows = 8;

struct SimtPlan {
  int64_t blocks;
  int64_t shared_bytes;  // dynamic
  int chunks;            // backward: blocks of a head, each with a partial sum of its own
};

// Floats of a row of D in shared memory: odd, so that the lanes of a warp, a row each, meet no bank
// twice.
constexpr int simt_pitch(int D) { return D % 2 == 0 ? D + 1 : D; }
constexpr int padded_tokens(int N) { return (N + kTile - 1) / kTile * kTile; }

inline SimtPlan simt_forward_plan(int64_t windows, int heads, int N, int D) {
  SimtPlan p{};
  const int64_t groups = (N + kForwardRows - 1) / kForwardRows;
  p.blocks = std::min<int64_t>(windows * heads * groups, 1 << 30);
  p.shared_bytes =
      4 * ((kTile + kForwardRows) * simt_pitch(D) + kForwardRows * padded_tokens(N) + 2 * N);
  return p;
}

inline SimtPlan simt_backward_plan(int64_t windows, int heads, int N, int D, int table_rows,
                                   int multiprocessors) {
  SimtPlan p{};
  const int64_t wanted = std::max<int64_t>(1, (2 * multiprocessors + heads - 1) / heads);
  p.chunks = static_cast<int>(std::min<int64_t>(windows, wanted));
  p.blocks = static_cast<int64_t>(p.chunks) * heads;
  // Two tiles and two operands of rows, p and dS, four numbers of each token, the sums of the
  // factor and of the table in two numbers each.
  p.shared_bytes =
      4 * (2 * (kTile + kBackwardRows) * simt_pitch(D) + 2 * kBackwardRows * padded_tokens(N) +
           4 * N + 2 * (kSimtWarps + table_rows));
  return p;
}

}  // namespace vitkernels::window_attention
