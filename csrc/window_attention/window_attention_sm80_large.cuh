// What the sm_80 kernels of window_attention for 65 to 256 tokens share, forward and backward: the
// tokens and the bias of a window in shared memory, scores in fragments, products of 16 rows with
// any number of columns.
//
// A window is padded to a multiple of 16 tokens: rows beyond its N are zero in every tile, scores
// with a padded key are -inf, and nothing of padded queries is stored. The head's column of the
// bias table lies in shared memory; the entry of query and key is the difference of two offsets,
// one of each token. CAREFUL code masks and counts columns; the other is for chunks without padding
// in windows without a seam.
#pragma once

#include "window_attention/window_attention_plan_sm80_large.h"
#include "window_attention/window_attention_sm80.cuh"

namespace vitkernels::window_attention::sm80_large {

using namespace sm80;

// ---- Tokens

// Arrays of an int for each token, padded ones too.
struct Tokens {
  int* places;   // row and column in the window, as packed_token has them
  int* offsets;  // see fill_tokens
  int* regions;  // bits: it is beyond the seam below, or to the right of the other
};

constexpr int kBelow = 1, kRight = 2, kPadding = 4;

VK_DEVICE Tokens tokens_at(void* memory, int rows) {
  auto* const places = static_cast<int*>(memory);
  return {places, places + rows, places + 2 * rows};
}

// offsets: sign * (entries of the bias table from the first token on), in bytes.
VK_DEVICE void fill_tokens(const Tokens& tokens, const Args& a, int N, int sign) {
  for (int token = static_cast<int>(threadIdx.x); token < padded_rows(N);
       token += static_cast<int>(blockDim.x)) {
    const int packed = token < N ? packed_token(a, token) : 0;
    const int y = packed >> 16, x = packed & 0xffff;
    tokens.places[token] = packed;
    tokens.offsets[token] = sign * 4 * (y * (2 * a.Ww - 1) + x);
    tokens.regions[token] =
        token >= N ? kPadding
                   : (y >= a.Wh - a.shift_h ? kBelow : 0) | (x >= a.Ww - a.shift_w ? kRight : 0);
  }
}

// The seams that a window has. Tokens whose regions differ in one of these bits, or in kPadding, do
// not attend to each other.
VK_DEVICE int seam_bits(const Args& a, const WindowPlace& place) {
  return (a.shift_h > 0 && place.y + 1 == a.H / a.Wh ? kBelow : 0) |
         (a.shift_w > 0 && place.x + 1 == a.W / a.Ww ? kRight : 0);
}

// The window of a stage, and the block's head. In shared memory, for registers are few.
struct Visit {
  WindowPlace place;
  int head;
  int64_t window;
  float factor;  // of the head's products
};
static_assert(2 * sizeof(Visit) == kVisitBytes);

// Where lse of the window's first token is.
VK_DEVICE float* lse_of(const Args& a, const Visit& visit) {
  return a.lse + (visit.window * a.heads + visit.head) * (a.Wh * a.Ww);
}

// The next window, known to the block from its next barrier on.
VK_DEVICE Visit advance_visit(const Args& a, Visit* visits, int parity) {
  Visit next = visits[parity];
  advance(a, next.place);
  ++next.window;
  if (threadIdx.x == 0) visits[1 - parity] = next;
  return next;
}

// The head's column of the bias table, times log2 e.
VK_DEVICE void fill_bias(float* table, const Args& a, int head) {
  for (int row = static_cast<int>(threadIdx.x); row < a.table_rows();
       row += static_cast<int>(blockDim.x))
    table[row] =
        load_scalar(a.bias_table, a.bias_dtype, row * a.bias_row + head * a.bias_head) * kLog2e;
}

// ---- Tiles: a window's tokens of one head, `tile` bytes; their 16-byte chunks swizzled

// Zeros where no token is ever copied to.
template <int D>
VK_DEVICE void clear_rows(char* tiles, int count, int tile, int N) {
  constexpr int kChunks = D / 8;
  const int rest = (padded_rows(N) - N) * kChunks;
  for (int i = static_cast<int>(threadIdx.x); i < count * rest; i += static_cast<int>(blockDim.x))
    store_16(chunk_at<D>(tiles + i / rest * tile, N + i % rest / kChunks, i % kChunks),
             make_uint4(0, 0, 0, 0));
}

// Begins to copy COUNT tiles whose channels are `apart` elements from each other.
template <int D, int COUNT>
VK_DEVICE void begin_rows(char* tiles, int tile, const Args& a, const MapView& map, int64_t channel,
                          int64_t apart, const WindowPlace& place, const int* places, int N) {
  constexpr int kChunks = D / 8;
#pragma unroll 1
  for (int piece = static_cast<int>(threadIdx.x); piece < N * kChunks;
       piece += static_cast<int>(blockDim.x)) {
    const int row = piece / kChunks, chunk = piece % kChunks;
    const int64_t at = token_offset(a, map, place, places[row]) + channel + chunk * 8;
    const auto* from = static_cast<const uint16_t*>(map.data) + at;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      copy_async<16>(chunk_at<D>(tiles + i * tile, row, chunk), from + i * apart);
  }
}

// inverse_length of each row of two tiles that lie behind each other.
template <DType TYPE, int D>
VK_DEVICE void fill_inverse_lengths(float* inverse, char* tiles, int rows) {
  for (int row = static_cast<int>(threadIdx.x); row < 2 * rows; row += static_cast<int>(blockDim.x))
    inverse[row] = inverse_length<TYPE, D>(tiles, row);
}

// ---- Products of a warp's 16 rows

// The rows from `first` on, as A.
template <int D>
VK_DEVICE void load_rows(FragmentA (&rows)[D / 16], char* tile, int first) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 0; step < D / 16; ++step)
    load_matrices(rows[step].r, chunk_at<D>(tile, first + lane % 16, step * 2 + lane / 16));
}

