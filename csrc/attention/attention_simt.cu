// attention in plain fp32 arithmetic on any GPU: every dtype, shape, stride and option. Tiles of
// 64 queries x 64 keys (attention_simt.cuh), 256 threads a block, 34 KB of shared memory.
//
//   forward_kernel     block = 64 queries of a head; online softmax over tiles of keys
//   row_sums_kernel    block = 64 queries of a head: 1 / sum of exp(s - lse), rowsum(P dP)
//   gradient_kernel    block = 64 rows of dq, dk or dv; walks over the tiles of the other side
//   dbias_kernel       block = a tile of dbias; adds dS over the dimensions bias is broadcast along
//   constant_dbias     for a bias that all keys of a row share: its gradient is 0
//
// The backward recomputes S and dP = dO V^T in each kernel; nothing of size Nq x Nk is stored, sums
// have a fixed order, and no two blocks write one element. Grids are one-dimensional.
#include "attention/attention_simt.cuh"

namespace vitkernels::attention {
namespace {

template <int CHUNKS>
__global__ void __launch_bounds__(kThreads) forward_kernel(Args a) {
  check_launch_bounds<kThreads>();
  VK_SHARED(float, staged, [kTile * kPitch]);
  VK_SHARED(float, weights, [kTile * kPitch]);
  const int blocks = (a.Nq + kTile - 1) / kTile, y = thread_y() * 4, x = thread_x() * 4;
  const int64_t items = static_cast<int64_t>(a.B) * a.H * blocks;
  const uint64_t seed = dropout_seed(a);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t index = divide(item, blocks);
    const Head head = head_of(a, index);
    const int i0 = static_cast<int>(item - index * blocks) * kTile;
    const Matrix q = rows_of(a, a.q, head, i0, a.Nq);
    float sums[CHUNKS][4][4], top[4], total[4];
    clear(sums);
#pragma unroll
    for (int r = 0; r < 4; ++r) top[r] = -kInf, total[r] = 0.0f;

    for (int j0 = 0; j0 < a.Nk; j0 += kTile) {
      const Matrix k = rows_of(a, a.k, head, j0, a.Nk), v = rows_of(a, a.v, head, j0, a.Nk);
      float s[4][4], largest[4];
      multiply_rows(q, k, a.dtype, a.D, staged, s);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        largest[r] = top[r];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const bool inside = y + r < q.rows && x + c < k.rows;
          s[r][c] = inside ? score(a, head, i0 + y + r, j0 + x + c, s[r][c]) : -kInf;
          largest[r] = fmaxf(largest[r], s[r][c]);  // of a number and a NaN: the number
        }
      }
#pragma unroll
      for (int offset = kLanesOfRow / 2; offset > 0; offset /= 2)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAllLanes, largest[r], offset));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float shrink = top[r] == largest[r] ? 1.0f : expf(top[r] - largest[r]);
        const float shift = finite_lse(largest[r]);
        top[r] = largest[r];
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          // Infinite scores share the row, so that lse is +inf; their output is NaN in the end.
          float p = s[r][c] == kInf ? 1.0f : expf(s[r][c] - shift);
          sum += p;
          if (a.dropout.seed != nullptr) p *= dropout_factor(a, head, seed, i0 + y + r, j0 + x + c);
          s[r][c] = p;
        }
        total[r] = total[r] * shrink + sum;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[chunk][r][c] *= shrink;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) store_weights(weights, c, s[0][c], s[1][c], s[2][c], s[3][c]);
      add_product(weights, v, a.dtype, a.D, q.rows, staged, sums);
    }

    sum_over_lanes(total, kLanesOfRow);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (y + r >= q.rows) continue;
      const int i = i0 + y + r;
      const float factor = top[r] == kInf ? NAN : total[r] == 0.0f ? 0.0f : 1.0f / total[r];
      store_row(a, a.out, head, i, sums, r, factor);
      if (x == 0)
        a.lse[head.index * a.Nq + i] =
            total[r] == 0.0f ? -kInf : finite_lse(top[r]) + logf(total[r]);
    }
  }
}

