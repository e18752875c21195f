// Launch settings of distillation_loss_cuda.cu: plain host arithmetic, so that tests read them
// without a GPU.
#pragma once

#include <cstdint>

namespace vitkernels::distillation_loss {

constexpr int kWarps = 4;           // rows a block where a warp has one
constexpr int kBlockThreads = 512;  // a block's most where it has a row
constexpr int kTotalThreads = 1024;
constexpr int kScaleThreads = 256;

// A thread holds `chunks` x 8 classes of each head in registers; 0: it walks the row, and reads it
// again, from L2, for the gradient.
struct Plan {
  bool fixed_types;    // an instance for one dtype
  bool vectorized;     // 16-byte accesses
  bool block_per_row;  // else a warp
  int chunks, threads;
  int64_t blocks;
};

// aligned: all tensors have elements of one size and rows that begin on a 16-byte line or, all of
// them, equally far behind one.
inline Plan plan(int64_t rows, int64_t K, bool aligned, bool one_type) {
  Plan p{};
  p.vectorized = aligned;
  p.fixed_types = aligned && one_type;
  // A row that begins behind a line has its first classes in a chunk that begins before it.
  const int64_t eights = (K + (aligned && K % 8 != 0 ? 7 : 0) + 7) / 8;
  // Instances of a warp: 1, 2 and 4 chunks; of a block: 1 and 2; where the dtype is not fixed, 4
  // and 2.
  if (eights <= 32 * 4) {
    p.chunks = !p.fixed_types ? 4 : eights <= 32 ? 1 : eights <= 64 ? 2 : 4;
    p.threads = 32 * kWarps;
    p.blocks = (rows + kWarps - 1) / kWarps;
    return p;
  }
  p.block_per_row = true;
  p.chunks = p.fixed_types && eights <= kBlockThreads ? 1 : eights <= 2 * kBlockThreads ? 2 : 0;
  const int64_t threads = p.chunks == 0 ? kBlockThreads : (eights + p.chunks - 1) / p.chunks;
  p.threads = static_cast<int>((threads + 31) / 32 * 32);
  p.blocks = rows;
  return p;
}

}  // namespace vitkernels::distillation_loss
