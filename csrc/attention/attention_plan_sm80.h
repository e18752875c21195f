// Launch settings of attention_sm80*.cu: plain host arithmetic, so that tests read them without a
// GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::attention::sm80 {

constexpr int kTile = 16;      // rows of a warp's tile, and columns of a step of its scores
constexpr int kMaxRows = 272;  // queries, keys
constexpr int kMaxHeadDim = 128;

constexpr int tiles(int n) { return (n + kTile - 1) / kTile; }
constexpr int padded(int n) { return tiles(n) * kTile; }

// Columns of scores that the forward takes at once while more than all but a tile of them are left;
// then one tile at a time. Beside a bias registers do for fewer.
constexpr int forward_columns(bool masks) { return masks ? 16 : 48; }

// Threads of a block at most, and blocks on a multiprocessor, which bound the registers.
constexpr int kForwardThreads = 256;
template <int HEAD_DIM>
constexpr int kForwardBlocks = HEAD_DIM <= 64 ? 2 : 1;
constexpr int backward_threads(int head_dim) { return head_dim <= 64 ? 192 : 256; }
template <int HEAD_DIM>
constexpr int kBackwardThreads = backward_threads(HEAD_DIM);
template <int HEAD_DIM>
constexpr int kBackwardBlocks = HEAD_DIM <= 64 ? 2 : 1;

// Warps for which a multiprocessor has registers: 16 of 128, 12 of 168, 8 of 255.
constexpr int forward_warps(int head_dim) { return head_dim <= 64 ? 16 : head_dim <= 96 ? 12 : 8; }
constexpr int backward_warps(int head_dim) { return head_dim <= 64 ? 12 : 8; }

// Whether the backward keeps the rows' dout, or v, in registers as well, or loads them for each
// step.
constexpr bool keeps_rows(int head_dim, bool masks) { return head_dim <= 112 && !masks; }

// Bytes of shared memory of a multiprocessor and of what a block may ask for; a block costs
// kReserve more than it asks for.
constexpr int64_t kReserve = 1024;
constexpr int64_t shared_of(int architecture) {
  return (architecture == 80 || architecture == 87 ? 164
          : architecture / 10 == 8                 ? 100
                                                   : 228)
         << 10;
}
constexpr int64_t kBlockShared = (163 << 10);  // of sm_80

struct Plan {
  int head_dim;  // in shared memory: the next multiple of 16
  int warps;     // each has one tile of 16 rows after another
  int slots;     // tiles of each operand with rows of the warp's own that shared memory holds:
                 // as many as there are, or one a warp
  int64_t shared_bytes;
  int64_t blocks_resident;  // that a multiprocessor has room for
};

// Blocks on a multiprocessor, of which the second computes while the first loads, by rounds of
// tiles a warp: as many warps at work as can be. At a tie the fewest rounds, then every tile loaded
// at once. bytes(slots): shared memory. No warps: it does not fit.
template <class Bytes>
Plan best_plan(int head_dim, int row_tiles, int max_warps, int register_warps, int architecture,
               const Bytes& bytes) {
  Plan best = {};
  int best_rounds = 1;
  const int64_t shared = shared_of(architecture);
  const int64_t most = std::min(kBlockShared, shared - kReserve);
  for (int rounds = (row_tiles + max_warps - 1) / max_warps; rounds <= row_tiles; ++rounds) {
    const int warps = (row_tiles + rounds - 1) / rounds;
    for (const int slots : {row_tiles, warps}) {
      const int64_t needed = bytes(slots);
      if (needed > most) continue;
      const int64_t resident =
          std::min<int64_t>(shared / (needed + kReserve), register_warps / warps);
      if (std::min<int64_t>(resident, 2) * best_rounds >
          std::min<int64_t>(best.blocks_resident, 2) * rounds) {
        best = {head_dim, warps, slots, needed, resident};
        best_rounds = rounds;
      }
    }
  }
  return best;
}

// Shared memory: k and v of a head, q in slots.
inline Plan forward_plan(int Nq, int Nk, int D, int architecture) {
  const int head_dim = padded(D);
  const int64_t row = 2 * head_dim;
  return best_plan(head_dim, tiles(Nq), kForwardThreads / 32, forward_warps(head_dim), architecture,
                   [&](int slots) { return (2 * padded(Nk) + slots * kTile) * row; });
}

// Shared memory: first k and v, with q and dout in slots, for dq; then q and dout, with k and v in
// slots, for dk and dv. With slots for every tile these are the same four. Then lse and delta.
inline Plan backward_plan(int Nq, int Nk, int D, int architecture) {
  const int head_dim = padded(D), most = std::max(tiles(Nq), tiles(Nk));
  const int64_t row = 2 * head_dim;
  return best_plan(head_dim, most, backward_threads(head_dim) / 32, backward_warps(head_dim),
                   architecture, [&](int slots) {
                     const int64_t rows =
                         slots == most ? padded(Nq) + padded(Nk) : (most + slots) * kTile;
                     return 2 * rows * row + 8 * padded(Nq);
                   });
}

}  // namespace vitkernels::attention::sm80