// c += a b^T for the rows of `b` from `first` on, eight to a fragment; CAREFUL: `count` fragments.
template <DType TYPE, int D, int F, bool CAREFUL>
VK_DEVICE void multiply_columns(FragmentC (&c)[F], const FragmentA (&a)[D / 16], char* b, int first,
                                int count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int n = 0; n < F; n += 2) {
    if (CAREFUL && n >= count) continue;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {  // matrices: rows n (k low, k high), then n + 1
      uint32_t r[4];
      load_matrices(
          r, chunk_at<D>(b, first + n * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
      mma_m16n8k16<TYPE>(c[n], a[step], FragmentB{{r[0], r[1]}});
      mma_m16n8k16<TYPE>(c[n + 1], a[step], FragmentB{{r[2], r[3]}});
    }
  }
}

// Two fragments of scores, rounded, are the A of a product with 16 rows.
template <DType TYPE>
VK_DEVICE FragmentA as_rows(const FragmentC& low, const FragmentC& high) {
  return {{pack<TYPE>(low.v[0], low.v[1]), pack<TYPE>(low.v[2], low.v[3]),
           pack<TYPE>(high.v[0], high.v[1]), pack<TYPE>(high.v[2], high.v[3])}};
}

// ---- Scores: rows are queries and columns keys, or the other way round

// What a lane knows of its two rows.
struct RowPair {
  int first;            // of the tile
  const char* bias[2];  // a column's offset further is the bias of both
  float by[2];
};

// Rows `first` on; `inverse` lengths of the rows' tokens only with cosines.
template <bool COSINE>
VK_DEVICE RowPair row_pair(const Args& a, const float* table, const Tokens& tokens,
                           const float* inverse, float by, int first) {
  const auto* middle =
      reinterpret_cast<const char*>(table + (a.Wh - 1) * (2 * a.Ww - 1) + a.Ww - 1);
  RowPair rows;
  rows.first = first;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + static_cast<int>(threadIdx.x) % kWarp / 4 + 8 * half;
    rows.bias[half] = middle - tokens.offsets[row];
    rows.by[half] = COSINE ? by * inverse[row] : by;
  }
  return rows;
}

// From products to scores in units of log2, of the columns from `first` on: times `by` (with
// cosines, by the inverse lengths of row and column), plus the bias; CAREFUL: -inf where row and
// column do not attend to each other.
template <bool COSINE, bool CAREFUL>
VK_DEVICE void finish_scores(FragmentC& s, const RowPair& rows, const Tokens& tokens,
                             const float* inverse, int seams, int first) {
  const int column = first + static_cast<int>(threadIdx.x) % kWarp % 4 * 2;
  const uint2 offsets = *reinterpret_cast<const uint2*>(tokens.offsets + column);
  if constexpr (COSINE) {
    const float2 by = *reinterpret_cast<const float2*>(inverse + column);
    s.v[0] *= by.x, s.v[1] *= by.y, s.v[2] *= by.x, s.v[3] *= by.y;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int offset = static_cast<int>(i % 2 == 0 ? offsets.x : offsets.y);
    const float bias = *reinterpret_cast<const float*>(rows.bias[i / 2] + offset);
    s.v[i] = fmaf(s.v[i], rows.by[i / 2], bias);
  }
  if constexpr (CAREFUL) {
    const int* const row = tokens.regions + rows.first + static_cast<int>(threadIdx.x) % kWarp / 4;
    const uint2 regions = *reinterpret_cast<const uint2*>(tokens.regions + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int region = static_cast<int>(i % 2 == 0 ? regions.x : regions.y);
      if (((region ^ row[i / 2 * 8]) & (seams | kPadding)) != 0) s.v[i] = -INFINITY;
    }
  }
}

}  // namespace vitkernels::window_attention::sm80_large
