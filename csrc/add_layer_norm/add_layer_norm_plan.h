// Launch settings of add_layer_norm_cuda.cu: plain host arithmetic, so that tests read them without
// a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::add_layer_norm {

constexpr int kThreads = 256;  // a block's most, but for the backward of three chunks

enum class Pass { kForward, kBackward, kBackwardGamma };  // the last also sums gamma's gradient

// A thread holds `chunks` x 8 elements of a row; 0: it walks the row and reads it in every pass.
struct Plan {
  bool fixed_types;    // an instance for one combination of dtypes
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
constexpr Residency residency(bool vectorized, bool block_per_row, int chunks, Pass pass) {
  if (!vectorized) return {kThreads, chunks <= 1 ? 2 : 1};
  const bool three_sums = pass == Pass::kBackwardGamma && !block_per_row;
  if (chunks <= 1) return {kThreads, three_sums ? 2 : 3};
  if (chunks == 2 && !three_sums) return {kThreads, 2};
  return {chunks + three_sums <= 3 ? 384 : kThreads, 1};
}

// aligned: every row of every operand begins on a 16-byte line. common_types: the dtypes are one of
// the combinations that have instances of their own (Types).
inline Plan plan(int64_t rows, int64_t C, bool aligned, bool common_types, int multiprocessors,
                 Pass pass) {
  Plan p{};
  const int64_t eights = (C + 7) / 8;
  p.vectorized = aligned && C % 8 == 0;
  p.fixed_types = p.vectorized && common_types && eights <= kThreads * 2;
  // Instances exist for 1, 2, 3 and 4 chunks to a warp and 1 and 2 to a block where types are
  // fixed; else for 4 and 4, or without 16-byte accesses (more registers go to addresses) 2 and 2.
  const int most = p.vectorized ? 4 : 2;
  int64_t rows_per_block = 1;
  if (eights <= 32 * most) {
    const int least = p.fixed_types ? 1 : most;
    p.lanes = 1;
    while (p.lanes < 32 && p.lanes * least < eights) p.lanes *= 2;
    p.chunks = p.fixed_types ? static_cast<int>((eights + p.lanes - 1) / p.lanes) : most;
    p.threads = kThreads;
    if (pass != Pass::kForward) p.threads = residency(p.vectorized, false, p.chunks, pass).threads;
    rows_per_block = p.threads / p.lanes;
  } else {
    p.block_per_row = true;
    p.chunks = p.fixed_types ? (eights <= kThreads ? 1 : 2) : eights <= kThreads * most ? most : 0;
    const int64_t threads = p.chunks == 0 ? kThreads : (eights + p.chunks - 1) / p.chunks;
    p.threads = static_cast<int>((threads + 31) / 32 * 32);
  }
  // The forward only bounds its grid; the backward keeps sums of all its rows: few blocks that
  // stay.
  int64_t most_blocks = 64;
  if (pass != Pass::kForward) {
    const Residency r = residency(p.vectorized, p.block_per_row, p.chunks, pass);
    most_blocks = r.blocks * (r.threads / p.threads);
    if (!p.block_per_row) p.shared_bytes = 3 * C * static_cast<int64_t>(sizeof(float));
  }
  const int64_t needed = (rows + rows_per_block - 1) / rows_per_block;
  p.blocks = std::min<int64_t>(needed, multiprocessors * most_blocks);
  return p;
}

}  // namespace vitkernels::add_layer_norm
