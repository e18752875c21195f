// Where pixels, patches and their gradients lie, and what each channel adds: common to all of
// patch_embed's CUDA kernels.
#pragma once

#include "patch_embed/patch_embed_cuda.h"

namespace vitkernels::patch_embed {

VK_DEVICE float load_pixel(const ImageView& images, int64_t i) {
  return images.bytes ? static_cast<float>(static_cast<const uint8_t*>(images.data)[i])
                      : load_scalar(images.data, images.dtype, i);
}

// ---- Channels, in units of the pixels

VK_DEVICE float channel_zero(const Args& a, int channel) {
  return a.mean == nullptr ? 0.0f : (a.images.bytes ? 255.0f : 1.0f) * a.mean[channel];
}
// What is subtracted from a pixel before it is a 16-bit operand.
VK_DEVICE float channel_centre(const Args& a, int channel) {
  const float zero = channel_zero(a, channel);
  if (a.images.bytes) return fminf(fmaxf(floorf(zero + 0.5f), 0.0f), 255.0f);
  return a.exact() ? 0.0f : zero;
}
VK_DEVICE float channel_rest(const Args& a, int channel) {
  return channel_centre(a, channel) - channel_zero(a, channel);
}
VK_DEVICE float channel_scale(const Args& a, int channel) {
  const float scale = a.images.bytes ? 1.0f / 255.0f : 1.0f;
  return a.std == nullptr ? scale : scale / a.std[channel];
}

// ---- Places

// The top left pixel of patch n of image b.
VK_DEVICE int64_t patch_place(const Args& a, const ImageView& images, int b, int n) {
  const int y = n / a.grid_w, x = n - y * a.grid_w;
  return b * images.batch + static_cast<int64_t>(y) * a.patch_h * images.row +
         static_cast<int64_t>(x) * a.patch_w * images.column;
}
VK_DEVICE int64_t patch_place(const Args& a, const ImageView& images, int row) {
  const int b = row / a.N;
  return patch_place(a, images, b, row - b * a.N);
}
// Column k, counted from there.
VK_DEVICE int64_t pixel_place(const Args& a, const ImageView& images, int k) {
  const int channel = k / a.pixels(), i = k - channel * a.pixels(), y = i / a.patch_w;
  return channel * images.channel + y * images.row +
         static_cast<int64_t>(i - y * a.patch_w) * images.column;
}
VK_DEVICE int64_t gradient_place(const Args& a, int row) {
  const int b = row / a.N;
  return b * a.dtokens_batch + (a.P + row - b * a.N) * a.dtokens_row;
}
VK_DEVICE int64_t token_place(const Args& a, int row) {
  const int b = row / a.N;
  return (static_cast<int64_t>(b) * (a.P + a.N) + a.P + row - b * a.N) * a.D;
}

// ---- Prefix tokens

// Elements of the prefix rows, every step-th from `first` on.
VK_DEVICE void write_prefix(const Args& a, int64_t first, int64_t step) {
  const int64_t row = static_cast<int64_t>(a.P) * a.D;
  for (int64_t i = first; i < a.B * row; i += step) {
    const int64_t b = divide(i, row), at = i - b * row;
    float value = load_scalar(a.prefix.data, a.prefix.dtype, at);
    if (a.pos.data != nullptr && a.first_position > 0)
      value += load_scalar(a.pos.data, a.pos.dtype, at);
    store_scalar(a.tokens, a.dtype, b * (a.P + a.N) * static_cast<int64_t>(a.D) + at, value);
  }
}

}  // namespace vitkernels::patch_embed