__global__ void __launch_bounds__(kThreads) row_sums_kernel(Args a, float* stats) {
  check_launch_bounds<kThreads>();
  VK_SHARED(float, staged, [kTile * kPitch]);
  const int blocks = (a.Nq + kTile - 1) / kTile, y = thread_y() * 4, x = thread_x() * 4;
  const int64_t size = static_cast<int64_t>(a.B) * a.H * a.Nq;
  const int64_t items = static_cast<int64_t>(a.B) * a.H * blocks;
  const uint64_t seed = dropout_seed(a);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t index = divide(item, blocks);
    const Head head = head_of(a, index);
    const int i0 = static_cast<int>(item - index * blocks) * kTile;
    const Matrix q = rows_of(a, a.q, head, i0, a.Nq), dout = rows_of(a, a.dout, head, i0, a.Nq);
    double total[4] = {}, dot[4] = {};
    for (int j0 = 0; j0 < a.Nk; j0 += kTile) {
      const Matrix k = rows_of(a, a.k, head, j0, a.Nk), v = rows_of(a, a.v, head, j0, a.Nk);
      float s[4][4], dp[4][4];
      multiply_rows(q, k, a.dtype, a.D, staged, s);
      multiply_rows(dout, v, a.dtype, a.D, staged, dp);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int i = i0 + y + r;
        if (y + r >= q.rows) continue;
        const float lse = finite_lse(a.lse[head.index * a.Nq + i]);
        float tile_total = 0.0f, tile_dot = 0.0f;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (x + c >= k.rows) continue;
          const int j = j0 + x + c;
          const float p = expf(score(a, head, i, j, s[r][c]) - lse);
          tile_total += p;
          tile_dot = fmaf(p, dp[r][c] * dropout_factor(a, head, seed, i, j), tile_dot);
        }
        total[r] += tile_total;
        dot[r] += tile_dot;
      }
    }
#pragma unroll
    for (int offset = kLanesOfRow / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        total[r] += __shfl_xor_sync(kAllLanes, total[r], offset);
        dot[r] += __shfl_xor_sync(kAllLanes, dot[r], offset);
      }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (x != 0 || y + r >= q.rows) continue;
      const int64_t at = head.index * a.Nq + i0 + y + r;
      // A fully masked row has total 0; one with lse = inf has NaN where its score is infinite and
      // 0 elsewhere, as exp(s - lse) has.
      const bool divides = total[r] != 0.0 && a.lse[at] != kInf;
      const double delta = divides ? dot[r] / total[r] : dot[r];
      const float high = static_cast<float>(delta);
      stats[at] = divides ? static_cast<float>(1.0 / total[r]) : total[r] == 0.0 ? 0.0f : 1.0f;
      stats[size + at] = high;
      stats[2 * size + at] = high - high == 0.0f ? static_cast<float>(delta - high) : 0.0f;
    }
  }
}

enum class Gradient { kQuery, kKey, kValue };

// dq = scale dS k; dk = scale dS^T q; dv = P^T dout, P after dropout.
template <int CHUNKS>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Args a, const float* stats, Gradient which) {
  check_launch_bounds<kThreads>();
  VK_SHARED(float, staged, [kTile * kPitch]);
  VK_SHARED(float, weights, [kTile * kPitch]);
  const bool by_query = which == Gradient::kQuery;
  const HeadView rows = by_query ? a.q : a.k, columns = by_query ? a.k : a.q;
  const HeadView row_values = by_query ? a.dout : a.v, column_values = by_query ? a.v : a.dout;
  const HeadView factors = which == Gradient::kValue ? a.dout : columns;
  const HeadView out = by_query ? a.dq : which == Gradient::kKey ? a.dk : a.dv;
  const int N = by_query ? a.Nq : a.Nk, M = by_query ? a.Nk : a.Nq;
  const int blocks = (N + kTile - 1) / kTile, y = thread_y() * 4, x = thread_x() * 4;
  const int64_t items = static_cast<int64_t>(a.B) * a.H * blocks;
  const uint64_t seed = dropout_seed(a);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t index = divide(item, blocks);
    const Head head = head_of(a, index);
    const int n0 = static_cast<int>(item - index * blocks) * kTile;
    const Matrix row = rows_of(a, rows, head, n0, N);
    float sums[CHUNKS][4][4];
    clear(sums);
    for (int m0 = 0; m0 < M; m0 += kTile) {
      const Matrix column = rows_of(a, columns, head, m0, M);
      float s[4][4], dp[4][4] = {};
      multiply_rows(row, column, a.dtype, a.D, staged, s);
      if (which != Gradient::kValue)
        multiply_rows(rows_of(a, row_values, head, n0, N), rows_of(a, column_values, head, m0, M),
                      a.dtype, a.D, staged, dp);
      QueryRow query[4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
        query[n] = query_row(a, stats, head, by_query ? n0 + y + n : m0 + x + n);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float weight = 0.0f;
          if (y + r < row.rows && x + c < column.rows) {
            const int i = by_query ? n0 + y + r : m0 + x + c;
            const int j = by_query ? m0 + x + c : n0 + y + r;
            QueryRow q = query[c];
            if (by_query) q = query[r];
            const float t = score(a, head, i, j, s[r][c]);
            const float kept = dropout_factor(a, head, seed, i, j);
            weight = which == Gradient::kValue ? expf(t - q.lse) * q.inverse * kept
                                               : score_gradient(q, t, dp[r][c] * kept);
          }
          s[r][c] = weight;
        }
        store_weights(weights, c, s[0][c], s[1][c], s[2][c], s[3][c]);
      }
      add_product(weights, rows_of(a, factors, head, m0, M), a.dtype, a.D, row.rows, staged, sums);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
      if (y + r < row.rows)
        store_row(a, out, head, n0 + y + r, sums, r, which == Gradient::kValue ? 1.0f : a.scale);
  }
}

