// Backward of window_attention on sm_80 tensor cores: what window_attention_sm80.cu serves.
//
// A block has one head and goes through the windows of its group, the tiles of the next under way.
// Warp w owns query rows 16 w to 16 w + 15: S = Q K^T and dP = dO V^T in registers, P = 2^(S - lse)
// divided by its own sum, dS = P (dP - rowsum(P dP)) in fp32. P and dS go to shared memory in 16
// bits, where ldmatrix transposes them; then warp w owns key rows 16 w on of dV = P^T dO and
// dK = dS^T Q, and its query rows of dQ = dS K. Cosines: Q and K become unit vectors in place once
// S is there, and gradients of q and k pass through the normalisation on their way out.
//
// dbias: every thread adds its entries of dS over its windows; at the end they are summed into the
// block's column of the table, each row by one thread. finish_kernel adds the blocks' columns in
// order. Grid: heads * groups blocks of 128 threads; 65.3 KB of shared memory; two barriers a
// window, four with cosines. Launch settings: window_attention_plan_sm80.h.
#include "window_attention/window_attention_sm80.cuh"

namespace vitkernels::window_attention {
namespace {

using namespace sm80;

// P and dS in 16 bits are tiles of 64 rows of 64: like rows of D = 64.
constexpr int kScores = kTile;

// c += a^T b: rows `first` on of a^T, which are columns of the 16-bit scores `a`.
template <DType TYPE, int D>
VK_DEVICE void multiply_transposed(FragmentC (&c)[D / 8], char* a, int first, char* b) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    FragmentA fa;
    load_matrices_transposed(
        fa.r, chunk_at<kScores>(a, step * 16 + lane / 16 * 8 + lane % 8, first / 8 + lane / 8 % 2));
    multiply_step<TYPE, D>(c, fa, b, step);
  }
}

// The block's column of dbias_table from the sums of dS in shared memory: row by row, each by one
// thread, over the pairs of tokens in order.
VK_DEVICE void sum_pairs(float* column, const float* sums, const Args& a) {
  const int across = 2 * a.Ww - 1, rows = (2 * a.Wh - 1) * across;
  for (int t = static_cast<int>(threadIdx.x); t < rows; t += kThreads) {
    const int dy = t / across - (a.Wh - 1), dx = t % across - (a.Ww - 1);
    float sum = 0.0f;
    for (int y = max(dy, 0); y < a.Wh + min(dy, 0); ++y)
      for (int x = max(dx, 0); x < a.Ww + min(dx, 0); ++x)
        sum += sums[(y * a.Ww + x) * kTile + (y - dy) * a.Ww + x - dx];
    column[t] = sum;
  }
}

