// Launch settings of window_attention_sm80_large*.cu: plain host arithmetic, so that tests read
// them without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::window_attention::sm80_large {

constexpr int kMostTokens = 256;

// ---- Chunks: columns of scores that a warp has in registers, by eight

// The forward has chunks of 48 or 64 keys; the last one is full where that can be.
constexpr int key_fragments(int N) { return N % 64 != 0 && N % 48 == 0 ? 6 : 8; }

// The backward has chunks of 48 queries up to 192 tokens, then 32.
constexpr int query_fragments(int N) { return N <= 192 ? 6 : 4; }

// Warps that a multiprocessor has registers for, in one block or more: a quarter of it has 128
// registers for each of four warps, 168 of three.
constexpr int kForwardWarps = 16, kForwardThreads = 32 * kForwardWarps;
constexpr int backward_warps(int fragments) { return fragments == 6 ? 12 : 16; }

// ---- Sizes

constexpr int row_tiles(int N) { return (N + 15) / 16; }
constexpr int padded_rows(int N) { return 16 * row_tiles(N); }

// Rows that tiles and arrays of the backward have room for. Beyond 192 tokens a multiprocessor has
// one block anyway, and constant addresses save registers.
constexpr int backward_rows(int N) { return N <= 192 ? padded_rows(N) : kMostTokens; }

constexpr int tile_bytes(int rows, int D) { return rows * 2 * D; }
constexpr int table_floats(int table_rows) { return (table_rows + 3) / 4 * 4; }

// From a query of 16-bit dS to the next: eight of them meet no bank twice.
constexpr int score_pitch(int rows) { return 2 * rows + 16; }

// Bytes of dynamic shared memory, in this order. Forward: q, k and v twice. Backward: q, k and dout
// twice, v, out, with cosines unit vectors of a chunk's queries, dS of the chunk. Then both: the
// bias, three ints and, with cosines, two inverse lengths of each token. Backward: two numbers, lse
// and four sums of dS of each, 32 sums for dlogit_scale. At last which windows the two stages are
// of.
constexpr int kVisitBytes = 64, kLogitSums = 32;
constexpr int64_t token_bytes(int rows, bool cosine) { return rows * (cosine ? 20 : 12); }
constexpr int64_t forward_shared(int N, int table_rows, int D, bool cosine) {
  const int rows = padded_rows(N);
  return 6 * tile_bytes(rows, D) + 4 * table_floats(table_rows) + token_bytes(rows, cosine) +
         kVisitBytes;
}
constexpr int64_t backward_shared(int N, int table_rows, int D, bool cosine) {
  const int rows = backward_rows(N), queries = 8 * query_fragments(N);
  return 8 * tile_bytes(rows, D) + (cosine ? queries * 2 * D : 0) + queries * score_pitch(rows) +
         4 * table_floats(table_rows) + token_bytes(rows, cosine) + rows * 28 + 4 * kLogitSums +
         kVisitBytes;
}

// ---- Devices

// Shared memory of a multiprocessor, of which each block takes 1 KB more than it asks for [CUDA C++
// Programming Guide: "Compute Capabilities"]. architecture: 10 * major + minor.
constexpr int64_t shared_memory(int architecture) {
  const int64_t kb = architecture == 80 || architecture == 87   ? 164
                     : architecture >= 90 && architecture < 120 ? 228
                                                                : 100;
  return kb << 10;
}

constexpr bool fits(int64_t shared_bytes, int architecture) {
  return shared_bytes + 1024 <= shared_memory(architecture);
}

struct Plan {
  int64_t groups;  // of windows: each block has one head and windows of one group
  int64_t blocks;
  int warps;      // of a block
  int fragments;  // of a chunk of columns
  int64_t shared_bytes;
};

// The backward has a warp for every 16 keys. The forward has one for every 16 queries or for twice
// as many, so that two blocks, which wait at different times, share a multiprocessor. The grid
// fills the device once and stays; groups of (almost) as many windows each.
inline Plan plan(int64_t windows, int N, int table_rows, int heads, int D, int multiprocessors,
                 int architecture, bool cosine, bool backward) {
  Plan p{};
  const int tiles = row_tiles(N);
  p.shared_bytes = backward ? backward_shared(N, table_rows, D, cosine)
                            : forward_shared(N, table_rows, D, cosine);
  p.fragments = backward ? query_fragments(N) : key_fragments(N);
  const int room = backward ? backward_warps(p.fragments) : kForwardWarps;
  const int64_t fitting = shared_memory(architecture) / (p.shared_bytes + 1024);
  const int passes = !backward && fitting > 1 && 2 * tiles > room ? 2 : 1;
  p.warps = (tiles + passes - 1) / passes;
  const int64_t resident =
      std::max<int64_t>(1, std::min<int64_t>(fitting, room / p.warps)) * multiprocessors;
  const int64_t most = std::min(windows, std::max<int64_t>(resident / heads, 1));
  const int64_t each = (windows + most - 1) / most;
  p.groups = (windows + each - 1) / each;
  p.blocks = p.groups * heads;
  return p;
}

}  // namespace vitkernels::window_attention::sm80_large
