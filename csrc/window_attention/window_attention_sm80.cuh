// What the sm_80 kernels of window_attention share, forward and backward: copies of a window's
// tokens to 64-row tiles in shared memory, products of a warp's 16 rows, the bias as fragments,
// seams as bit masks. What other tensor-core kernels need too: window_attention_tiles.cuh.
//
// A window is padded to 64 tokens: rows beyond its N are zero in every tile, key columns beyond
// get a bias of -inf, and nothing of padded queries is stored.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/async_copy.cuh"
#include "common/device.cuh"
#include "common/mma.cuh"
#include "common/swizzle.cuh"
#include "window_attention/window_attention_cuda.h"
#include "window_attention/window_attention_plan_sm80.h"
#include "window_attention/window_attention_plan_sm80_large.h"
#include "window_attention/window_attention_tiles.cuh"

namespace vitkernels::window_attention::sm80 {

using namespace window_attention;

// The element where the channels of a token begin in an unshifted map.
VK_DEVICE int64_t token_offset(const Args& a, const MapView& map, const WindowPlace& place,
                               int packed) {
  int y = place.y * a.Wh + (packed >> 16) + a.shift_h, x = place.x * a.Ww + (packed & 0xffff);
  x += a.shift_w;
  if (y >= a.H) y -= a.H;
  if (x >= a.W) x -= a.W;
  return place.b * map.batch + y * map.row + x * map.column;
}

// ---- Seams

// Tokens of a window in bits: those that the shift brings from the top of the map into its last row
// of windows, and from the left into the last column.
struct Seams {
  uint64_t below, right;
};

VK_DEVICE Seams seams_of(const Args& a) {
  Seams seams = {0, 0};
  for (int token = 0; token < a.Wh * a.Ww; ++token) {
    if (token / a.Ww >= a.Wh - a.shift_h) seams.below |= uint64_t{1} << token;
    if (token % a.Ww >= a.Ww - a.shift_w) seams.right |= uint64_t{1} << token;
  }
  return seams;
}

// The seams that this window has; none: every token attends to every other.
VK_DEVICE Seams seams_in(const Args& a, const Seams& seams, const WindowPlace& place) {
  return {place.y + 1 == a.H / a.Wh ? seams.below : 0, place.x + 1 == a.W / a.Ww ? seams.right : 0};
}

// The tokens that a query attends to.
VK_DEVICE uint64_t attended(const Seams& seams, int query) {
  return (seams.below >> query & 1 ? seams.below : ~seams.below) &
         (seams.right >> query & 1 ? seams.right : ~seams.right);
}

// ---- Tiles: 64 rows of D 16-bit elements, their 16-byte chunks swizzled

// Zeros where no token is ever copied to.
template <int D>
VK_DEVICE void clear_padding(char* tiles, int count, int N) {
  constexpr int kChunks = D / 8;
  for (int i = static_cast<int>(threadIdx.x); i < count * kTile * kChunks; i += kThreads) {
    const int row = i / kChunks;
    if (row % kTile >= N) store_16(chunk_at<D>(tiles, row, i % kChunks), make_uint4(0, 0, 0, 0));
  }
}

// Begins to copy COUNT tiles whose channels are `apart` elements from each other.
template <int D, int COUNT>
VK_DEVICE void begin_tiles(char* tiles, const Args& a, const MapView& map, int64_t channel,
                           int64_t apart, const WindowPlace& place, const int* tokens, int N) {
  constexpr int kChunks = D / 8, kStep = kThreads / kChunks;
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % kChunks;
#pragma unroll
  for (int i = 0; i < kTile / kStep; ++i) {
    const int row = thread / kChunks + i * kStep;
    if (row >= N) continue;
    const int64_t at = token_offset(a, map, place, tokens[row]) + channel + chunk * 8;
    const auto* from = static_cast<const uint16_t*>(map.data) + at;
#pragma unroll
    for (int tile = 0; tile < COUNT; ++tile)
      copy_async<16>(chunk_at<D>(tiles + tile * tile_bytes(D), row, chunk), from + tile * apart);
  }
}

// Stores a warp's 16 rows, row r of its half h times by[h], by way of its rows of `tile`, which are
// those of the window from `first` on.
template <DType TYPE, int D>
VK_DEVICE void store_rows(const FragmentC (&x)[D / 8], const float (&by)[2], char* tile,
                          const Args& a, const MapView& map, int64_t channel,
                          const WindowPlace& place, const int* tokens, int N,
                          int first = static_cast<int>(threadIdx.x) / kWarp * 16) {
  constexpr int kChunks = D / 8, kStep = kWarp / kChunks;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + 8 * half;
    if (row >= N) continue;  // padding stays zero
#pragma unroll
    for (int n = 0; n < kChunks; ++n)
      *reinterpret_cast<uint32_t*>(chunk_at<D>(tile, row, n) + lane % 4 * 4) =
          pack<TYPE>(x[n].v[2 * half] * by[half], x[n].v[2 * half + 1] * by[half]);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 / kStep; ++i) {
    const int row = first + lane / kChunks + i * kStep, chunk = lane % kChunks;
    if (row >= N) continue;
    const int64_t at = token_offset(a, map, place, tokens[row]) + channel + chunk * 8;
    store_16(static_cast<uint16_t*>(map.data) + at,
             *reinterpret_cast<const uint4*>(chunk_at<D>(tile, row, chunk)));
  }
  __syncwarp();
}

// ---- Products of a warp's 16 rows

