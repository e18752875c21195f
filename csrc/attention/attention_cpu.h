// Arguments and entry points that the launcher (attention_cpu.cpp) shares with the kernels of every
// instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace vitkernels {

// One (B, N, H, D) tensor with unit stride along D; strides in elements. data is null for an output
// nobody wants.
struct HeadView {
  void* data;
  int64_t batch, row, head;
};

// (B, H, Nq, Nk) with stride 0 along broadcast dimensions. data is null when there is no bias.
struct BiasView {
  const void* data;
  int64_t batch, head, row, column;
  DType dtype;
};

struct AttentionArgs {
  int64_t B, H, Nq, Nk, D;
  DType dtype;  // of q, k, v, out and their gradients
  float scale;
  HeadView q, k, v, out;
  float* lse;  // (B, H, Nq)
  BiasView bias;
  const uint8_t* padding;  // (B, Nk), nonzero = ignore; null when there is none
  int64_t padding_batch, padding_column;
  bool dropout;
  uint64_t seed;
  uint64_t threshold;  // keep where the Philox word is >= threshold
  float keep_scale;    // 1 / (1 - p)

  // Backward only.
  HeadView dout, dq, dk, dv;
  // dbias as one slice per (bias batch, bias head) of dbias_rows x dbias_columns. `chunks` work
  // items share a slice; item slice * chunks + chunk sums its heads into dbias_partial[item]. dbias
  // is null when it is not wanted.
  void* dbias;
  float* dbias_partial;
  DType dbias_dtype;
  int64_t dbias_rows, dbias_columns, chunks;
  bool sum_batch, sum_head;  // the bias is broadcast over B, over H
};

struct AttentionTable {
  // Forward work items are query blocks: B * H * query_blocks of them. Any split over threads gives
  // the same bits.
  int64_t (*query_blocks)(const AttentionArgs&);
  int64_t (*forward_scratch)(const AttentionArgs&);  // bytes per thread
  void (*forward)(const AttentionArgs&, int64_t begin, int64_t end, void* scratch);
  // Backward work items are heads, or groups of the heads that add to one dbias slice.
  int64_t (*backward_scratch)(const AttentionArgs&);
  void (*backward)(const AttentionArgs&, int64_t begin, int64_t end, void* scratch);
  // Sums the partials of the slices [begin, end) in order and stores them as dbias.
  void (*reduce_dbias)(const AttentionArgs&, int64_t begin, int64_t end);
};

VK_DECLARE_TABLES(AttentionTable, attention)

}  // namespace vitkernels
