// Tiles of attention in plain fp32 (attention_simt.cu): products of rows in global memory, scores,
// and what a query row must know for its gradient.
//
// A block of 16 x 16 threads has a tile of 64 x 64; thread (y, x) has rows 4 y..4 y + 3 and columns
// 4 x..4 x + 3. Operands pass through one staging buffer of 17 KB as fp32, 32 columns of both
// factors at a time (transposed), or 64 rows x 64 columns of one (as they lie). Every element is
// loaded by itself, so strides and alignment do not matter.
#pragma once

#include <cmath>

#include "attention/attention_cuda.h"
#include "attention/attention_plan_simt.h"

namespace vitkernels::attention {
namespace {

using simt::kThreads;
using simt::kTile;

constexpr int kDepth = 32;         // columns of q, k, v, dout in one step of a product
constexpr int kPitch = kTile + 4;  // floats; 16-byte accesses, few bank conflicts
constexpr int kLanesOfRow = 16;    // threads that share the rows of a tile: half a warp
constexpr float kInf = INFINITY;

VK_DEVICE int thread_y() { return static_cast<int>(threadIdx.x) / kLanesOfRow; }
VK_DEVICE int thread_x() { return static_cast<int>(threadIdx.x) % kLanesOfRow; }

VK_DEVICE float4 read_4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Up to 64 rows of one head.
struct Matrix {
  const void* data;
  int64_t stride;  // in elements
  int rows;
};

struct Head {
  int b, h;
  int64_t index;    // b * H + h
  int64_t bias;     // offset of the head's bias
  int64_t padding;  // offset of the batch item's mask
};

VK_DEVICE Head head_of(const Args& a, int b, int h) {
  return {b, h, static_cast<int64_t>(b) * a.H + h, b * a.bias.batch + h * a.bias.head,
          b * a.padding_batch};
}

VK_DEVICE Head head_of(const Args& a, int64_t index) {
  const int b = static_cast<int>(divide(index, a.H));
  return head_of(a, b, static_cast<int>(index - static_cast<int64_t>(b) * a.H));
}

VK_DEVICE int rows_in_tile(int first, int N) { return N - first < kTile ? N - first : kTile; }

VK_DEVICE Matrix rows_of(const Args& a, const HeadView& view, const Head& head, int first, int N) {
  const int64_t offset = head.b * view.batch + head.h * view.head + first * view.row;
  return {element(static_cast<const void*>(view.data), offset, a.dtype), view.row,
          rows_in_tile(first, N)};
}

// ---- Products

constexpr int kStagedOfThread = kTile * kDepth / kThreads;

// The row and column of a thread's n-th element of 64 x 32. A warp takes 4 rows x 8 columns: whole
// sectors of fp32 in global memory, and no bank twice where they are stored transposed.
VK_DEVICE void staged_place(int n, int* row, int* column) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int group = thread / kWarp * kStagedOfThread + n;
  *row = group / (kDepth / 8) * 4 + lane / 8;
  *column = group % (kDepth / 8) * 8 + lane % 8;
}

// Zeros outside the matrix.
VK_DEVICE void load_staged(const Matrix& m, DType dtype, int first, int D,
                           float (&values)[kStagedOfThread]) {
#pragma unroll
  for (int n = 0; n < kStagedOfThread; ++n) {
    int row, column;
    staged_place(n, &row, &column);
    const bool inside = row < m.rows && first + column < D;
    values[n] = inside ? load_scalar(m.data, dtype, row * m.stride + first + column) : 0.0f;
  }
}

VK_DEVICE void store_staged(const float (&values)[kStagedOfThread], float* staged) {
#pragma unroll
  for (int n = 0; n < kStagedOfThread; ++n) {
    int row, column;
    staged_place(n, &row, &column);
    staged[column * kPitch + row] = values[n];
  }
}

// out = a b^T. Every element is summed in the order of D, so it has the same bits whatever tile it
// is in, and with a and b exchanged. `staged` is 64 x kPitch floats; the barrier before the first
// store lets the block leave what it did with `staged` before.
VK_DEVICE void multiply_rows(const Matrix& a, const Matrix& b, DType dtype, int D, float* staged,
                             float (&out)[4][4]) {
  float* const staged_b = staged + kDepth * kPitch;
  const int y = thread_y() * 4, x = thread_x() * 4;
  const bool inside = y < a.rows && x < b.rows;
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c) out[r][c] = 0.0f;
  for (int first = 0; first < D; first += kDepth) {
    float values_a[kStagedOfThread], values_b[kStagedOfThread];
    load_staged(a, dtype, first, D, values_a);
    load_staged(b, dtype, first, D, values_b);
    __syncthreads();
    store_staged(values_a, staged);
    store_staged(values_b, staged_b);
    __syncthreads();
    if (!inside) continue;
    const int depth = D - first < kDepth ? D - first : kDepth;
#pragma unroll 4
    for (int d = 0; d < depth; ++d) {
      const float4 row = read_4(staged + d * kPitch + y),
                   column = read_4(staged_b + d * kPitch + x);
      const float rows[4] = {row.x, row.y, row.z, row.w};
      const float columns[4] = {column.x, column.y, column.z, column.w};
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) out[r][c] += rows[r] * columns[c];
    }
  }
}

