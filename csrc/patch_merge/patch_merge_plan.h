// Launch settings of patch_merge_cuda.cu: plain host arithmetic, so that tests read them without a
// GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::patch_merge {

constexpr int kThreads = 256;  // a block's most

// A thread holds `chunks` x 8 elements of a row of 4 C; 0: it walks the row and reads it in every
// pass.
struct Plan {
  bool vectorized;     // 16-byte accesses
  bool block_per_row;  // else `lanes` lanes per row, 32 / lanes rows per warp
  int chunks, lanes, threads;
  int64_t blocks;
  int64_t shared_bytes;  // dynamic
};

// Blocks of kThreads on a multiprocessor that the kernels are compiled for, and that their
// persistent grids have: as many as have registers (resources.json), in the backward for their sums
// too.
constexpr int forward_blocks(bool block_per_row, int chunks) {
  return !block_per_row && chunks == 4 ? 2 : 3;
}
constexpr int backward_blocks(bool block_per_row, int chunks) {
  return !block_per_row ? 1 : chunks == 1 ? 3 : 2;
}

// The launcher sees to it that pixels begin on 16-byte lines where C % 8 == 0. fixed_widths: x and
// y are of widths that have instances of their own (Widths).
inline Plan plan(int64_t rows, int64_t C, bool fixed_widths, int multiprocessors, bool backward) {
  Plan p{};
  p.vectorized = C % 8 == 0;
  const int64_t eights = (4 * C + 7) / 8;
  const bool held = p.vectorized && fixed_widths;
  int64_t rows_per_block = 1;
  if (held && eights <= 4 * 32) {
    p.lanes = 1;
    while (p.lanes * 4 < eights) p.lanes *= 2;
    // 16 lanes of 3 chunks are C = 96 without an idle lane, 32 of 3 or 4 are C = 192 or 256.
    p.chunks = p.lanes * 3 >= eights ? 3 : 4;
    p.threads = kThreads;
    rows_per_block = p.threads / p.lanes;
  } else {
    p.block_per_row = true;
    p.chunks = !held || eights > 2 * kThreads ? 0 : eights <= kThreads ? 1 : 2;
    const int64_t threads =
        p.chunks == 0 ? std::min<int64_t>(eights, kThreads) : (eights + p.chunks - 1) / p.chunks;
    p.threads = static_cast<int>((threads + 31) / 32 * 32);
  }
  // Forward weight and bias; backward the weight, and the two sums where lanes have a row.
  const int64_t floats = p.chunks == 0 ? 0 : !backward ? 2 : p.block_per_row ? 1 : 3;
  p.shared_bytes = floats * 4 * C * static_cast<int64_t>(sizeof(float));
  const int most = backward ? backward_blocks(p.block_per_row, p.chunks)
                            : forward_blocks(p.block_per_row, p.chunks);
  const int64_t needed = (rows + rows_per_block - 1) / rows_per_block;
  p.blocks = std::min<int64_t>(needed, multiprocessors * (most * kThreads / p.threads));
  return p;
}

}  // namespace vitkernels::patch_merge
