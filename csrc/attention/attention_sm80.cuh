// What the sm_80 kernels of attention share, forward and backward: rows of one head in swizzled
// shared memory, products of a warp's 16 rows, scores with bias and masks, 16-byte stores of
// fragments.
//
// HEAD_DIM is D rounded up to 16. Rows beyond N, and columns beyond D, are zeros in shared memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "attention/attention_cuda.h"
#include "attention/attention_plan_sm80.h"
#include "common/async_copy.cuh"
#include "common/device.cuh"
#include "common/mma.cuh"

namespace vitkernels::attention {

// Launches of attention_sm80_long*.cu.
void forward_sm80_long(const Device& device, const Args& args);
void backward_sm80_long(const Device& device, const Tensor& like, const Args& args);

}  // namespace vitkernels::attention

namespace vitkernels::attention::sm80 {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// ---- Rows of a head

struct Head {
  int b, h;
};

VK_DEVICE Head head_of(const Args& a, unsigned index) {
  const int b = static_cast<int>(index / static_cast<unsigned>(a.H));
  return {b, static_cast<int>(index) - b * a.H};
}

struct Rows {
  uint16_t* data;
  int64_t stride;
  int N;
};

VK_DEVICE Rows rows_of(const HeadView& view, const Head& head, int N) {
  return {static_cast<uint16_t*>(view.data) + head.b * view.batch + head.h * view.head, view.row,
          N};
}

// Where 16 bytes of a row are. Chunks change places within groups so that those of one column in
// eight rows lie in eight different groups of banks, for any even number of chunks to a row.
template <int HEAD_DIM>
constexpr int kChunkGroup = HEAD_DIM % 64 == 0   ? 8
                            : HEAD_DIM % 32 == 0 ? 4
                                                 : 2;

template <int HEAD_DIM>
VK_DEVICE int chunk_offset(int row, int chunk) {
  constexpr int kGroup = kChunkGroup<HEAD_DIM>;
  return (row * (HEAD_DIM / 8) + (chunk ^ (row / (8 / kGroup) % kGroup))) * 16;
}

// From the offset of a row's chunk 0 or 1 to that of the chunk `on` further, an even number.
template <int HEAD_DIM>
VK_DEVICE int further(int offset, int on) {
  const int in_group = on % kChunkGroup<HEAD_DIM>;
  return (offset ^ in_group * 16) + (on - in_group) * 16;
}

// Begins to copy `count` rows of each of two operands, from row `first` on; by `threads` threads,
// of which this is `thread`.
template <int HEAD_DIM>
VK_DEVICE void begin_pair(char* tile_a, const Rows& a, char* tile_b, const Rows& b, int first,
                          int count, int D, int thread, int threads) {
  constexpr int kChunks = HEAD_DIM / 8;
#pragma unroll 1
  for (int i = thread; i < count * kChunks; i += threads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool inside = first + row < a.N && chunk * 8 < D;
    const int64_t source = inside ? first + row : 0;
    const int column = inside ? chunk * 8 : 0, bytes = inside ? 16 : 0;
    copy_async<16>(tile_a + chunk_offset<HEAD_DIM>(row, chunk), a.data + source * a.stride + column,
                   bytes);
    copy_async<16>(tile_b + chunk_offset<HEAD_DIM>(row, chunk), b.data + source * b.stride + column,
                   bytes);
  }
}

template <int HEAD_DIM>
VK_DEVICE void begin_rows(char* tile, const Rows& a, int first, int count, int D, int thread,
                          int threads) {
  constexpr int kChunks = HEAD_DIM / 8;
#pragma unroll 1
  for (int i = thread; i < count * kChunks; i += threads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool inside = first + row < a.N && chunk * 8 < D;
    const int64_t source = inside ? first + row : 0;
    copy_async<16>(tile + chunk_offset<HEAD_DIM>(row, chunk),
                   a.data + source * a.stride + (inside ? chunk * 8 : 0), inside ? 16 : 0);
  }
}

// Word i of lane j of a quad becomes word j of lane i.
VK_DEVICE void transpose_in_quad(uint32_t (&w)[4]) {
#pragma unroll
  for (int bit = 2; bit > 0; bit /= 2) {
    const bool high = (threadIdx.x & static_cast<unsigned>(bit)) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t &low_word = w[bit == 2 ? i : 2 * i], &high_word = w[bit == 2 ? i + 2 : 2 * i + 1];
      const uint32_t got = __shfl_xor_sync(kAllLanes, high ? low_word : high_word, bit);
      (high ? low_word : high_word) = got;
    }
  }
}

