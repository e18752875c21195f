// What the sm_80 kernels of patch_embed share: operands in shared memory, 128 x 128 of a result by
// eight warps, what is refused.
#pragma once

#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "patch_embed/patch_embed_gather.cuh"

namespace vitkernels::patch_embed::sm80 {

// A warp has 64 x 32 of the 128 x 128: warps 2 x 4.
struct Sums {
  FragmentC c[4][4];
};
VK_DEVICE int warp_row(int warp) { return warp / 4 * 64; }
VK_DEVICE int warp_column(int warp) { return warp % 4 * 32; }

VK_DEVICE char* operand_a(char* stages, int i) { return stages + i % 2 * 2 * kTileBytes; }
VK_DEVICE char* operand_b(char* stages, int i) { return operand_a(stages, i) + kTileBytes; }

// An operand with Major::kK is 128 lines of 64 k, with kMN 64 lines (the k) of 128.
template <Major MAJOR>
VK_DEVICE char* chunk_at(char* tile, int line, int chunk) {
  return chunk_of(tile, MAJOR == Major::kK ? kTile : kDepth, line, chunk);
}

// sums += A B over `steps` of 16 k.
template <DType TYPE, Major A_MAJOR, Major B_MAJOR>
VK_DEVICE void multiply(Sums& sums, char* a, char* b, int warp, int lane, int steps) {
  const int row = warp_row(warp), column = warp_column(warp);
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    if (step >= steps) break;
    FragmentB fb[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // matrices: 8 columns (k low, high), then 8 more
      uint32_t r[4];
      const int from = column + 16 * j;
      if constexpr (B_MAJOR == Major::kK)
        load_matrices(
            r, chunk_at<B_MAJOR>(b, from + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      else
        load_matrices_transposed(
            r, chunk_at<B_MAJOR>(b, 16 * step + lane / 8 % 2 * 8 + lane % 8, from / 8 + lane / 16));
      fb[2 * j] = {{r[0], r[1]}};
      fb[2 * j + 1] = {{r[2], r[3]}};
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      FragmentA fa;  // matrices: rows low, high with k low, then with k high
      const int from = row + 16 * i;
      if constexpr (A_MAJOR == Major::kK)
        load_matrices(fa.r, chunk_at<A_MAJOR>(a, from + lane % 16, 2 * step + lane / 16));
      else
        load_matrices_transposed(fa.r, chunk_at<A_MAJOR>(a, 16 * step + lane / 16 * 8 + lane % 8,
                                                         from / 8 + lane / 8 % 2));
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_m16n8k16<TYPE>(sums.c[i][j], fa, fb[j]);
    }
  }
}

// Begins to copy 128 x 64 of rows of a (rows, columns) operand in memory with eight columns to a
// chunk: LINES lines from `line` on and 8 or 16 chunks from `column` on; zeros outside. `row_place`
// gives where a line begins, in elements.
template <Major MAJOR, class RowPlace>
VK_DEVICE void begin_copy(char* tile, const void* data, int line, int lines, int column,
                          int columns, RowPlace row_place) {
  constexpr int kChunks = MAJOR == Major::kK ? kDepth / 8 : kTile / 8;
  constexpr int kEach = kTile * kDepth / 8 / kThreads;  // 4
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % kChunks;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = thread / kChunks + i * (kThreads / kChunks);
    const bool inside = line + at < lines && column + 8 * chunk < columns;
    const int64_t place = inside ? row_place(line + at) + column + 8 * chunk : 0;
    copy_async<16>(chunk_at<MAJOR>(tile, at, chunk), static_cast<const char*>(data) + 2 * place,
                   inside ? 16 : 0);
  }
}

}  // namespace vitkernels::patch_embed::sm80
