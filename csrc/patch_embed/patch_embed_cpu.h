// Arguments and entry points that the launcher (patch_embed_cpu.cpp) shares with the kernels of
// every instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace vitkernels {

// (B, C, H, W) in any strides (elements) with unit stride along W or along C.
struct ImageView {
  const void* data;
  int64_t batch, channel, row, column;
  DType dtype;
  bool bytes;  // uint8; dtype means nothing then
};

// Rows of D elements with unit stride. data is null for what is absent.
struct RowsView {
  void* data;
  int64_t batch, row;
  DType dtype;
};

// What is done to the pixels of channel c, and to the products they enter:
//   operand = (pixel - center) * factor,   x = scale * operand + residual.
// Operands of bf16 pairs are exact for uint8 (an integer is subtracted) and for bf16 pixels
// (nothing is: rounding bf16 - mean would be biased, as both lie on one grid); of others they are
// rounded once. fp32 operands are x itself, with scale 1 and residual 0.
struct ChannelArgs {
  float center, factor, scale, residual;
  int64_t offset;  // of the channel's elements in an operand row of the forward
};

// Neighbouring channels of one scale: elements [begin, end) of an operand row, of even length.
struct GroupArgs {
  int64_t begin, end;
  float scale;
};

struct PatchEmbedArgs {
  int64_t B, C, D, P;                               // P prefix tokens
  int64_t patch_h, patch_w, grid_h, grid_w, width;  // width = grid_w * patch_w
  DType dtype;                                      // of the products
  ImageView images;
  const void* weight;  // (D, C * patch_h * patch_w), contiguous
  DType weight_dtype;
  const ChannelArgs* channels;
  const GroupArgs* groups;
  int64_t group_count, operand_row;  // elements of an operand row
  bool residual;                     // some channel has one
  bool alike;                        // all channels are treated alike
  void* packed_weight;               // packed_weight_units() of 4 bytes

  // Forward only.
  float* bias;   // (D): bias + residual * sum of weight
  RowsView pos;  // of the patches; one row of zeros (row stride 0) when there is none
  RowsView prefix, prefix_pos;  // (P, D)
  RowsView tokens;              // (B, P + N, D)

  // Backward only; dtokens has `dtype`.
  RowsView dtokens;
  void* packed_dtokens;  // packed_dtokens_units() of 4 bytes
  float* token_sums;     // token_chunks x D: sums over fixed chunks of tokens
  float* dbias_sum;      // (D)
  int64_t token_chunks;
  RowsView dpos, dprefix;  // dpos of rows [dpos_first, P + N)
  int64_t dpos_first;
  RowsView dweight, dbias;
  void* dimages;  // (B, C, H, W), contiguous, of the images' dtype
};

struct PatchEmbedTable {
  bool bf16_pairs;  // bf16 products multiply bf16 operands; otherwise they are widened to fp32

  // Forward: pack the weight by column blocks, then multiply row blocks. Any split of the items
  // over threads gives the same bits; scratch is bytes per thread.
  int64_t (*packed_weight_units)(const PatchEmbedArgs&);
  int64_t (*column_blocks)(const PatchEmbedArgs&);
  int64_t (*pack_scratch)(const PatchEmbedArgs&);
  void (*pack_weight)(const PatchEmbedArgs&, int64_t begin, int64_t end, void* scratch);
  int64_t (*row_blocks)(const PatchEmbedArgs&);
  int64_t (*forward_scratch)(const PatchEmbedArgs&);
  void (*forward)(const PatchEmbedArgs&, int64_t begin, int64_t end, void* scratch);

  // Backward: sums over the batch (items are token chunks) and their sum; dweight (pack dtokens by
  // row blocks, then multiply by weight blocks); dimages (pack the weight by line blocks, then
  // multiply by image blocks).
  void (*sum_tokens)(const PatchEmbedArgs&, int64_t begin, int64_t end, void* scratch);  // D floats
  void (*store_dbias)(const PatchEmbedArgs&);
  int64_t (*packed_dtokens_units)(const PatchEmbedArgs&);
  int64_t (*dtokens_blocks)(const PatchEmbedArgs&);
  void (*pack_dtokens)(const PatchEmbedArgs&, int64_t begin, int64_t end);
  int64_t (*weight_blocks)(const PatchEmbedArgs&);
  int64_t (*dweight_scratch)(const PatchEmbedArgs&);
  void (*dweight)(const PatchEmbedArgs&, int64_t begin, int64_t end, void* scratch);
  int64_t (*packed_lines_units)(const PatchEmbedArgs&);
  int64_t (*line_blocks)(const PatchEmbedArgs&);
  int64_t (*lines_scratch)(const PatchEmbedArgs&);
  void (*pack_lines)(const PatchEmbedArgs&, int64_t begin, int64_t end, void* scratch);
  int64_t (*image_blocks)(const PatchEmbedArgs&);
  int64_t (*dimages_scratch)(const PatchEmbedArgs&);
  void (*dimages)(const PatchEmbedArgs&, int64_t begin, int64_t end, void* scratch);
};

VK_DECLARE_TABLES(PatchEmbedTable, patch_embed)

}  // namespace vitkernels