// dbias_columns is Nk here. fp64 sums: their terms nearly cancel.
__global__ void __launch_bounds__(kThreads) dbias_kernel(Args a, const float* stats) {
  check_launch_bounds<kThreads>();
  VK_SHARED(float, staged, [kTile * kPitch]);
  VK_SHARED(double, column_sums, [kLanesOfRow][kTile]);
  const int column_blocks = (a.Nk + kTile - 1) / kTile;
  const int row_blocks = (a.dbias_rows + kTile - 1) / kTile;
  const int y = thread_y() * 4, x = thread_x() * 4, thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = static_cast<int64_t>(row_blocks) * column_blocks;
  const int64_t items = tiles * a.dbias_batch * a.dbias_heads;
  const uint64_t seed = dropout_seed(a);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t slice = divide(item, tiles), tile = item - slice * tiles;
    const int64_t row_block = divide(tile, column_blocks);
    const int j0 = static_cast<int>(tile - row_block * column_blocks) * kTile;
    const int first = static_cast<int>(row_block) * kTile;
    const int slice_b = static_cast<int>(divide(slice, a.dbias_heads));
    const int slice_h = static_cast<int>(slice - static_cast<int64_t>(slice_b) * a.dbias_heads);
    // The batch items, heads and queries that add to this tile.
    const int b_end = a.dbias_batch == 1 ? a.B : slice_b + 1;
    const int h_end = a.dbias_heads == 1 ? a.H : slice_h + 1;
    const int i_end = a.dbias_rows == 1 ? a.Nq : first + rows_in_tile(first, a.Nq);
    double sums[4][4] = {};
    for (int b = slice_b; b < b_end; ++b)
      for (int h = slice_h; h < h_end; ++h) {
        const Head head = head_of(a, b, h);
        for (int i0 = first; i0 < i_end; i0 += kTile) {
          const Matrix q = rows_of(a, a.q, head, i0, a.Nq), k = rows_of(a, a.k, head, j0, a.Nk);
          float s[4][4], dp[4][4];
          multiply_rows(q, k, a.dtype, a.D, staged, s);
          multiply_rows(rows_of(a, a.dout, head, i0, a.Nq), rows_of(a, a.v, head, j0, a.Nk),
                        a.dtype, a.D, staged, dp);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int i = i0 + y + r;
            if (y + r >= q.rows) continue;
            const QueryRow query = query_row(a, stats, head, i);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const int j = j0 + x + c;
              if (x + c >= k.rows) continue;
              sums[r][c] += score_gradient(query, score(a, head, i, j, s[r][c]),
                                           dp[r][c] * dropout_factor(a, head, seed, i, j));
            }
          }
        }
      }
    const int64_t out = slice * a.dbias_rows * a.dbias_columns + j0;
    if (a.dbias_rows == 1) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        column_sums[thread_y()][x + c] = sums[0][c] + sums[1][c] + sums[2][c] + sums[3][c];
      __syncthreads();
      if (thread < kTile && j0 + thread < a.Nk) {
        double sum = 0.0;
        for (int n = 0; n < kLanesOfRow; ++n) sum += column_sums[n][thread];
        store_scalar(a.dbias, a.bias.dtype, out + thread, static_cast<float>(sum));
      }
      continue;  // the next item's products have barriers before column_sums is written again
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (first + y + r < a.Nq && j0 + x + c < a.Nk)
          store_scalar(a.dbias, a.bias.dtype,
                       out + static_cast<int64_t>(first + y + r) * a.dbias_columns + x + c,
                       static_cast<float>(sums[r][c]));
  }
}

