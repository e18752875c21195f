// Backward of attention on sm_80 tensor cores for any number of queries and keys: what
// attention_sm80_long.cu serves. The gradient of a bias: attention_sm80_long_dbias.cu.
//
//   row_sums_kernel          lse in units of log2 and delta = rowsum(dout out) of each query
//   gradient_kernel<query>   dq; a block has rows of queries
//   gradient_kernel<key>     dk, dv; a block has rows of keys
//
// A block keeps its rows, and the columns go through it in tiles, by asynchronous copies a tile
// ahead, in steps of 16 columns:
//
//   pass        rows     columns    of a step: S, dP            sums
//   by query    q, dout  k, v       q k^T, dout v^T             dq += dS k
//   by key      k, v     q, dout    k q^T, v dout^T             dk += dS q, dv += P dout
//
// P = 2^(S - lse), dS = P (dP - delta) in fp32, rounded to 16 bits as the A operand of the sums
// where it is. P and dS never leave registers, no two warps add to one element, nothing is added
// with atomics: seven products instead of five, and every bit of the gradients is the shape's.
//
// Grid: B * H * ceil(N / rows) blocks of 4 warps, two on a multiprocessor; rows are 128 (two tiles
// a warp, which share what is read of the columns) by query to head dim 80 and by key to 64, else
// 64. Shared memory 40 to 65 KB. 14 B H Nq Nk D FLOP, for B 64, H 12, N 577, D 64: 229 GFLOP, 0.73
// ms at the 312 TF/s of an A100, of which five sevenths count. Least traffic (q, k, v, out, dout
// in, dq, dk, dv out): 454 MB, 0.29 ms. Reads of shared memory take 50% (by query) and 75% (by key)
// of the products' cycles where a warp has two tiles, 100% to 125% where it has one.
#include "attention/attention_sm80_long.cuh"

namespace vitkernels::attention {
namespace {

using namespace sm80_long;

template <DType TYPE>
VK_DEVICE float dot_8(const uint4& x, const uint4& y) {
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 p = unpack<TYPE>(xs[i]), q = unpack<TYPE>(ys[i]);
    sum = fmaf(p.x, q.x, fmaf(p.y, q.y, sum));
  }
  return sum;
}

// Four threads a row. Rows from Nq on get (0, 0).
template <DType TYPE>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(Args a, float2* row_sums, int blocks) {
  check_launch_bounds<kThreads>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 4;
  const unsigned index = blockIdx.x / static_cast<unsigned>(blocks);
  const int row = static_cast<int>(blockIdx.x - index * blocks) * kSumRows + thread / 4;
  const Head head = sm80::head_of(a, index);
  const Rows dout = sm80::rows_of(a.dout, head, a.Nq), out = sm80::rows_of(a.out, head, a.Nq);
  float sum = 0.0f;
  if (row < a.Nq)
    for (int chunk = lane; chunk < a.D / 8; chunk += 4)
      sum += dot_8<TYPE>(load_streaming_16(dout.data + row * dout.stride + chunk * 8),
                         load_streaming_16(out.data + row * out.stride + chunk * 8));
  sum = sm80::quad_sum(sum);
  if (lane != 0) return;
  const float lse = row < a.Nq ? a.lse[static_cast<int64_t>(index) * a.Nq + row] : 0.0f;
  row_sums[index * padded_sums(a.Nq) + row] =
      make_float2(lse == -INFINITY ? 0.0f : lse * kLog2e, sum);
}

template <DType TYPE, int HEAD_DIM, Masks MASKS, bool BY_KEY>
__global__ void __launch_bounds__(kThreads, kResident)
    gradient_kernel(Args a, const float2* row_sums, int blocks) {
  check_launch_bounds<kThreads>();
  VK_DYNAMIC_SHARED(char, shared);
  constexpr int kM = row_tiles(HEAD_DIM, BY_KEY), kRows = backward_rows(HEAD_DIM, BY_KEY);
  constexpr int kColumns = backward_columns(HEAD_DIM), kTileBytes = kColumns * 2 * HEAD_DIM;
  constexpr int kStage = 2 * kTileBytes + (BY_KEY ? 8 * kColumns : 0);
  constexpr bool kKeepFirst = keeps_first(HEAD_DIM, BY_KEY, MASKS == Masks::kAny);
  constexpr bool kKeepSecond = keeps_second(HEAD_DIM, BY_KEY, MASKS == Masks::kAny);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const unsigned index = blockIdx.x / static_cast<unsigned>(blocks);
  const int block_row = static_cast<int>(blockIdx.x - index * blocks) * kRows;
  const int N = BY_KEY ? a.Nk : a.Nq, columns = BY_KEY ? a.Nq : a.Nk;
  const int warp_row = block_row + warp * kM * kTile, row = warp_row + lane / 4;
  const bool works = warp_row < N;
  const Head head = sm80::head_of(a, index);
  const uint64_t seed = MASKS == Masks::kAny ? dropout_seed(a) : 0;
  row_sums += index * padded_sums(a.Nq);
  char* const second_rows = shared + kRows * 2 * HEAD_DIM;
  char* const stages = second_rows + kRows * 2 * HEAD_DIM;

  const auto begin_columns = [&](int first, char* stage) {
    begin_tile<HEAD_DIM, kColumns>(stage, sm80::rows_of(BY_KEY ? a.q : a.k, head, columns), first,
                                   a.D);
    begin_tile<HEAD_DIM, kColumns>(stage + kTileBytes,
                                   sm80::rows_of(BY_KEY ? a.dout : a.v, head, columns), first, a.D);
    if (BY_KEY && thread < kColumns / 2)
      copy_async<16>(stage + 2 * kTileBytes + thread * 16, row_sums + first + 2 * thread);
    commit_copies();
  };
  begin_tile<HEAD_DIM, kRows>(shared, sm80::rows_of(BY_KEY ? a.k : a.q, head, N), block_row, a.D);
  begin_tile<HEAD_DIM, kRows>(second_rows, sm80::rows_of(BY_KEY ? a.v : a.dout, head, N), block_row,
                              a.D);
  begin_columns(0, stages);

  RowOperand<HEAD_DIM, kM, kKeepFirst> rows_0;
  RowOperand<HEAD_DIM, kM, kKeepSecond> rows_1;
  rows_0.tile = shared + warp * kM * kTile * 2 * HEAD_DIM;
  rows_1.tile = second_rows + warp * kM * kTile * 2 * HEAD_DIM;
  float2 of_query[BY_KEY ? 1 : kM][4];
  if constexpr (!BY_KEY) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = row + m * kTile + half * 8;
        of_query[m][half] = query < a.Nq ? row_sums[query] : make_float2(0.0f, 0.0f);
      }
  }
  FragmentC sums_0[kM][HEAD_DIM / 8] = {}, sums_1[BY_KEY ? kM : 1][BY_KEY ? HEAD_DIM / 8 : 1] = {};
  int stage_at = 0;