// c += a b^T: 16 rows of `a`, from its row `first` on, against all 64 rows of `b`.
template <DType TYPE, int D>
VK_DEVICE void multiply_rows(FragmentC (&c)[8], char* a, int first, char* b) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    FragmentA fa;
    load_matrices(fa.r, chunk_at<D>(a, first + lane % 16, step * 2 + lane / 16));
#pragma unroll
    for (int n = 0; n < 8; n += 2) {  // matrices: rows n (k low, k high), then n + 1
      uint32_t r[4];
      load_matrices(r, chunk_at<D>(b, n * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
      mma_m16n8k16<TYPE>(c[n], fa, FragmentB{{r[0], r[1]}});
      mma_m16n8k16<TYPE>(c[n + 1], fa, FragmentB{{r[2], r[3]}});
    }
  }
}

// c += a b for one step of 16 of the 64 rows of `b`.
template <DType TYPE, int D>
VK_DEVICE void multiply_step(FragmentC (&c)[D / 8], const FragmentA& a, char* b, int step) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int n = 0; n < D / 8; n += 2) {  // matrices: chunk n (rows low, rows high), then n + 1
    uint32_t r[4];
    load_matrices_transposed(
        r, chunk_at<D>(b, step * 16 + lane / 8 % 2 * 8 + lane % 8, n + lane / 16));
    mma_m16n8k16<TYPE>(c[n], a, FragmentB{{r[0], r[1]}});
    mma_m16n8k16<TYPE>(c[n + 1], a, FragmentB{{r[2], r[3]}});
  }
}

// ---- Scores

// The head's bias times log2 e, -inf for padded keys: each thread keeps what its own fragments need
// at bias[n * kThreads + thread].
VK_DEVICE void expand_bias(float4* bias, const Args& a, int head, int N) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  for (int n = 0; n < 8; ++n) {
    float v[4];
    for (int i = 0; i < 4; ++i) {
      const int query = thread / kWarp * 16 + fragment_c_row(lane, i);
      const int key = n * 8 + fragment_c_column(lane, i);
      v[i] = key < N ? 0.0f : -INFINITY;
      if (query < N && key < N)
        v[i] = position_bias(a, head, packed_token(a, query), packed_token(a, key));
    }
    bias[n * kThreads + thread] = make_float4(v[0], v[1], v[2], v[3]);
  }
}

// 1 / max(|x|, 1e-12) of each row of the tiles q and k, by one thread each.
template <DType TYPE, int D>
VK_DEVICE void inverse_lengths(float* inverse, char* q_and_k) {
  const int row = static_cast<int>(threadIdx.x);
  inverse[row] = inverse_length<TYPE, D>(q_and_k, row);
}

// From products to scores in units of log2: times `by` (with cosines, by the inverse lengths of
// query and key), plus the bias; -inf beyond a seam.
template <bool COSINE>
VK_DEVICE void finish_scores(FragmentC (&s)[8], float by, const float4* bias, const float* inverse,
                             const Seams& seams) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int query = thread / kWarp * 16 + lane / 4;
  float row_by[2] = {by, by};
  if constexpr (COSINE) row_by[0] *= inverse[query], row_by[1] *= inverse[query + 8];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float4 b = bias[n * kThreads + thread];
    if constexpr (COSINE) {
      const float2 key = *reinterpret_cast<const float2*>(inverse + kTile + n * 8 + lane % 4 * 2);
      s[n].v[0] *= key.x, s[n].v[1] *= key.y, s[n].v[2] *= key.x, s[n].v[3] *= key.y;
    }
    s[n].v[0] = fmaf(s[n].v[0], row_by[0], b.x), s[n].v[1] = fmaf(s[n].v[1], row_by[0], b.y);
    s[n].v[2] = fmaf(s[n].v[2], row_by[1], b.z), s[n].v[3] = fmaf(s[n].v[3], row_by[1], b.w);
  }
  if ((seams.below | seams.right) == 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint64_t keys = attended(seams, query + 8 * half) >> (lane % 4 * 2);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if ((keys >> (8 * n + i) & 1) == 0) s[n].v[2 * half + i] = -INFINITY;
  }
}

// ---- Host: kernels of other files, and what either direction refuses

void forward_large(const Device& device, const Args& a);
void backward_large(const Device& device, const Tensor& like, const Args& a);

inline Refusal refuses(const Args& a) {
  if (a.dtype == DType::kF32) return "it takes bf16 and fp16";
  if (a.D != 32) return "it takes head dim 32";
  if (a.tokens() > sm80_large::kMostTokens) return "it takes windows to 256 tokens";
  if (a.dropout.seed != nullptr) return "it has no dropout";
  if (!on_lines(a, a.qkv)) return "pixels of qkv must begin on 16-byte lines";
  return "";
}

// What only the kernels for more than 64 tokens refuse: they need more shared memory, and read out.
inline Refusal refuses_large(const Args& a, bool backward) {
  if (a.tokens() <= kTile) return "";
  const bool cosine = a.logit_scale != nullptr;
  const int64_t bytes = backward
                            ? sm80_large::backward_shared(a.tokens(), a.table_rows(), a.D, cosine)
                            : sm80_large::forward_shared(a.tokens(), a.table_rows(), a.D, cosine);
  if (!sm80_large::fits(bytes, a.architecture))
    return "the window needs more shared memory than the device has";
  if (backward && !on_lines(a, a.out)) return "pixels of out must begin on 16-byte lines";
  return "";
}

}  // namespace vitkernels::window_attention::sm80