// Column c of the thread's part of a tile, to be read by add_product.
VK_DEVICE void store_weights(float* weights, int c, float w0, float w1, float w2, float w3) {
  *reinterpret_cast<float4*>(weights + (thread_x() * 4 + c) * kPitch + thread_y() * 4) =
      make_float4(w0, w1, w2, w3);
}

// sums += weights x, for x of D columns; weights lie as [column][row]. `rows`: how many rows count.
// The first barrier completes the weights as well.
template <int CHUNKS>
VK_DEVICE void add_product(const float* weights, const Matrix& x, DType dtype, int D, int rows,
                           float* staged, float (&sums)[CHUNKS][4][4]) {
  constexpr int kElements = kTile * kTile / kThreads;
  const int thread = static_cast<int>(threadIdx.x), ty = thread_y() * 4, tx = thread_x() * 4;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int first = chunk * kTile;
    if (first >= D) break;
    float values[kElements];
#pragma unroll
    for (int n = 0; n < kElements; ++n) {
      const int row = n * (kThreads / kTile) + thread / kTile, column = first + thread % kTile;
      const bool inside = row < x.rows && column < D;
      values[n] = inside ? load_scalar(x.data, dtype, row * x.stride + column) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kElements; ++n)
      staged[(n * (kThreads / kTile) + thread / kTile) * kPitch + thread % kTile] = values[n];
    __syncthreads();
    if (ty >= rows || first + tx >= D) continue;
#pragma unroll 4
    for (int j = 0; j < x.rows; ++j) {
      const float4 w = read_4(weights + j * kPitch + ty), v = read_4(staged + j * kPitch + tx);
      const float weight[4] = {w.x, w.y, w.z, w.w}, value[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[chunk][r][c] += weight[r] * value[c];
    }
  }
}

template <int CHUNKS>
VK_DEVICE void clear(float (&sums)[CHUNKS][4][4]) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[chunk][r][c] = 0.0f;
}

// Stores the thread's part of row `row` (r of its four) times factor, rounded.
template <int CHUNKS>
VK_DEVICE void store_row(const Args& a, const HeadView& view, const Head& head, int row,
                         const float (&sums)[CHUNKS][4][4], int r, float factor) {
  const int64_t offset = head.b * view.batch + head.h * view.head + row * view.row;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = chunk * kTile + thread_x() * 4 + c;
      if (column < a.D)
        store_scalar(view.data, a.dtype, offset + column, sums[chunk][r][c] * factor);
    }
}

// ---- Scores and their gradients

// From the product of query i and key j.
VK_DEVICE float score(const Args& a, const Head& head, int i, int j, float product) {
  float s = a.scale * product;
  if (a.bias.data != nullptr) {
    const int64_t at = head.bias + i * a.bias.row + j * a.bias.column;
    if (a.bias.dtype == DType::kBool) {
      if (static_cast<const uint8_t*>(a.bias.data)[at] == 0) s = -kInf;
    } else {
      s = fmaf(a.scale, product, load_scalar(a.bias.data, a.bias.dtype, at));
    }
  }
  if (a.padding != nullptr && a.padding[head.padding + j * a.padding_column] != 0) s = -kInf;
  return s;
}

// What dropout multiplies the probability of (i, j) by.
VK_DEVICE float dropout_factor(const Args& a, const Head& head, uint64_t seed, int i, int j) {
  if (a.dropout.seed == nullptr) return 1.0f;
  const uint64_t index = static_cast<uint64_t>((head.index * a.Nq + i) * a.Nk + j);
  return keeps(a.dropout, seed, index) ? a.dropout.scale : 0.0f;
}

VK_DEVICE uint64_t dropout_seed(const Args& a) {
  return a.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*a.dropout.seed);
}

// A query row in the backward. P = exp(s - lse) * inverse, where inverse makes the row sum to 1:
// the rounding of lse cancels. delta = rowsum(P dP) in two floats, so that what dS sums to over a
// row is the rounding of its terms and not that of delta.
struct QueryRow {
  float lse, inverse, delta, delta_low;
};

VK_DEVICE float finite_lse(float lse) { return lse == -kInf ? 0.0f : lse; }

// `stats`: three arrays (B, H, Nq) that row_sums_kernel fills.
VK_DEVICE QueryRow query_row(const Args& a, const float* stats, const Head& head, int i) {
  if (i >= a.Nq) return {0.0f, 0.0f, 0.0f, 0.0f};
  const int64_t size = static_cast<int64_t>(a.B) * a.H * a.Nq, at = head.index * a.Nq + i;
  return {finite_lse(a.lse[at]), stats[at], stats[size + at], stats[2 * size + at]};
}

// dP is that of the probability before dropout. A masked key gets no gradient, whatever dP holds.
VK_DEVICE float score_gradient(const QueryRow& row, float s, float dp) {
  if (s == -kInf) return 0.0f;
  const float p = expf(s - row.lse) * row.inverse;
  return p * ((dp - row.delta) - row.delta_low);
}

}  // namespace
}  // namespace vitkernels::attention
