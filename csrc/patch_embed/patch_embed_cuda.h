// Arguments and entry points that the launcher (patch_embed_cuda.cu) shares with the kernels of
// each path (patch_embed_simt.cu, _sm80.cu, _sm90.cu).
#pragma once

#include <cstdint>

#include "common/cuda_path.h"
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/stable.h"
#include "patch_embed/patch_embed_plan.h"

namespace vitkernels::patch_embed {

// (B, C, H, W) in any strides, in elements.
struct ImageView {
  void* data;
  int64_t batch, channel, row, column;
  DType dtype;
  bool bytes;  // uint8; dtype means nothing then
};

// A contiguous parameter or its gradient; data is null for what is absent or not wanted.
struct Parameter {
  void* data;
  DType dtype;
};

// What a kernel is told of one call. A row is one patch of one image, b * N + n; column k of a row
// is pixel k of a patch in the weight's order (channel, y, x).
struct Args {
  int B, C, N, D, P;  // N patches and P prefix tokens of each image
  int patch_h, patch_w, grid_w;
  int first_position;  // of the patches in pos: P, or 0 where the prefix tokens have none
  DType dtype;         // of the products and the tokens
  ImageView images;
  Parameter weight;  // (D, C * patch_h * patch_w)
  Parameter bias, pos, prefix;
  const float *mean, *std;  // (C); null: 0 and 1
  void* tokens;             // (B, P + N, D), contiguous

  // Backward only; dtokens has `dtype` and unit stride along D.
  const void* dtokens;
  int64_t dtokens_batch, dtokens_row;
  ImageView dimages;  // contiguous, of the images' dtype
  Parameter dweight, dbias, dpos, dprefix;

  VK_BOTH int rows() const { return B * N; }
  VK_BOTH int pixels() const { return patch_h * patch_w; }  // of one channel of a patch
  VK_BOTH int columns() const { return C * pixels(); }
  // 16-bit operands that are exact: bytes less an integer, or pixels of the product's own type as
  // they are (rounding them less a mean would be biased, as both lie on one grid). What is left of
  // the mean then goes into the bias.
  VK_BOTH bool exact() const { return images.bytes || images.dtype == dtype; }
};

// Each path: why it refuses a call (empty: it serves), and the launches of one call on the device's
// stream. `like` is a tensor of that device, for scratch memory. B is at least 1.
Refusal sm80_refuses_forward(const Args& args);
Refusal sm80_refuses_backward(const Args& args);
Refusal sm90_refuses_forward(const Args& args);
Refusal sm90_refuses_backward(const Args& args);

void forward_simt(const Device& device, const Args& args);
void forward_sm80(const Device& device, const Tensor& like, const Args& args);
void forward_sm90(const Device& device, const Tensor& like, const Args& args);

// dweight and dimages, where they are wanted. dbias: (D) in fp32, given where adds_rest.
void products_simt(const Device& device, const Tensor& like, const Args& args);
void products_sm80(const Device& device, const Tensor& like, const Args& args, const float* dbias);
void products_sm90(const Device& device, const Tensor& like, const Args& args, const float* dbias);

// dbias, dpos and dprefix, where they are wanted, and the fp32 dbias where it is not null.
void sums_over_images(const Device& device, const Tensor& like, const Args& args, float* dbias);

// ---- What the paths with 16-bit operands share (patch_embed_simt.cu)

// Whether the products leave out a part of the mean, which sums of the weight and of dtokens add.
inline bool adds_rest(const Args& args) { return args.mean != nullptr && args.exact(); }

// The weight as the products read it, (D, padded.columns()), and the bias with what is left of the
// mean. The owners keep the memory.
struct Prepared {
  const void* weight;
  const float* bias;
  Tensor weight_owner, bias_owner;
};
Prepared prepare(const Device& device, const Tensor& like, const Args& args, const Padded& columns);

// dweight from its parts (splits, D, padded.columns()), in order.
void finish_dweight(const Device& device, const Args& args, const float* partial, int splits,
                    const float* dbias);

}  // namespace vitkernels::patch_embed