// partial: (groups, heads, rows of the table + 1), the last of a column for dlogit_scale.
template <DType TYPE, int D, bool COSINE>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    backward_kernel(Args a, int64_t groups, float* partial) {
  check_launch_bounds<kThreads>();
  VK_SWIZZLED_SHARED(char, tiles);
  constexpr int kStage = 4 * tile_bytes(D);
  char* const p_tile = tiles + 2 * kStage;
  char* const ds_tile = p_tile + kHalfScoreBytes;
  auto* bias = reinterpret_cast<float4*>(ds_tile + kHalfScoreBytes);
  auto* tokens = reinterpret_cast<int*>(ds_tile + kHalfScoreBytes + kScoreBytes);
  auto* inverse = reinterpret_cast<float*>(tokens + kTile);
  float* const lse_rows = inverse + 2 * kTile;  // twice
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int N = a.Wh * a.Ww, head = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.heads));
  const int64_t group = blockIdx.x / static_cast<unsigned>(a.heads);
  const int64_t windows = static_cast<int64_t>(a.B) * (a.H / a.Wh) * (a.W / a.Ww);
  const int64_t first = group * windows / groups, last = (group + 1) * windows / groups;
  const int64_t channel = static_cast<int64_t>(head) * D, width = static_cast<int64_t>(a.heads) * D;
  const int row = warp * 16 + lane / 4;  // and row + 8
  const bool has_rows = warp * 16 < N, inside[2] = {row < N, row + 8 < N};

  if (thread < N) tokens[thread] = packed_token(a, thread);
  clear_padding<D>(tiles, 8, N);
  for (int i = thread; i < 2 * kHalfScoreBytes / 16; i += kThreads)
    store_16(p_tile + 16 * i, make_uint4(0, 0, 0, 0));  // rows of warps that have none
  expand_bias(bias, a, head, N);
  const float factor = head_factor(a, head);
  const Seams all_seams = seams_of(a);
  WindowPlace place = place_of(a, first), next = place;
  const auto begin = [&](char* stage, float* lse, int64_t window) {
    begin_tiles<D, 3>(stage, a, a.qkv, channel, width, next, tokens, N);
    begin_tiles<D, 1>(stage + 3 * tile_bytes(D), a, a.dout, channel, 0, next, tokens, N);
    if (thread < N) copy_async<4>(lse + thread, a.lse + (window * a.heads + head) * N + thread);
    commit_copies();
  };
  FragmentC dbias[8] = {};
  float dlogit = 0.0f;
  __syncthreads();
  begin(tiles, lse_rows, first);

  for (int64_t window = first; window < last; ++window, place = next) {
    const int64_t odd = (window - first) & 1;
    char *const q = tiles + odd * kStage, *const k = q + tile_bytes(D),
                *const v = k + tile_bytes(D), *const dout = v + tile_bytes(D);
    wait_copies<0>();
    __syncthreads();  // this window's tiles are there, and nobody reads the other's, P or dS
    advance(a, next);
    if (window + 1 < last)
      begin(tiles + (1 - odd) * kStage, lse_rows + (1 - odd) * kTile, window + 1);
    if constexpr (COSINE) {
      inverse_lengths<TYPE, D>(inverse, q);
      __syncthreads();
    }
    uint32_t ds[16];  // as A of dQ: [step][register]
    if (has_rows) {
      FragmentC p[8] = {}, dp[8] = {};
      multiply_rows<TYPE, D>(p, q, warp * 16, k);
      finish_scores<COSINE>(p, factor * kLog2e, bias, inverse, seams_in(a, all_seams, place));
      multiply_rows<TYPE, D>(dp, dout, warp * 16, v);
      const float* lse = lse_rows + odd * kTile + row;
      differentiate(p, dp, {lse[0], lse[8]});
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = row + 8 * half;
          const uint32_t pair = rounded<TYPE>(dp[n], half, inside[half]);
          ds[2 * n + half] = pair;
          *reinterpret_cast<uint32_t*>(chunk_at<kScores>(ds_tile, at, n) + lane % 4 * 4) = pair;
          *reinterpret_cast<uint32_t*>(chunk_at<kScores>(p_tile, at, n) + lane % 4 * 4) =
              rounded<TYPE>(p[n], half, inside[half]);
          dbias[n].v[2 * half] += dp[n].v[2 * half];
          dbias[n].v[2 * half + 1] += dp[n].v[2 * half + 1];
        }
    }
    if (a.dqkv.data == nullptr && a.dlogit_scale == nullptr) continue;
    if constexpr (COSINE) {
      __syncthreads();
      make_unit<TYPE, D>(q, thread, inverse[thread]);  // of q and k
    }
    __syncthreads();  // P and dS are there, and v is free
    if (!has_rows) continue;
    {
      FragmentC dq[D / 8] = {};
#pragma unroll
      for (int step = 0; step < 4; ++step)
        multiply_step<TYPE, D>(
            dq, FragmentA{{ds[4 * step], ds[4 * step + 1], ds[4 * step + 2], ds[4 * step + 3]}}, k,
            step);
      if constexpr (COSINE) dlogit += through_unit<TYPE, D>(dq, q, inverse, row, inside);
      if (a.dqkv.data == nullptr) continue;
      store_rows<TYPE, D>(dq, {factor, factor}, v, a, a.dqkv, channel, place, tokens, N);
    }
    {
      FragmentC dk[D / 8] = {};
      multiply_transposed<TYPE, D>(dk, ds_tile, warp * 16, q);
      if constexpr (COSINE) through_unit<TYPE, D>(dk, k, inverse + kTile, row, inside);
      store_rows<TYPE, D>(dk, {factor, factor}, v, a, a.dqkv, channel + width, place, tokens, N);
    }
    FragmentC dv[D / 8] = {};
    multiply_transposed<TYPE, D>(dv, p_tile, warp * 16, dout);
    store_rows<TYPE, D>(dv, {1.0f, 1.0f}, v, a, a.dqkv, channel + 2 * width, place, tokens, N);
  }

  if (partial == nullptr) return;
  const int rows = (2 * a.Wh - 1) * (2 * a.Ww - 1);
  float* column = partial + (group * a.heads + head) * (rows + 1);
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(bias);
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[(warp * 16 + fragment_c_row(lane, i)) * kTile + n * 8 + fragment_c_column(lane, i)] =
          dbias[n].v[i];
  __syncthreads();
  sum_pairs(column, sums, a);
  if constexpr (COSINE) {
    float total[1] = {lane % 4 == 0 ? dlogit * factor : 0.0f};  // a quad has the same
    sum_over_block(total, reinterpret_cast<float*>(p_tile));
    if (thread == 0) column[rows] = total[0];
  }
}