// Stores a warp's tile from row `first` on, row r of its half h times by[h]: a lane 16 bytes.
template <DType TYPE, int HEAD_DIM>
VK_DEVICE void store_tile(const FragmentC (&x)[HEAD_DIM / 8], const float (&by)[2], const Rows& to,
                          int first, int D) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + 8 * half;
#pragma unroll
    for (int group = 0; group < HEAD_DIM / 8; group += 4) {
      uint32_t w[4] = {};
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (group + n < HEAD_DIM / 8) {
          const float* v = x[group + n].v + 2 * half;
          w[n] = pack<TYPE>(v[0] * by[half], v[1] * by[half]);
        }
      transpose_in_quad(w);
      const int column = (group + lane % 4) * 8;
      if (row < to.N && column < D)
        store_16(to.data + row * to.stride + column, make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
}

// ---- Products of a warp's 16 rows

template <int HEAD_DIM>
VK_DEVICE void load_tile(FragmentA (&a)[HEAD_DIM / 16], const char* tile) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int offset = chunk_offset<HEAD_DIM>(lane % 16, lane / 16);
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step)
    load_matrices(a[step].r, tile + further<HEAD_DIM>(offset, step * 2));
}

// c = a b^T for COUNT * 8 rows of `b` from row `first`, a multiple of 16, on.
template <DType TYPE, int HEAD_DIM, int COUNT>
VK_DEVICE void multiply_rows(FragmentC (&c)[COUNT], const FragmentA (&a)[HEAD_DIM / 16],
                             const char* b, int first) {
  constexpr int kRow = 2 * HEAD_DIM;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int offset = first * kRow + chunk_offset<HEAD_DIM>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int n = 0; n < COUNT; ++n) c[n] = {};
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step)
#pragma unroll
    for (int n = 0; n < COUNT; n += 2) {  // matrices: rows n (k low, k high), then n + 1
      uint32_t r[4];
      load_matrices(r, b + further<HEAD_DIM>(offset, step * 2) + n * 8 * kRow);
      mma_m16n8k16<TYPE>(c[n], a[step], FragmentB{{r[0], r[1]}});
      mma_m16n8k16<TYPE>(c[n + 1], a[step], FragmentB{{r[2], r[3]}});
    }
}

// c += a b for 16 rows of `b` from row `first`, a multiple of 16, on; `a` is rounded from two
// neighbours in C's form.
template <DType TYPE, int HEAD_DIM>
VK_DEVICE void multiply_step(FragmentC (&c)[HEAD_DIM / 8], const FragmentC& low,
                             const FragmentC& high, const char* b, int first) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int offset =
      first * 2 * HEAD_DIM + chunk_offset<HEAD_DIM>(lane / 8 % 2 * 8 + lane % 8, lane / 16);
  const FragmentA a = {{pack<TYPE>(low.v[0], low.v[1]), pack<TYPE>(low.v[2], low.v[3]),
                        pack<TYPE>(high.v[0], high.v[1]), pack<TYPE>(high.v[2], high.v[3])}};
#pragma unroll
  for (int n = 0; n < HEAD_DIM / 8; n += 2) {  // matrices: chunk n (rows low, high), then n + 1
    uint32_t r[4];
    load_matrices_transposed(r, b + further<HEAD_DIM>(offset, n));
    mma_m16n8k16<TYPE>(c[n], a, FragmentB{{r[0], r[1]}});
    mma_m16n8k16<TYPE>(c[n + 1], a, FragmentB{{r[2], r[3]}});
  }
}

VK_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
VK_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// ---- Scores in units of log2

enum class Masks { kNone, kAny };  // kAny: a bias, a padding mask, or both

// Calls f(fragment, element, rows on, columns on) for the thread's elements inside the matrix. row,
// column: of its first element.
template <int COUNT, class F>
VK_DEVICE void for_each_score(int rows, int columns, int row, int column, const F& f) {
#pragma unroll
  for (int n = 0; n < COUNT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row + i / 2 * 8 < rows && column + n * 8 + i % 2 < columns)
        f(n, i, i / 2 * 8, n * 8 + i % 2);
}

