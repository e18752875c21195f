// Backward of window_attention on Hopper: what window_attention_sm90.cu serves, in the same way.
//
// A window of 7 x 7 and one head brings 12.5 KB (q, k, v, dout) and takes 9.4 KB away, 5.1 ns of a
// whole H200 at 4.3 TB/s, for 1 ns of products. Each of a block's two warpgroups has one head and
// windows of its own in a ring of four stages, up to 75 KB under way on a multiprocessor; a thread
// of a third warpgroup moves the windows of each.
//
// A window: S = Q K^T and dP = dO V^T (wgmma m64n56k16 for windows to 56 rows, else m64n64k16),
// P = 2^(S - lse) divided by its own sum, dS = P (dP - rowsum(P dP)) in fp32. dQ = dS K has dS in
// 16 bits from registers; dK = dS^T Q and dV = P^T dO have them from shared memory, as operands
// whose rows run fastest (all three m64n32k16). dQ, dK and dV go where q, k and v were, and from
// there to the map. Cosines: Q and K become unit vectors in place once S is there, and gradients of
// q and k pass through the normalisation on their way out.
//
// dbias: every thread adds its entries of dS over its windows; at the end they are summed into the
// warpgroup's column of the table, each row by one thread, and add_partials adds the columns.
//
// Grid: heads * groups warpgroups, two to a block of 384 threads, a block a multiprocessor; 162.6
// KB of shared memory. Two barriers of the warpgroup a window, four with cosines. Launch settings:
// window_attention_plan_sm90.h.
#include "window_attention/window_attention_sm90.cuh"

namespace vitkernels::window_attention {
namespace {

using namespace sm90;

// P and dS in 16 bits are tiles of 64 rows of 64: like rows of D = 64.
constexpr int kScores = kRows;

// A warpgroup's column of dbias_table from the sums of dS in shared memory: row by row, each by one
// thread, over the pairs of tokens in order. rows: of the tile, for each token.
VK_DEVICE void sum_pairs(float* column, const float* sums, const int* rows, const Args& a) {
  const int across = 2 * a.Ww - 1, count = (2 * a.Wh - 1) * across;
  for (int t = static_cast<int>(threadIdx.x) % kWarpgroup; t < count; t += kWarpgroup) {
    const int dy = t / across - (a.Wh - 1), dx = t % across - (a.Ww - 1);
    float sum = 0.0f;
    for (int y = max(dy, 0); y < a.Wh + min(dy, 0); ++y)
      for (int x = max(dx, 0); x < a.Ww + min(dx, 0); ++x)
        sum += sums[rows[y * a.Ww + x] * kRows + rows[(y - dy) * a.Ww + x - dx]];
    column[t] = sum;
  }
}

// partial: (groups, heads, rows of the table + 1), the last of a column for dlogit_scale.
template <DType TYPE, int D, int KEYS, bool COSINE>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_kernel(const __grid_constant__ Maps qkv, const __grid_constant__ Maps douts,
                    const __grid_constant__ Maps dqkv, Args a, const __grid_constant__ Order order,
                    int64_t groups, int busy, float* partial) {
  check_launch_bounds<kBackwardThreads>();
  VK_SWIZZLED_SHARED(char, tiles);
  constexpr int kTile = tile_bytes(D), kStage = 4 * kTile;
  constexpr int kStages = kBackwardStages, kRing = kStages * kStage;
  char* const scores = tiles + kBackwardGroups * kRing;
  auto* inverses = reinterpret_cast<float*>(scores + kBackwardGroups * 2 * kScoreBytes);
  auto* barriers = reinterpret_cast<MBarrier*>(inverses + kBackwardGroups * 4 * kRows);
  auto* tokens = reinterpret_cast<int*>(barriers + kBackwardGroups * 2 * kStages);
  auto* rows = tokens + kRows;
  const int thread = static_cast<int>(threadIdx.x), warpgroup = thread / kWarpgroup;

  if (thread == 0) init_barriers<kStages>(barriers, kBackwardGroups);
  if (thread < kRows) {
    tokens[thread] = token_of(order, thread);
    if (tokens[thread] != kNoToken) rows[index_of(a, tokens[thread])] = thread;
  }
  __syncthreads();
  clear_padding<D>(tiles, kBackwardGroups * kStages * 4, tokens);
  for (int i = thread; i < kBackwardGroups * 2 * kScoreBytes / 16; i += kBackwardThreads)
    store_16(scores + 16 * i, make_uint4(0, 0, 0, 0));  // keys that are not computed
  fence_proxy_async();
  __syncthreads();

  const bool moves = warpgroup == kBackwardGroups;
  const int mine = moves ? thread % kWarpgroup / kWarp : warpgroup;
  const Work work = work_of(a, groups, busy, mine);
  char* const ring_tiles = tiles + mine * kRing;
  MBarrier *const full = barriers + mine * 2 * kStages, *const done = full + kStages;
  const bool with_dqkv = a.dqkv.data != nullptr;
  if (moves) {
    give_up_registers<kBackwardRegisters[1]>();
    if (thread % kWarp == 0 && work.first < work.last)
      move_windows<D, kStages, true>(ring_tiles, full, done, qkv, douts, dqkv, a, order, work,
                                     with_dqkv);
    return;
  }
  take_registers<kBackwardRegisters[0]>();
  if (work.first == work.last) return;
  const int own = thread % kWarpgroup, lane = thread % kWarp;
  const int row = own / kWarp * 16 + lane / 4;  // and row + 8
  const bool inside[2] = {tokens[row] != kNoToken, tokens[row + 8] != kNoToken};
  const float factor = head_factor(a, work.head);
  char *const p_tile = scores + mine * 2 * kScoreBytes, *const ds_tile = p_tile + kScoreBytes;
  float* inverse = inverses + mine * 4 * kRows;
  FragmentC bias[KEYS / 8], dbias[KEYS / 8] = {};
  load_bias(bias, a, work.head, row, tokens);
  float dlogit = 0.0f;
  WindowPlace place = place_of(a, work.first);
  Ring<kStages> ring;
  const int N = a.Wh * a.Ww;
  const int index[2] = {index_of(a, tokens[row]), index_of(a, tokens[row + 8])};
  const float* lse_at = a.lse + (work.first * a.heads + work.head) * N;  // of the window to come
  const auto load_lse = [&](float (&lse)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) lse[half] = inside[half] ? lse_at[index[half]] : 0.0f;
    lse_at += a.heads * N;
  };
  float next_lse[2];
  load_lse(next_lse);

