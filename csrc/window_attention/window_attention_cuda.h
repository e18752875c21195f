// Arguments and entry points that the launcher (window_attention_cuda.cu) shares with the kernels
// of each path (window_attention_simt.cu, _sm80.cu, _sm90.cu).
#pragma once

#include <cstdint>

#include "common/cuda_path.h"
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/stable.h"

namespace vitkernels::window_attention {

// One (B, H, W, channels) map with unit stride along its channels; strides in elements.
struct MapView {
  void* data;
  int64_t batch, row, column;
};

// What a kernel is told of one call; every size fits an int. An output nobody wants is null.
struct Args {
  int B, H, W, heads, D;
  int Wh, Ww, shift_h, shift_w;
  DType dtype;  // of qkv, out, dout and dqkv
  float scale;
  MapView qkv;  // channels [all q | all k | all v], each head-major
  MapView out;  // (B, H, W, heads * D), contiguous
  float*
      lse;  // (B, windows, heads, N), contiguous: natural logarithm, of the shifted map's windows
  const void* bias_table;
  int64_t bias_row, bias_head;  // strides of the table, in elements
  DType bias_dtype;
  const void* logit_scale;  // one per head; null: `scale` times the product, not the cosine
  int64_t logit_step;
  DType logit_dtype;
  Dropout dropout;   // counter: flat index in (B, windows, heads, N, N)
  int architecture;  // of the device: 10 * major + minor of its compute capability

  // Backward only. `out` is then given, and may have any strides.
  MapView dout;
  MapView dqkv;        // (B, H, W, 3 * heads * D), contiguous
  void* dbias_table;   // ((2 Wh - 1)(2 Ww - 1), heads), contiguous, of bias_dtype
  void* dlogit_scale;  // (heads), contiguous, of logit_dtype

  VK_BOTH int tokens() const { return Wh * Ww; }
  VK_BOTH int map_windows() const { return (H / Wh) * (W / Ww); }
  VK_BOTH int64_t windows() const { return static_cast<int64_t>(B) * map_windows(); }
  VK_BOTH int table_rows() const { return (2 * Wh - 1) * (2 * Ww - 1); }
};

// Each path: why it refuses a call (empty: it serves), and the launches of one call on the device's
// stream. `like` is a tensor of that device, for scratch memory. B is at least 1.
Refusal sm80_refuses_forward(const Args& args);
Refusal sm80_refuses_backward(const Args& args);
Refusal sm90_refuses_forward(const Args& args);
Refusal sm90_refuses_backward(const Args& args);

void forward_simt(const Device& device, const Tensor& like, const Args& args);
void forward_sm80(const Device& device, const Tensor& like, const Args& args);
void forward_sm90(const Device& device, const Tensor& like, const Args& args);
void backward_simt(const Device& device, const Tensor& like, const Args& args);
void backward_sm80(const Device& device, const Tensor& like, const Args& args);
void backward_sm90(const Device& device, const Tensor& like, const Args& args);

// The second stage of the sm_80 and sm_90 backward: dbias_table and dlogit_scale from what their
// groups of windows have summed, (groups, heads, rows of the table + 1), the last for dlogit_scale.
void add_partials(const Device& device, const Args& args, int64_t groups, const float* partial);

}  // namespace vitkernels::window_attention
