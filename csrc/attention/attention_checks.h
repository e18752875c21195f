// What the launchers of attention on the CPU and on the GPU check alike, and the arguments that
// have one meaning for both.
#pragma once

#include "common/stable.h"

namespace vitkernels::attention {

constexpr int64_t kMaxHeadDim = 256;

inline void check_like(const Tensor& t, const std::vector<int64_t>& shape, ScalarType dtype,
                       const char* op, const char* name) {
  VK_CHECK(shape_of(t) == shape, op, name, " has the wrong shape");
  VK_CHECK(t.scalar_type() == dtype, op, name, " has the wrong dtype");
}

// (B, N, H, D) with unit stride along D; `owner` holds the copy where one had to be made.
template <class HeadView>
HeadView heads(const Tensor& t, Tensor* owner) {
  *owner = t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
  return {const_cast<void*>(owner->const_data_ptr()), owner->stride(0), owner->stride(1),
          owner->stride(2)};
}

// The heads `which` (0 = q, 1 = k, 2 = v) of a packed (B, N, 3 * H * D) tensor, or of (B, N, H * D)
// with which = 0.
template <class HeadView>
HeadView packed_heads(const Tensor& t, int64_t which, int64_t H, int64_t D, Tensor* owner) {
  *owner = t.size(2) == 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t);
  char* data = static_cast<char*>(const_cast<void*>(owner->const_data_ptr()));
  return {data + which * H * D * size_of(dtype_of(t, "attention_qkvpacked", "qkv")),
          owner->stride(0), owner->stride(1), D};
}

template <class HeadView>
HeadView output_heads(void* data, int64_t N, int64_t row, int64_t D) {
  return {data, N * row, row, D};
}

template <class Args>
void set_sizes(Args* args, int64_t B, int64_t H, int64_t Nq, int64_t Nk, int64_t D, DType dtype,
               const char* op) {
  VK_CHECK(H >= 1 && Nq >= 1 && Nk >= 1, op, "expected at least one head, query and key");
  VK_CHECK(D >= 1 && D <= kMaxHeadDim, op, "head dim must be in [1, ", kMaxHeadDim, "], got ", D);
  args->B = static_cast<decltype(args->B)>(B), args->H = static_cast<decltype(args->H)>(H);
  args->Nq = static_cast<decltype(args->Nq)>(Nq), args->Nk = static_cast<decltype(args->Nk)>(Nk);
  args->D = static_cast<decltype(args->D)>(D), args->dtype = dtype;
}

// Sizes and q, k, v of a packed tensor.
template <class Args>
void set_packed(Args* args, const Tensor& qkv, int64_t num_heads, Tensor* owner, const char* op) {
  VK_CHECK(qkv.dim() == 3, op, "qkv must have 3 dimensions (B, N, 3 * H * D)");
  VK_CHECK(num_heads >= 1 && qkv.size(2) % (3 * num_heads) == 0, op,
           "qkv's last dimension must be a multiple of 3 * num_heads");
  using View = decltype(args->q);
  const int64_t N = qkv.size(1), D = qkv.size(2) / (3 * num_heads);
  set_sizes(args, qkv.size(0), num_heads, N, N, D, dtype_of(qkv, op, "qkv"), op);
  View* const views[3] = {&args->q, &args->k, &args->v};
  for (int i = 0; i < 3; ++i)
    *views[i] = packed_heads<View>(i == 0 ? qkv : *owner, i, num_heads, D, owner);
}

// scale, bias and key_padding_mask, for sizes that are set already.
template <class Args>
void set_masks(Args* args, const OptTensor& bias, const OptTensor& key_padding_mask, double scale,
               const char* op) {
  args->scale = static_cast<float>(scale);
  if (bias.has_value()) {
    VK_CHECK(bias->dim() == 4, op, "bias must have 4 dimensions, got ", bias->dim());
    const int64_t full[4] = {args->B, args->H, args->Nq, args->Nk};
    int64_t strides[4];
    for (int d = 0; d < 4; ++d) {
      VK_CHECK(bias->size(d) == 1 || bias->size(d) == full[d], op, "bias dimension ", d,
               " must be 1 or ", full[d], ", got ", bias->size(d));
      strides[d] = bias->size(d) == 1 ? 0 : bias->stride(d);
    }
    args->bias = {bias->const_data_ptr(),
                  strides[0],
                  strides[1],
                  strides[2],
                  strides[3],
                  float_or_bool_dtype_of(*bias, op, "bias")};
  }
  if (key_padding_mask.has_value()) {
    check_like(*key_padding_mask, {args->B, args->Nk}, ScalarType::Bool, op, "key_padding_mask");
    args->padding = static_cast<const uint8_t*>(key_padding_mask->const_data_ptr());
    args->padding_batch = key_padding_mask->stride(0);
    args->padding_column = key_padding_mask->stride(1);
  }
}

// Whether there is dropout.
inline bool check_dropout(const OptTensor& seed, double dropout_p, const char* op) {
  VK_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, "dropout_p must be in [0, 1), got ", dropout_p);
  if (dropout_p == 0.0) return false;
  VK_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
           "seed must be one int64 when dropout_p > 0");
  return true;
}

}  // namespace vitkernels::attention