#pragma unroll 1
  for (int first = 0; first < columns; first += kColumns) {
    char* const stage = stages + stage_at;
    wait_copies<0>();
    __syncthreads();  // the stage is there; nobody reads the other one
    stage_at = kStage - stage_at;
    if (first + kColumns < columns) begin_columns(first + kColumns, stages + stage_at);
    if (!works) continue;
    if (first == 0) rows_0.load(), rows_1.load();
    const int end = columns - first < kColumns ? columns - first : kColumns;
#pragma unroll 1
    for (int at = 0; at < end; at += kTile) {
      FragmentC s[kM][2], dp[kM][2];
      const int column = first + at + lane % 4 * 2;
      multiply_rows<TYPE, HEAD_DIM>(s, rows_0, stage, at);
      multiply_rows<TYPE, HEAD_DIM>(dp, rows_1, stage + kTileBytes, at);
      if constexpr (BY_KEY) {
        const char* const sums = stage + 2 * kTileBytes + (at + lane % 4 * 2) * 8;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float4 two = *reinterpret_cast<const float4*>(sums + n * 64);
          of_query[0][2 * n] = make_float2(two.x, two.y);
          of_query[0][2 * n + 1] = make_float2(two.z, two.w);
        }
      }
      differentiate<MASKS, BY_KEY>(s, dp, of_query, a, head, seed, row, column);
      FragmentA rounded[kM][1];
      if constexpr (BY_KEY) {
        round_rows<TYPE>(rounded, s);
        multiply_add<TYPE, HEAD_DIM>(sums_1, rounded, stage + kTileBytes, at);
      }
      round_rows<TYPE>(rounded, dp);
      multiply_add<TYPE, HEAD_DIM>(sums_0, rounded, stage, at);
    }
  }
  if (!works) return;
  const HeadView& to = BY_KEY ? a.dk : a.dq;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    if (to.data != nullptr)
      sm80::store_tile<TYPE, HEAD_DIM>(sums_0[m], {a.scale, a.scale}, sm80::rows_of(to, head, N),
                                       warp_row + m * kTile, a.D);
    if constexpr (BY_KEY) {
      if (a.dv.data != nullptr)
        sm80::store_tile<TYPE, HEAD_DIM>(sums_1[m], {1.0f, 1.0f}, sm80::rows_of(a.dv, head, N),
                                         warp_row + m * kTile, a.D);
    }
  }
}

template <DType TYPE, bool BY_KEY>
void launch(const Device& device, const Args& a, const float2* row_sums) {
  const bool options = has_options(a);
  with_instance(a.D, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    const int64_t blocks = blocks_of(BY_KEY ? a.Nk : a.Nq, backward_rows(kHeadDim, BY_KEY));
    device.launch(options ? gradient_kernel<TYPE, kHeadDim, Masks::kAny, BY_KEY>
                          : gradient_kernel<TYPE, kHeadDim, Masks::kNone, BY_KEY>,
                  dim3(grid_of(static_cast<int64_t>(a.B) * a.H * blocks)), dim3(kThreads),
                  static_cast<size_t>(backward_shared(kHeadDim, BY_KEY)), a, row_sums,
                  static_cast<int>(blocks));
  });
}

template <DType TYPE>
void launch_all(const Device& device, const Tensor& like, const Args& a) {
  const int64_t heads = static_cast<int64_t>(a.B) * a.H, rows = padded_sums(a.Nq);
  const Tensor scratch = empty_like_shape(like, {heads, rows, 2}, ScalarType::Float);
  auto* const row_sums = static_cast<float2*>(scratch.mutable_data_ptr());
  const int64_t blocks = rows / kSumRows;
  device.launch(row_sums_kernel<TYPE>, dim3(grid_of(heads * blocks)), dim3(kThreads), 0, a,
                row_sums, static_cast<int>(blocks));
  const float2* const sums = row_sums;
  if (a.dq.data != nullptr) launch<TYPE, false>(device, a, sums);
  if (a.dk.data != nullptr || a.dv.data != nullptr) launch<TYPE, true>(device, a, sums);
  if (a.dbias != nullptr) dbias_sm80_long(device, like, a, sums);
}

}  // namespace

void backward_sm80_long(const Device& device, const Tensor& like, const Args& args) {
  if (args.dtype == DType::kBF16)
    launch_all<DType::kBF16>(device, like, args);
  else
    launch_all<DType::kF16>(device, like, args);
}

}  // namespace vitkernels::attention