// dbias_columns is 1 here. Softmax does not see a term that all keys share: dS of a row sums to 0,
// unless the row has a NaN. A block has one element of dbias. delta: of query i of head h at h *
// head_stride + i * row_stride.
__global__ void __launch_bounds__(kThreads)
    constant_dbias_kernel(Args a, const float* delta, int64_t head_stride, int row_stride) {
  check_launch_bounds<kThreads>();
  const int64_t items = static_cast<int64_t>(a.dbias_batch) * a.dbias_heads * a.dbias_rows;
  const int batches = a.dbias_batch == 1 ? a.B : 1, heads = a.dbias_heads == 1 ? a.H : 1;
  const int rows = a.dbias_rows == 1 ? a.Nq : 1;
  const int64_t members = static_cast<int64_t>(batches) * heads * rows;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t slice = divide(item, a.dbias_rows), slice_b = divide(slice, a.dbias_heads);
    const int64_t slice_row = item - slice * a.dbias_rows;
    const int64_t slice_head = slice - slice_b * a.dbias_heads;
    bool spoilt = false;
    for (int64_t member = threadIdx.x; member < members; member += kThreads) {
      const int64_t head_member = divide(member, rows), b_member = divide(head_member, heads);
      const int64_t b = slice_b + b_member, h = slice_head + head_member - b_member * heads;
      const int64_t head = b * a.H + h, i = slice_row + member - head_member * rows;
      const float of_row = delta[head * head_stride + i * row_stride];
      spoilt = spoilt || (a.lse[head * a.Nq + i] != -kInf && of_row - of_row != 0.0f);
    }
    const bool any = __syncthreads_or(spoilt) != 0;
    if (threadIdx.x == 0) store_scalar(a.dbias, a.bias.dtype, item, any ? NAN : 0.0f);
  }
}

}  // namespace

void forward_simt(const Device& device, const Tensor&, const Args& a) {
  const unsigned grid = simt::grid(static_cast<int64_t>(a.B) * a.H * simt::tiles(a.Nq));
  const int chunks = simt::column_chunks(a.D);
  device.launch(chunks == 1   ? forward_kernel<1>
                : chunks == 2 ? forward_kernel<2>
                              : forward_kernel<4>,
                dim3(grid), dim3(kThreads), 0, a);
}

void backward_simt(const Device& device, const Tensor& like, const Args& a) {
  const int64_t heads = static_cast<int64_t>(a.B) * a.H;
  const unsigned query_grid = simt::grid(heads * simt::tiles(a.Nq));
  const unsigned key_grid = simt::grid(heads * simt::tiles(a.Nk));
  const Tensor scratch = empty_like_shape(like, {3, heads, a.Nq}, ScalarType::Float);
  float* stats = static_cast<float*>(scratch.mutable_data_ptr());
  device.launch(row_sums_kernel, dim3(query_grid), dim3(kThreads), 0, a, stats);
  const int chunks = simt::column_chunks(a.D);
  const auto gradient = chunks == 1   ? gradient_kernel<1>
                        : chunks == 2 ? gradient_kernel<2>
                                      : gradient_kernel<4>;
  const auto run = [&](const HeadView& out, unsigned grid, Gradient which) {
    if (out.data != nullptr)
      device.launch(gradient, dim3(grid), dim3(kThreads), 0, a, static_cast<const float*>(stats),
                    which);
  };
  run(a.dq, query_grid, Gradient::kQuery);
  run(a.dk, key_grid, Gradient::kKey);
  run(a.dv, key_grid, Gradient::kValue);
  if (a.dbias == nullptr) return;
  const int64_t slices = static_cast<int64_t>(a.dbias_batch) * a.dbias_heads;
  if (a.dbias_columns == 1)
    constant_dbias_simt(device, a, stats + heads * a.Nq, a.Nq, 1);
  else
    device.launch(dbias_kernel,
                  dim3(simt::grid(slices * simt::tiles(a.dbias_rows) * simt::tiles(a.Nk))),
                  dim3(kThreads), 0, a, static_cast<const float*>(stats));
}

void constant_dbias_simt(const Device& device, const Args& a, const float* delta,
                         int64_t head_stride, int row_stride) {
  const int64_t items = static_cast<int64_t>(a.dbias_batch) * a.dbias_heads * a.dbias_rows;
  device.launch(constant_dbias_kernel, dim3(simt::grid(items)), dim3(kThreads), 0, a, delta,
                head_stride, row_stride);
}

}  // namespace vitkernels::attention
