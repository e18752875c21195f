// What the launchers of window_attention on the CPU and on the GPU check alike, and the arguments
// that have one meaning for both.
#pragma once

#include "common/stable.h"

namespace vitkernels::window_attention {

constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kMaxTokens = 1024;  // of a window

// Whether a tensor is where the launcher's kernels run.
using Holds = bool (*)(const Tensor&);

template <class Int>
void assign(Int* to, int64_t value) {
  *to = static_cast<Int>(value);
}

inline void check(const Tensor& t, const std::vector<int64_t>& shape, Holds holds,
                  const char* place, const char* op, const char* name) {
  VK_CHECK(holds(t), op, name, " must be on ", place);
  VK_CHECK(shape_of(t) == shape, op, name, " has the wrong shape");
}

inline void check_like(const Tensor& t, const std::vector<int64_t>& shape, ScalarType dtype,
                       Holds holds, const char* place, const char* op, const char* name) {
  check(t, shape, holds, place, op, name);
  VK_CHECK(t.scalar_type() == dtype, op, name, " has the wrong dtype");
}

// What both directions are given beside qkv.
struct Options {
  const Tensor& bias_table;
  const OptTensor &logit_scale, &seed;
  int64_t window_h, window_w, shift_h, shift_w, num_heads;
  double scale, dropout_p;
};

template <class Args>
void set_sizes(Args* args, const Tensor& qkv, const Options& o, Holds holds, const char* place,
               const char* op) {
  VK_CHECK(holds(qkv), op, "qkv must be on ", place);
  VK_CHECK(qkv.dim() == 4, op, "qkv must have 4 dimensions (B, H, W, 3 * C), got ", qkv.dim());
  args->dtype = dtype_of(qkv, op, "qkv");
  assign(&args->B, qkv.size(0)), assign(&args->H, qkv.size(1)), assign(&args->W, qkv.size(2));
  VK_CHECK(o.num_heads >= 1 && qkv.size(3) % 3 == 0 && qkv.size(3) / 3 % o.num_heads == 0, op,
           "qkv's last dimension must be a multiple of 3 * num_heads");
  assign(&args->heads, o.num_heads), assign(&args->D, qkv.size(3) / 3 / o.num_heads);
  VK_CHECK(args->D >= 1 && args->D <= kMaxHeadDim, op, "head dim must be in [1, ", kMaxHeadDim,
           "], got ", args->D);
  const int64_t window[2] = {o.window_h, o.window_w}, shift[2] = {o.shift_h, o.shift_w},
                size[2] = {qkv.size(1), qkv.size(2)};
  for (int d = 0; d < 2; ++d) {
    VK_CHECK(window[d] >= 1 && window[d] <= kMaxTokens, op, "window_size must be in [1, ",
             kMaxTokens, "], got ", window[d]);
    VK_CHECK(shift[d] >= 0 && shift[d] < window[d], op, "shift_size must be in [0, window), got ",
             shift[d]);
    VK_CHECK(size[d] >= 1 && size[d] % window[d] == 0, op, "qkv of height or width ", size[d],
             " is not cut into windows of ", window[d]);
  }
  VK_CHECK(window[0] * window[1] <= kMaxTokens, op, "window_size must have at most ", kMaxTokens,
           " tokens");
  assign(&args->Wh, window[0]), assign(&args->Ww, window[1]);
  assign(&args->shift_h, shift[0]), assign(&args->shift_w, shift[1]);
}

template <class Args>
void set_parameters(Args* args, const Options& o, Holds holds, const char* place, const char* op) {
  args->scale = static_cast<float>(o.scale);
  check(o.bias_table, {args->table_rows(), args->heads}, holds, place, op, "bias_table");
  args->bias_table = o.bias_table.const_data_ptr();
  args->bias_row = o.bias_table.stride(0), args->bias_head = o.bias_table.stride(1);
  args->bias_dtype = dtype_of(o.bias_table, op, "bias_table");
  if (o.logit_scale.has_value()) {
    const Tensor& logit = *o.logit_scale;
    if (logit.dim() == 3) {
      check(logit, {args->heads, 1, 1}, holds, place, op, "logit_scale");
    } else {
      check(logit, {args->heads}, holds, place, op, "logit_scale");
    }
    args->logit_scale = logit.const_data_ptr();
    args->logit_step = logit.stride(0);
    args->logit_dtype = dtype_of(logit, op, "logit_scale");
  }
}

// Whether there is dropout.
inline bool check_dropout(const Options& o, Holds holds, const char* place, const char* op) {
  VK_CHECK(o.dropout_p >= 0.0 && o.dropout_p < 1.0, op, "dropout_p must be in [0, 1), got ",
           o.dropout_p);
  if (o.dropout_p == 0.0) return false;
  VK_CHECK(o.seed.has_value() && holds(*o.seed) && o.seed->scalar_type() == ScalarType::Long &&
               o.seed->numel() == 1,
           op, "seed must be one int64 on ", place, " when dropout_p > 0");
  return true;
}

}  // namespace vitkernels::window_attention
