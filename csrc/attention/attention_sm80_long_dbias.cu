// Gradient of a float bias on sm_80 tensor cores, for any number of queries and keys and any
// broadcast shape: the third pass of attention_sm80_long_backward.cu's backward.
//
//   dbias_kernel    dS added over the batch items, heads and queries that share an element
//   finish_kernel   adds the partial sums of an element that several blocks share, in order
//
// A block has 64 x 64 elements of dbias (64 of them where all queries share a row) in registers,
// and takes its members (batch item, head and 64 queries) one after another: q, dout, k, v to
// shared memory, S and dP in steps of 16 keys, dS = P (dP - delta) in fp32. Computing S and dP
// again costs 4 D FLOP an element of dS; sums in memory, added to by the pass by query, would cost
// 8 bytes an element, which at head dim 64 and an A100's 312 TF/s and 1.56 TB/s is six times as
// long.
//
// Where there are few elements, their members are split among blocks, about 512 in all: at most 8
// MB of partial sums, whatever the shapes. Order and number of the additions are the shape's alone;
// no atomics. A bias that all keys of a row share has the gradient 0 (constant_dbias_simt).
//
// Grid: tiles of dbias times blocks of a tile, of 4 warps, two and more on a multiprocessor. Shared
// memory 33 KB at head dim 64, 65 KB at 128. 4 B H Nq Nk D FLOP: 65 GFLOP for B 64, H 12, N 577, D
// 64, 0.21 ms at an A100's peak.
#include "attention/attention_sm80_long.cuh"

namespace vitkernels::attention {
namespace {

using namespace sm80_long;

constexpr int kSteps = kBiasTile / kTile;  // of 16 keys

// partial: (splits, elements of dbias), or null: one block a tile.
template <DType TYPE, int HEAD_DIM>
__global__ void __launch_bounds__(kThreads, kResident)
    dbias_kernel(Args a, const float2* row_sums, BiasPlan plan, float* partial) {
  check_launch_bounds<kThreads>();
  VK_DYNAMIC_SHARED(char, shared);
  constexpr int kTileBytes = kBiasTile * 2 * HEAD_DIM;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t split = divide(blockIdx.x, plan.tiles), tile = blockIdx.x - split * plan.tiles;
  const int64_t row_tile = divide(tile, plan.column_blocks);
  const int64_t slice = divide(row_tile, plan.row_blocks);
  const int first_key = static_cast<int>(tile - row_tile * plan.column_blocks) * kBiasTile;
  const int first_row = static_cast<int>(row_tile - slice * plan.row_blocks) * kBiasTile;
  const int slice_b = static_cast<int>(divide(slice, a.dbias_heads));
  const int slice_h = static_cast<int>(slice - static_cast<int64_t>(slice_b) * a.dbias_heads);
  const bool one_row = a.dbias_rows == 1;
  const int heads = a.dbias_heads == 1 ? a.H : 1;
  const int parts = one_row ? static_cast<int>(blocks_of(a.Nq, kBiasTile)) : 1;
  const uint64_t seed = dropout_seed(a);
  char *const q = shared, *const dout = q + kTileBytes, *const k = dout + kTileBytes;
  char* const v = k + kTileBytes;

  FragmentC sums[1][2 * kSteps] = {};
  const int64_t begin = split * plan.share;
  const int64_t end = begin + plan.share < plan.members ? begin + plan.share : plan.members;
#pragma unroll 1
  for (int64_t member = begin; member < end; ++member) {
    const int64_t of_head = divide(member, parts), of_item = divide(of_head, heads);
    const Head head = {slice_b + static_cast<int>(of_item),
                       slice_h + static_cast<int>(of_head - of_item * heads)};
    const int first = one_row ? static_cast<int>(member - of_head * parts) * kBiasTile : first_row;
    __syncthreads();  // nobody reads the tiles of the member before
    begin_tile<HEAD_DIM, kBiasTile>(q, sm80::rows_of(a.q, head, a.Nq), first, a.D);
    begin_tile<HEAD_DIM, kBiasTile>(dout, sm80::rows_of(a.dout, head, a.Nq), first, a.D);
    begin_tile<HEAD_DIM, kBiasTile>(k, sm80::rows_of(a.k, head, a.Nk), first_key, a.D);
    begin_tile<HEAD_DIM, kBiasTile>(v, sm80::rows_of(a.v, head, a.Nk), first_key, a.D);
    commit_copies();
    const int row = first + warp * kTile + lane / 4;
    const float2* const sums_of_head =
        row_sums + (static_cast<int64_t>(head.b) * a.H + head.h) * padded_sums(a.Nq);
    float2 of_query[1][4] = {{sums_of_head[row], sums_of_head[row + 8]}};
    wait_copies<0>();
    __syncthreads();  // the tiles are there
    if (first + warp * kTile >= a.Nq) continue;
    RowOperand<HEAD_DIM, 1, true> rows_0, rows_1;
    rows_0.tile = q + warp * kTile * 2 * HEAD_DIM;
    rows_1.tile = dout + warp * kTile * 2 * HEAD_DIM;
    rows_0.load(), rows_1.load();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = first_key + step * kTile + lane % 4 * 2;
      if (first_key + step * kTile >= a.Nk) continue;
      FragmentC s[1][2], ds[1][2];
      multiply_rows<TYPE, HEAD_DIM>(s, rows_0, k, step * kTile);
      multiply_rows<TYPE, HEAD_DIM>(ds, rows_1, v, step * kTile);
      differentiate<Masks::kAny, false>(s, ds, of_query, a, head, seed, row, column);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[0][2 * step + n].v[i] += ds[0][n].v[i];
    }
  }