// Adds the bias; -inf where a mask says so. Rows are queries, or keys.
template <bool BY_KEY, int COUNT>
VK_DEVICE void apply_masks(FragmentC (&s)[COUNT], const Args& a, const Head& head, int row,
                           int column) {
  const int rows = BY_KEY ? a.Nk : a.Nq, columns = BY_KEY ? a.Nq : a.Nk;
  const int64_t row_step = BY_KEY ? a.bias.column : a.bias.row;
  const int64_t column_step = BY_KEY ? a.bias.row : a.bias.column;
  const int64_t first =
      head.b * a.bias.batch + head.h * a.bias.head + row * row_step + column * column_step;
  if (a.bias.data != nullptr && a.bias.dtype == DType::kBool) {
    const auto* bias = static_cast<const uint8_t*>(a.bias.data) + first;
    for_each_score<COUNT>(rows, columns, row, column, [&](int n, int i, int r, int c) {
      if (bias[r * row_step + c * column_step] == 0) s[n].v[i] = -INFINITY;
    });
  } else if (a.bias.data != nullptr && is_wide(a.bias.dtype)) {
    const auto* bias = static_cast<const float*>(a.bias.data) + first;
    for_each_score<COUNT>(rows, columns, row, column, [&](int n, int i, int r, int c) {
      s[n].v[i] = fmaf(bias[r * row_step + c * column_step], kLog2e, s[n].v[i]);
    });
  } else if (a.bias.data != nullptr) {
    const auto* bias = static_cast<const uint16_t*>(a.bias.data) + first;
    const bool brain = a.bias.dtype == DType::kBF16;
    for_each_score<COUNT>(rows, columns, row, column, [&](int n, int i, int r, int c) {
      const uint32_t bits = bias[r * row_step + c * column_step];
      const float value = brain ? bits_to_float(bits << 16) : unpack_f16_low(bits);
      s[n].v[i] = fmaf(value, kLog2e, s[n].v[i]);
    });
  }
  if (a.padding == nullptr) return;
  const uint8_t* padding =
      a.padding + head.b * a.padding_batch + (BY_KEY ? row : column) * a.padding_column;
  for_each_score<COUNT>(rows, columns, row, column, [&](int n, int i, int r, int c) {
    if (padding[(BY_KEY ? r : c) * a.padding_column] != 0) s[n].v[i] = -INFINITY;
  });
}

// From products to scores: times scale, with bias and masks; -inf for keys beyond the last where
// they are columns. row, column: of the thread's first element.
template <Masks MASKS, bool BY_KEY, int COUNT>
VK_DEVICE void finish_scores(FragmentC (&s)[COUNT], const Args& a, const Head& head, int row,
                             int column) {
  const float by = a.scale * kLog2e;
#pragma unroll
  for (int n = 0; n < COUNT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n].v[i] *= by;
  if constexpr (MASKS == Masks::kAny) apply_masks<BY_KEY, COUNT>(s, a, head, row, column);
  if constexpr (!BY_KEY) {
    if (column / kTile * kTile + COUNT * 8 <= a.Nk) return;
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column + n * 8 + i % 2 >= a.Nk) s[n].v[i] = -INFINITY;
  }
}

// ---- Host: what either direction refuses, and the instance of a head dim

inline bool on_lines(const Args& a, const HeadView& view, int N) {
  const auto fits = [](int size, int64_t stride) { return size == 1 || stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && fits(a.B, view.batch) &&
         fits(N, view.row) && fits(a.H, view.head);
}

// Of the path. Blocks are counted by the smallest of any kernel: 32 queries, 64 keys.
inline Refusal refuses(const Args& a) {
  if (a.dtype == DType::kF32) return "it takes bf16 and fp16";
  if (a.D % 8 != 0 || a.D > kMaxHeadDim) return "it takes head dims to 128, multiples of 8";
  const int64_t blocks = std::max((int64_t{a.Nq} + 63) / 32, (int64_t{a.Nk} + 63) / 64);
  if (static_cast<int64_t>(a.B) * a.H > INT32_MAX / blocks) return "it takes below 2^31 blocks";
  if (!on_lines(a, a.q, a.Nq) || !on_lines(a, a.k, a.Nk) || !on_lines(a, a.v, a.Nk))
    return "rows of q, k and v must begin on 16-byte lines";
  return "";
}

// Whether attention_sm80.cu and _sm80_backward.cu can serve a call, where shared memory allows; the
// kernels of attention_sm80_long*.cu serve any.
inline bool is_short(const Args& a) {
  return a.Nq <= kMaxRows && a.Nk <= kMaxRows && a.dropout.seed == nullptr && a.dbias == nullptr;
}

inline bool has_masks(const Args& a) { return a.bias.data != nullptr || a.padding != nullptr; }

// f of D rounded up to 16, as a constant.
template <class F>
void with_head_dim(int D, const F& f) {
  switch (tiles(D)) {
    case 1:
      return f(std::integral_constant<int, 16>());
    case 2:
      return f(std::integral_constant<int, 32>());
    case 3:
      return f(std::integral_constant<int, 48>());
    case 4:
      return f(std::integral_constant<int, 64>());
    case 5:
      return f(std::integral_constant<int, 80>());
    case 6:
      return f(std::integral_constant<int, 96>());
    case 7:
      return f(std::integral_constant<int, 112>());
    default:
      return f(std::integral_constant<int, 128>());
  }
}

}  // namespace vitkernels::attention::sm80
