// Launch settings of patch_merge_cuda.cu: plain host arithmetic, so that tests read them without a
// GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::patch_merge {

constexpr int kThreads = 256;  // a block's most, but for the backward of three chunks

// A thread holds `chunks` x 8 elements of a row of 4 C; 0: it walks the row and reads it in every
// pass.
struct Plan {
  bool vectorized;     // 16-byte accesses
  bool block_per_row;  // else `lanes` lanes per row, 32 / lanes rows per warp
  int chunks, lanes, threads;
  int64_t blocks;
  int64_t shared_bytes;  // dynamic
};

// What the backward kernels are compiled for, and what their persistent grid is: as many threads as
// have registers for their sums (resources.json), `threads` a block, `blocks` a multiprocessor.
struct Residency {
  int threads, blocks;
};
constexpr Residency residency(bool block_per_row, int chunks) {
  if (!block_per_row) return {chunks == 3 ? 384 : kThreads, 1};
  return {kThreads, chunks == 1 ? 3 : 2};
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
    p.threads = backward ? residency(false, p.chunks).threads : kThreads;
    rows_per_block = p.threads / p.lanes;
    if (backward) p.shared_bytes = 2 * 4 * C * static_cast<int64_t>(sizeof(float));
  } else {
    p.block_per_row = true;
    p.chunks = !held || eights > 2 * kThreads ? 0 : eights <= kThreads ? 1 : 2;
    const int64_t threads =
        p.chunks == 0 ? std::min<int64_t>(eights, kThreads) : (eights + p.chunks - 1) / p.chunks;
    p.threads = static_cast<int>((threads + 31) / 32 * 32);
  }
  // The forward only bounds its grid; the backward keeps sums of all its rows: few blocks that
  // stay.
  int64_t most_blocks = 64;
  if (backward) {
    const Residency r = residency(p.block_per_row, p.chunks);
    most_blocks = r.blocks * (r.threads / p.threads);
  }
  const int64_t needed = (rows + rows_per_block - 1) / rows_per_block;
  p.blocks = std::min<int64_t>(needed, multiprocessors * most_blocks);
  return p;
}

}  // namespace vitkernels::patch_merge