  for (int64_t window = work.first; window < work.last; ++window, ring.advance()) {
    char *const q = ring_tiles + ring.stage * kStage, *const k = q + kTile, *const v = k + kTile,
                *const dout = v + kTile;
    const float lse[2] = {next_lse[0], next_lse[1]};
    if (window + 1 < work.last) load_lse(next_lse);
    mbarrier_wait(&full[ring.stage], ring.parity);
    if constexpr (COSINE) {  // in turns: the other half may still be read
      inverse = inverses + (mine * 2 + (window - work.first) % 2) * 2 * kRows;
      inverse[own] = inverse_length<TYPE, D>(q, own);
      barrier_sync(1 + mine, kWarpgroup);
    }
    FragmentC p[KEYS / 8], dp[KEYS / 8];
    pin_registers(floats(dp));
    wgmma_fence(floats(p));
    multiply_rows<TYPE, D>(p, q, k);
    wgmma_commit();
    multiply_rows<TYPE, D>(dp, dout, v);
    wgmma_commit();
    wgmma_wait<1>(floats(p));
    finish_scores<COSINE>(p, factor * kLog2e, bias, inverse, row);
    mask_seams(p, a, order, place, row);
    advance(a, place);
    wgmma_wait<0>(floats(dp));
    differentiate(p, dp, lse);
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dbias[n].v[i] += dp[n].v[i];
    if (!with_dqkv && a.dlogit_scale == nullptr) {
      leave_stage(&done[ring.stage]);
      continue;
    }

    FragmentA ds[4];
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t& pair = ds[n / 2].r[n % 2 * 2 + half];
        pair = 0;
        if (n >= KEYS / 8) continue;
        pair = rounded<TYPE>(dp[n], half, inside[half]);
        const int at = row + 8 * half;
        *reinterpret_cast<uint32_t*>(chunk_at<kScores>(ds_tile, at, n) + lane % 4 * 4) = pair;
        *reinterpret_cast<uint32_t*>(chunk_at<kScores>(p_tile, at, n) + lane % 4 * 4) =
            rounded<TYPE>(p[n], half, inside[half]);
      }
    if constexpr (COSINE) {
      barrier_sync(1 + mine, kWarpgroup);        // every warp has its S
      make_unit<TYPE, D>(q, own, inverse[own]);  // of q and k
    }
    fence_proxy_async();
    barrier_sync(1 + mine, kWarpgroup);  // P, dS and the unit vectors are there
    FragmentC dq[D / 8], dk[D / 8], dv[D / 8];
    pin(ds);
    pin_registers(floats(dk));
    pin_registers(floats(dv));
    wgmma_fence(floats(dq));
    multiply<TYPE, D>(dq, ds, k);
    multiply_transposed<TYPE, D>(dk, ds_tile, q);
    multiply_transposed<TYPE, D>(dv, p_tile, dout);
    wgmma_commit();
    wgmma_wait<0>(floats(dq));
    pin(ds);
    pin_registers(floats(dk));
    pin_registers(floats(dv));
    barrier_sync(1 + mine, kWarpgroup);  // nobody reads the operands any more
    if constexpr (COSINE) {
      dlogit += through_unit<TYPE, D>(dq, q, inverse, row, inside);
      through_unit<TYPE, D>(dk, k, inverse + kRows, row, inside);
    }
    put_rows<TYPE, D>(q, dq, {factor, factor}, row, inside);
    put_rows<TYPE, D>(k, dk, {factor, factor}, row, inside);
    put_rows<TYPE, D>(v, dv, {1.0f, 1.0f}, row, inside);
    leave_stage(&done[ring.stage]);
  }