  const int64_t size =
      static_cast<int64_t>(a.dbias_batch) * a.dbias_heads * a.dbias_rows * a.dbias_columns;
  const int64_t out = slice * a.dbias_rows * a.dbias_columns;
  const auto put = [&](int64_t at, float value) {
    if (partial == nullptr)
      store_scalar(a.dbias, a.bias.dtype, out + at, value);
    else
      partial[split * size + out + at] = value;
  };
  if (!one_row) {
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + warp * kTile + lane / 4 + i / 2 * 8;
        const int column = first_key + n * 8 + lane % 4 * 2 + i % 2;
        if (row < a.Nq && column < a.Nk)
          put(static_cast<int64_t>(row) * a.dbias_columns + column, sums[0][n].v[i]);
      }
    return;
  }
  // Sums over the tile's rows: of a warp by shuffles, then over the warps.
  float* const column_sums = reinterpret_cast<float*>(shared + 4 * kTileBytes);
#pragma unroll
  for (int n = 0; n < 2 * kSteps; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = sums[0][n].v[i] + sums[0][n].v[i + 2];
#pragma unroll
      for (int lanes = 4; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      if (lane < 4) column_sums[warp * kBiasTile + n * 8 + lane * 2 + i] = sum;
    }
  __syncthreads();
  if (thread >= kBiasTile || first_key + thread >= a.Nk) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += column_sums[w * kBiasTile + thread];
  put(first_key + thread, sum);
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(Args a, const float* partial, int64_t size, int64_t splits) {
  check_launch_bounds<kThreads>();
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < size;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    float sum = 0.0f;
    for (int64_t split = 0; split < splits; ++split) sum += partial[split * size + at];
    store_scalar(a.dbias, a.bias.dtype, at, sum);
  }
}

template <DType TYPE>
void launch(const Device& device, const Args& a, const float2* row_sums, const BiasPlan& p,
            float* partial) {
  with_instance(a.D, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    device.launch(dbias_kernel<TYPE, kHeadDim>, dim3(grid_of(p.tiles * p.splits)), dim3(kThreads),
                  static_cast<size_t>(bias_shared(kHeadDim)), a, row_sums, p, partial);
  });
}

}  // namespace

namespace sm80_long {

void dbias_sm80_long(const Device& device, const Tensor& like, const Args& a,
                     const float2* row_sums) {
  if (a.dbias_columns == 1)
    return constant_dbias_simt(device, a, &row_sums->y, 2 * padded_sums(a.Nq), 2);
  const BiasPlan p = bias_plan(a.B, a.H, a.Nq, a.Nk, a.dbias_batch, a.dbias_heads, a.dbias_rows);
  OptTensor scratch;
  float* partial = nullptr;
  if (p.partial_floats > 0) {
    scratch = empty_like_shape(like, {p.partial_floats}, ScalarType::Float);
    partial = static_cast<float*>(scratch->mutable_data_ptr());
  }
  if (a.dtype == DType::kBF16)
    launch<DType::kBF16>(device, a, row_sums, p, partial);
  else
    launch<DType::kF16>(device, a, row_sums, p, partial);
  if (partial == nullptr) return;
  const int64_t size = p.partial_floats / p.splits;
  const unsigned blocks = grid_of(std::min<int64_t>(blocks_of(size, kThreads), kBiasBlocks));
  device.launch(finish_kernel, dim3(blocks), dim3(kThreads), 0, a,
                static_cast<const float*>(partial), size, p.splits);
}

}  // namespace sm80_long
}  // namespace vitkernels::attention