// dbias_table and dlogit_scale: the blocks' partials in order, an element a thread.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Args a, int64_t groups, const float* partial) {
  check_launch_bounds<kThreads>();
  const int rows = (2 * a.Wh - 1) * (2 * a.Ww - 1);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t head = divide(at, rows + 1), row = at - head * (rows + 1);
  if (head >= a.heads) return;
  if (row < rows ? a.dbias_table == nullptr : a.dlogit_scale == nullptr) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t group = 0; group < groups; ++group)
    sum += partial[group * a.heads * (rows + 1) + at];
  if (row < rows) return store_scalar(a.dbias_table, a.bias_dtype, row * a.heads + head, sum);
  const float logit = load_scalar(a.logit_scale, a.logit_dtype, head * a.logit_step);
  store_scalar(a.dlogit_scale, a.logit_dtype, head, logit > kMaxLogitScale ? 0.0f : sum);
}

template <DType TYPE>
void launch(const Device& device, const Tensor& like, const Args& a) {
  const bool cosine = a.logit_scale != nullptr;
  const Plan p = plan(a.windows(), a.heads, a.D, device.multiprocessors(), cosine, true);
  OptTensor scratch;
  float* partial = nullptr;
  const int64_t columns = static_cast<int64_t>(a.heads) * (a.table_rows() + 1);
  if (a.dbias_table != nullptr || a.dlogit_scale != nullptr) {
    scratch = empty_like_shape(like, {p.groups, columns}, ScalarType::Float);
    partial = static_cast<float*>(scratch->mutable_data_ptr());
  }
  device.launch(cosine ? backward_kernel<TYPE, 32, true> : backward_kernel<TYPE, 32, false>,
                dim3(static_cast<unsigned>(p.blocks)), dim3(kThreads),
                static_cast<size_t>(p.shared_bytes), a, p.groups, partial);
  if (partial != nullptr) add_partials(device, a, p.groups, partial);
}

}  // namespace

void add_partials(const Device& device, const Args& a, int64_t groups, const float* partial) {
  const int64_t columns = static_cast<int64_t>(a.heads) * (a.table_rows() + 1);
  device.launch(finish_kernel, dim3(static_cast<unsigned>((columns + kThreads - 1) / kThreads)),
                dim3(kThreads), 0, a, groups, partial);
}

Refusal sm80_refuses_backward(const Args& args) {
  const Refusal why = refuses(args);
  if (!why.empty()) return why;
  if (!on_lines(args, args.dout)) return "pixels of dout must begin on 16-byte lines";
  return refuses_large(args, true);
}

void backward_sm80(const Device& device, const Tensor& like, const Args& args) {
  if (args.tokens() > kTile) return backward_large(device, like, args);
  if (args.dtype == DType::kBF16)
    launch<DType::kBF16>(device, like, args);
  else
    launch<DType::kF16>(device, like, args);
}

}  // namespace vitkernels::window_attention
