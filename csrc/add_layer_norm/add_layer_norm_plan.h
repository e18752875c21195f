// Launch settings of add_layer_norm_cuda.cu: plain host arithmetic, so that tests read them without
// a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::add_layer_norm {

constexpr int kThreads = 256;  // a block's most, but for the backward of three chunks
constexpr int kForwardParameters = 3, kBackwardParameters = 2;  // held in shared memory
constexpr int kMostSlots = 3;

enum class Pass { kForward, kBackward, kBackwardGamma };  // the last also sums gamma's gradient

// The device, and the 16-byte pieces of eight elements of x, of the residual stream, and of y and
// its gradient (2 in fp32, else 1).
struct Setting {
  int multiprocessors, architecture;
  int branch_pieces, stream_pieces, y_pieces;
};

// A thread holds `chunks` x 8 elements of a row; 0: it walks the row and reads it in every pass.
struct Plan {
  bool fixed_widths;   // an instance for one combination of widths, which reads rows by a ring
  bool vectorized;     // 16-byte accesses
  bool block_per_row;  // else `lanes` lanes per row, 32 / lanes rows per warp
  int chunks, lanes, threads;
  int slots;  // of the ring: rows of a thread in shared memory, the one it works on included
  int64_t blocks;
  int64_t shared_bytes;  // dynamic

  int64_t rows_per_block() const { return block_per_row ? 1 : threads / lanes; }
};

// What the kernels with persistent grids are compiled for: as many threads as have registers for
// their rows and sums (resources.json), `threads` a block, `blocks` a multiprocessor.
struct Residency {
  int threads, blocks;
};
constexpr Residency residency(bool vectorized, bool block_per_row, int chunks, Pass pass,
                              int stream_pieces = 1) {
  if (pass == Pass::kForward)
    return {kThreads, chunks <= 1 ? 4 : chunks + stream_pieces <= 4 ? 3 : 2};
  if (!vectorized) return {kThreads, chunks <= 1 ? 2 : 1};
  const bool three_sums = pass == Pass::kBackwardGamma && !block_per_row;
  if (chunks <= 1) return {kThreads, three_sums ? 2 : 3};
  if (chunks == 2 && !three_sums) return {kThreads, 2};
  return {chunks + three_sums <= 3 ? 384 : kThreads, 1};
}

// Bytes of shared memory of a multiprocessor, of which each block costs kBlockBytes more than it
// uses: the driver's KB and the kernel's static arrays [CUDA C++ Programming Guide, "Compute
// Capabilities", technical specifications]. 8.6 and 8.9 have 100 KB.
constexpr int64_t kBlockBytes = 1024 + 512;
constexpr int64_t shared_of(int architecture) {
  return (architecture >= 90 ? 228 : architecture == 80 || architecture == 87 ? 164 : 100) << 10;
}

// Gives the ring at least two slots, the row worked on and the next, if need be with fewer blocks
// on a multiprocessor or, where blocks have several rows, fewer warps in a block. False where not
// even one slot fits: long rows on small multiprocessors.
inline bool plan_ring(Plan& p, Pass pass, const Setting& s) {
  const bool forward = pass == Pass::kForward;
  const int lanes = p.block_per_row ? p.threads : p.lanes;
  const int64_t parameters = (forward ? kForwardParameters : kBackwardParameters) *
                             static_cast<int64_t>(sizeof(float)) * lanes * 8 * p.chunks;
  const int pieces =
      p.chunks * (forward ? s.branch_pieces + s.stream_pieces  // x, residual; z, dz, dy (and x)
                          : 2 * s.stream_pieces + s.y_pieces +
                                (pass == Pass::kBackwardGamma ? s.branch_pieces : 0));
  const int64_t row = 16 * pieces + (forward ? 4 : 12);  // of a thread: row_ring_bytes
  const int64_t all = shared_of(s.architecture);
  const Residency r = residency(true, p.block_per_row, p.chunks, pass, s.stream_pieces);
  const int most_blocks = r.blocks * (r.threads / p.threads);
  const auto slots_of = [&](int blocks) {
    return (all / blocks - kBlockBytes - parameters) / (row * p.threads);
  };
  while (!p.block_per_row && p.threads > 2 * 32 && slots_of(1) < 2) p.threads -= 32;
  int blocks = most_blocks;
  while (blocks > 1 && slots_of(blocks) < 2) --blocks;
  if (slots_of(blocks) < 1) return false;
  p.slots = static_cast<int>(std::clamp<int64_t>(slots_of(blocks), 1, kMostSlots));
  p.blocks = blocks;
  p.shared_bytes = parameters + p.slots * row * p.threads;
  return true;
}

// aligned: every row of every operand begins on a 16-byte line. common_widths: the dtypes are one
// of the combinations that have instances of their own (Widths).
inline Plan plan(int64_t rows, int64_t C, bool aligned, bool common_widths, Pass pass,
                 const Setting& s) {
  Plan p{};
  const int64_t eights = (C + 7) / 8;
  p.vectorized = aligned && C % 8 == 0;
  p.fixed_widths =
      p.vectorized && common_widths && eights <= kThreads * 2 && rows <= INT32_MAX;  // RowIndex
  // Instances exist for 1, 2, 3 and 4 chunks to a warp and 1 and 2 to a block where widths are
  // fixed; else for 4 and 4, or without 16-byte accesses (more registers go to addresses) 2 and 2.
  const int most = p.vectorized ? 4 : 2;
  if (eights <= 32 * most) {
    const int least = p.fixed_widths ? 1 : most;
    p.lanes = 1;
    while (p.lanes < 32 && p.lanes * least < eights) p.lanes *= 2;
    p.chunks = p.fixed_widths ? static_cast<int>((eights + p.lanes - 1) / p.lanes) : most;
    p.threads = kThreads;
    if (pass != Pass::kForward) p.threads = residency(p.vectorized, false, p.chunks, pass).threads;
  } else {
    p.block_per_row = true;
    p.chunks = p.fixed_widths ? (eights <= kThreads ? 1 : 2) : eights <= kThreads * most ? most : 0;
    const int64_t threads = p.chunks == 0 ? kThreads : (eights + p.chunks - 1) / p.chunks;
    p.threads = static_cast<int>((threads + 31) / 32 * 32);
  }
  // Blocks of a multiprocessor. The forward without a ring only bounds its grid; the backward keeps
  // sums of all its rows: few blocks that stay.
  if (p.fixed_widths) {
    if (!plan_ring(p, pass, s)) return plan(rows, C, aligned, false, pass, s);
  } else if (pass == Pass::kForward) {
    p.blocks = 64;
  } else {
    const Residency r = residency(p.vectorized, p.block_per_row, p.chunks, pass);
    p.blocks = r.blocks * (r.threads / p.threads);
    if (!p.block_per_row) p.shared_bytes = 3 * C * static_cast<int64_t>(sizeof(float));
  }
  const int64_t needed = (rows + p.rows_per_block() - 1) / p.rows_per_block();
  p.blocks = std::min<int64_t>(needed, s.multiprocessors * p.blocks);
  return p;
}

}  // namespace vitkernels::add_layer_norm