  if (partial == nullptr) return;
  const int table_rows = (2 * a.Wh - 1) * (2 * a.Ww - 1);
  float* column =
      partial + (static_cast<int64_t>(work.group) * a.heads + work.head) * (table_rows + 1);
  auto* sums = reinterpret_cast<float*>(p_tile);  // and dS: nobody reads them any more
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[(row + i / 2 * 8) * kRows + n * 8 + fragment_c_column(lane, i)] = dbias[n].v[i];
  barrier_sync(1 + mine, kWarpgroup);
  sum_pairs(column, sums, rows, a);
  if constexpr (COSINE) {
    float total[1] = {lane % 4 == 0 ? dlogit * factor : 0.0f};  // a quad has the same
    sum_over_lanes(total, kWarp);
    float* of_warps = inverses + mine * 4 * kRows;
    barrier_sync(1 + mine, kWarpgroup);  // the last lengths were read
    if (lane == 0) of_warps[own / kWarp] = total[0];
    barrier_sync(1 + mine, kWarpgroup);
    if (own == 0) column[table_rows] = of_warps[0] + of_warps[1] + of_warps[2] + of_warps[3];
  }
}

template <DType TYPE, int KEYS>
void launch(const Device& device, const Tensor& like, const Args& a, const Order& order) {
  const Plan p = plan(a.windows(), a.heads, a.D, device.multiprocessors(), true);
  const int64_t width = static_cast<int64_t>(a.heads) * a.D;
  OptTensor scratch;
  float* partial = nullptr;
  if (a.dbias_table != nullptr || a.dlogit_scale != nullptr) {
    const int64_t columns = static_cast<int64_t>(a.heads) * (a.table_rows() + 1);
    scratch = empty_like_shape(like, {p.groups, columns}, ScalarType::Float);
    partial = static_cast<float*>(scratch->mutable_data_ptr());
  }
  const Maps qkv = make_maps(a, a.qkv, 3 * width, order);
  device.launch(a.logit_scale == nullptr ? backward_kernel<TYPE, 32, KEYS, false>
                                         : backward_kernel<TYPE, 32, KEYS, true>,
                dim3(static_cast<unsigned>(p.blocks)), dim3(kBackwardThreads),
                static_cast<size_t>(p.shared_bytes), qkv, make_maps(a, a.dout, width, order),
                a.dqkv.data == nullptr ? qkv : make_maps(a, a.dqkv, 3 * width, order), a, order,
                p.groups, p.busy, partial);
  if (partial != nullptr) add_partials(device, a, p.groups, partial);
}

template <DType TYPE>
void launch(const Device& device, const Tensor& like, const Args& a) {
  const Order order = order_of(a.Wh, a.Ww, a.shift_h, a.shift_w);
  keys_of(order) == 56 ? launch<TYPE, 56>(device, like, a, order)
                       : launch<TYPE, 64>(device, like, a, order);
}

}  // namespace

Refusal sm90_refuses_backward(const Args& args) {
  const Refusal why = refuses(args);
  return why.empty() ? refuses_map(args, args.dout, "dout") : why;
}

void backward_sm90(const Device& device, const Tensor& like, const Args& args) {
  if (args.dtype == DType::kBF16)
    launch<DType::kBF16>(device, like, args);
  else
    launch<DType::kF16>(device, like, args);
}

}  // namespace vitkernels::window_attention
