// Arguments and entry points that the launcher (window_attention_cpu.cpp) shares with the kernels
// of every instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace vitkernels {

// One (B, H, W, channels) map with unit stride along its channels; strides in elements.
struct MapView {
  const void* data;
  int64_t batch, row, column;
};

struct WindowAttentionArgs {
  int64_t B, H, W, heads, D;
  int64_t Wh, Ww, shift_h, shift_w;
  DType dtype;  // of qkv, out, dout and dqkv
  float scale;
  MapView qkv;
  void* out;   // (B, H, W, heads * D), contiguous
  float* lse;  // (B, windows, heads, N)
  const void* bias_table;
  int64_t bias_row, bias_head;
  DType bias_dtype;
  const void* logit_scale;  // one per head; null: `scale` times the product, not the cosine
  int64_t logit_step;
  DType logit_dtype;
  bool dropout;
  uint64_t seed;
  uint64_t threshold;  // keep where the Philox word is >= threshold
  float keep_scale;    // 1 / (1 - p)
  float* shared;       // what `prepare` makes for all windows

  // Backward only; an output nobody wants is null.
  MapView dout;
  void* dqkv;         // (B, H, W, 3 * heads * D), contiguous
  void* dbias_table;  // ((2 Wh - 1)(2 Ww - 1), heads), contiguous
  void* dlogit_scale;
  float* partials;  // sums of both over each chunk of windows

  int64_t tokens() const { return Wh * Ww; }
  int64_t map_windows() const { return (H / Wh) * (W / Ww); }
  int64_t windows() const { return B * map_windows(); }
  int64_t table_rows() const { return (2 * Wh - 1) * (2 * Ww - 1); }
  // The heads of a window are one work item, or several where windows are few.
  int64_t head_groups() const {
    const int64_t wanted = windows() >= 64 ? 1 : (63 + windows()) / (windows() > 0 ? windows() : 1);
    return wanted < heads ? wanted : heads;
  }
  // Backward: parts of the windows with a partial sum each; fixed, so that no bit depends on the
  // number of threads.
  int64_t chunks() const { return windows() < 64 ? windows() : 64; }
};

struct WindowAttentionTable {
  int64_t (*shared_floats)(const WindowAttentionArgs&);
  void (*prepare)(const WindowAttentionArgs&);
  // Forward work items: windows() * head_groups().
  int64_t (*forward_scratch)(const WindowAttentionArgs&);  // bytes per thread
  void (*forward)(const WindowAttentionArgs&, int64_t begin, int64_t end, void* scratch);
  // Backward work items: chunks() * head_groups().
  int64_t (*backward_scratch)(const WindowAttentionArgs&);
  void (*backward)(const WindowAttentionArgs&, int64_t begin, int64_t end, void* scratch);
  int64_t (*partial_floats)(const WindowAttentionArgs&);
  // Sums the partials in order and stores dbias_table and dlogit_scale.
  void (*reduce)(const WindowAttentionArgs&);
};

VK_DECLARE_TABLES(WindowAttentionTable, window_attention)

}  // namespace vitkernels
