// Launch settings of attention_sm80_long*.cu: plain host arithmetic, so that tests read them
// without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::attention::sm80_long {

// Every kernel has blocks of four warps, two of which a multiprocessor has room for: 255 registers
// a thread, and below 81 KB of shared memory, which also lets one block run where there are 100 KB.
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kResident = 2;

// Head dim of the kernel that serves D: rows are padded with zeros to it in shared memory.
constexpr int instance_dim(int D) { return D <= 64 ? 64 : D <= 80 ? 80 : D <= 96 ? 96 : 128; }

constexpr int64_t blocks_of(int64_t n, int size) { return (n + size - 1) / size; }

// ---- Forward: a warp has two tiles of 16 queries, so that what it reads of k and v serves twice

constexpr int kForwardRows = 128;
// Keys of a tile; beside bias, masks or dropout, and above head dim 96, registers do for fewer.
constexpr int forward_columns(int head_dim, bool masks) {
  return masks ? 32 : head_dim <= 96 ? 64 : 48;
}
// Tiles of k and v in shared memory, in turn: one at work, two under way.
constexpr int kRing = 3;
// Whether q stays in registers, or is read from shared memory for each tile.
constexpr bool keeps_queries(int head_dim, bool masks) { return head_dim <= (masks ? 64 : 80); }

constexpr int64_t forward_shared(int head_dim, bool masks) {
  return static_cast<int64_t>(kForwardRows + kRing * forward_columns(head_dim, masks)) * 2 *
         head_dim;
}

// ---- Backward: rows that a block owns, columns that all go through it in tiles

// Tiles of 16 rows of a warp. By key there are two sums, by query one.
constexpr int row_tiles(int head_dim, bool by_key) {
  return head_dim <= (by_key ? 64 : 80) ? 2 : 1;
}
constexpr int backward_rows(int head_dim, bool by_key) {
  return kWarps * 16 * row_tiles(head_dim, by_key);
}
constexpr int backward_columns(int head_dim) { return head_dim <= 64 ? 64 : 32; }

// Whether the rows' first operand (q by query, k by key) stays in registers; the second (dout, v).
constexpr bool keeps_first(int head_dim, bool by_key, bool masks) {
  return !by_key || !masks || head_dim > 64;
}
constexpr bool keeps_second(int head_dim, bool by_key, bool masks) {
  return by_key ? head_dim > 64 && head_dim <= 96 : !masks || row_tiles(head_dim, false) == 1;
}

// Two operands of the rows; two stages of two operands of the columns and, by key, of their sums.
constexpr int64_t backward_shared(int head_dim, bool by_key) {
  const int64_t rows = 2 * backward_rows(head_dim, by_key) + 4 * backward_columns(head_dim);
  return rows * 2 * head_dim + (by_key ? 2 * 8 * backward_columns(head_dim) : 0);
}

// Row sums of a head have room for whole tiles of columns.
constexpr int64_t padded_sums(int Nq) { return blocks_of(Nq, 64) * 64; }
constexpr int kSumRows = kThreads / 4;  // of a block: four threads a row

// ---- Gradient of the bias: a block has 64 x 64 elements and adds dS over what they are shared by

constexpr int kBiasTile = 64;
// Blocks in all, about, where there is that much to add: twice what 108 to 132 multiprocessors hold
// at once. It bounds the partial sums to kBiasBlocks * 16 KB.
constexpr int64_t kBiasBlocks = 512;

constexpr int64_t bias_shared(int head_dim) {
  return 4 * kBiasTile * 2 * head_dim + kWarps * kBiasTile * 4;
}

struct BiasPlan {
  int64_t row_blocks, column_blocks;
  int64_t tiles;    // of dbias
  int64_t members;  // what a tile adds: (batch item, head, 64 queries) of one element each
  int64_t share;    // members that one block adds
  int64_t splits;   // blocks of a tile; more than one leave partial sums
  int64_t partial_floats;
};

// batch, heads, rows: sizes of dbias, 1 where it is broadcast. Its columns are Nk.
constexpr BiasPlan bias_plan(int B, int H, int Nq, int Nk, int batch, int heads, int rows) {
  BiasPlan p = {};
  p.row_blocks = blocks_of(rows, kBiasTile);
  p.column_blocks = blocks_of(Nk, kBiasTile);
  const int64_t slices = static_cast<int64_t>(batch) * heads;
  p.tiles = slices * p.row_blocks * p.column_blocks;
  p.members = static_cast<int64_t>(batch == 1 ? B : 1) * (heads == 1 ? H : 1) *
              (rows == 1 ? blocks_of(Nq, kBiasTile) : 1);
  const int64_t wanted = std::min(p.members, std::max<int64_t>(1, kBiasBlocks / p.tiles));
  p.share = (p.members + wanted - 1) / wanted;
  p.splits = (p.members + p.share - 1) / p.share;
  p.partial_floats = p.splits == 1 ? 0 : p.splits * slices * rows * Nk;
  return p;
}

}  // namespace vitkernels::attention::sm80_long
