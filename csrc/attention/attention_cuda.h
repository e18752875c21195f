// Arguments and entry points that the launcher (attention_cuda.cu) shares with the kernels of each
// path (attention_simt.cu, _sm80*.cu, _sm90*.cu).
#pragma once

#include <cstdint>

#include "common/cuda_path.h"
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/stable.h"

namespace vitkernels::attention {

// One (B, N, H, D) tensor with unit stride along D; strides in elements. data is null for an output
// nobody wants. Of a packed qkv, q, k and v are three views whose data differ by H * D elements.
struct HeadView {
  void* data;
  int64_t batch, row, head;
};

// (B, H, Nq, Nk) with stride 0 along broadcast dimensions. data is null when there is no bias.
struct BiasView {
  const void* data;
  int64_t batch, head, row, column;
  DType dtype;  // kBool: true = attend
};

// What a kernel is told of one call; every size fits an int.
struct Args {
  int B, H, Nq, Nk, D;
  DType dtype;  // of q, k, v, out and their gradients
  float scale;
  HeadView q, k, v;
  HeadView out;  // contiguous (B, Nq, H, D)
  float* lse;    // (B, H, Nq), contiguous: natural logarithm, -inf for a fully masked row
  BiasView bias;
  const uint8_t* padding;  // (B, Nk), nonzero = ignore; null when there is none
  int64_t padding_batch, padding_column;
  Dropout dropout;  // counter: flat index in (B, H, Nq, Nk)

  // Backward only. `out` is then given, and may have any strides.
  HeadView dout;
  HeadView dq, dk, dv;  // contiguous (B, N, H, D), or the three parts of a contiguous dqkv
  void* dbias;          // contiguous, of bias.dtype, with these sizes (1 where bias is broadcast)
  int dbias_batch, dbias_heads, dbias_rows, dbias_columns;
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

// dbias where all keys of a row share an element. delta, rowsum(P dP): of query i of head h at h *
// head_stride + i * row_stride.
void constant_dbias_simt(const Device& device, const Args& args, const float* delta,
                         int64_t head_stride, int row_stride);

}  // namespace vitkernels::attention
