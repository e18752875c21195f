// Forward of window_attention on Hopper (TMA, mbarrier, wgmma): bf16 and fp16, head dim 32, windows
// to 64 tokens, with and without shift and cosines; no dropout.
//
// Bytes decide: a window of 7 x 7 and one head brings 9.4 KB and takes 3.1 KB away, 2.9 ns of a
// whole H200 at 4.3 TB/s, for 0.4 ns of products and 0.6 ns of exponentials. So a window moves
// once, by TMA, between where it lies in the unshifted map and shared memory, and loads never stop:
// each of a block's three warpgroups has one head and windows of its own, in a ring of four stages
// of which three are under way, up to 85 KB of a multiprocessor. A thread of a fourth warpgroup
// moves the windows of each. The bias of the head stays in registers.
//
// A window: S = Q K^T (wgmma m64n56k16 for windows to 56 rows, else m64n64k16), softmax by quads of
// lanes, P in 16 bits is the A operand of O = P V (m64n32k16) where it is; O goes where Q was, and
// from there to the map. Only windows at a seam are masked.
//
// Grid: heads * groups warpgroups, three to a block of 512 threads, a block a multiprocessor; 147.4
// KB of shared memory. No barriers but those of the stages, and one of the warpgroup a window with
// cosines. Launch settings: window_attention_plan_sm90.h.
#include "window_attention/window_attention_sm90.cuh"

namespace vitkernels::window_attention {
namespace {

using namespace sm90;

template <DType TYPE, int D, int KEYS, bool COSINE>
__global__ void __launch_bounds__(kForwardThreads, 1)
    forward_kernel(const __grid_constant__ Maps qkv, const __grid_constant__ Maps out, Args a,
                   const __grid_constant__ Order order, int64_t groups, int busy) {
  check_launch_bounds<kForwardThreads>();
  VK_SWIZZLED_SHARED(char, tiles);
  constexpr int kTile = tile_bytes(D), kStage = 3 * kTile;
  constexpr int kStages = kForwardStages, kRing = kStages * kStage;
  auto* inverses = reinterpret_cast<float*>(tiles + kForwardGroups * kRing);
  auto* barriers = reinterpret_cast<MBarrier*>(inverses + kForwardGroups * 4 * kRows);
  auto* tokens = reinterpret_cast<int*>(barriers + kForwardGroups * 2 * kStages);
  const int thread = static_cast<int>(threadIdx.x), warpgroup = thread / kWarpgroup;

  if (thread == 0) init_barriers<kStages>(barriers, kForwardGroups);
  if (thread < kRows) tokens[thread] = token_of(order, thread);
  __syncthreads();
  clear_padding<D>(tiles, kForwardGroups * kStages * 3, tokens);
  fence_proxy_async();
  __syncthreads();

  const bool moves = warpgroup == kForwardGroups;
  const int mine = moves ? thread % kWarpgroup / kWarp : warpgroup;
  const Work work = work_of(a, groups, busy, mine);
  char* const ring_tiles = tiles + mine * kRing;
  MBarrier *const full = barriers + mine * 2 * kStages, *const done = full + kStages;
  if (moves) {
    give_up_registers<kForwardRegisters[1]>();
    if (thread % kWarp == 0 && work.first < work.last)
      move_windows<D, kStages, false>(ring_tiles, full, done, qkv, qkv, out, a, order, work, true);
    return;
  }
  take_registers<kForwardRegisters[0]>();
  const int lane = thread % kWarp, row = thread % kWarpgroup / kWarp * 16 + lane / 4;  // and + 8
  const bool inside[2] = {tokens[row] != kNoToken, tokens[row + 8] != kNoToken};
  const int N = a.Wh * a.Ww, index = index_of(a, tokens[row + lane % 2 * 8]);
  const float by = head_factor(a, work.head) * kLog2e;
  FragmentC bias[KEYS / 8];
  load_bias(bias, a, work.head, row, tokens);
  float* inverse = inverses + mine * 4 * kRows;
  WindowPlace place = place_of(a, work.first);
  Ring<kStages> ring;

  for (int64_t window = work.first; window < work.last; ++window, ring.advance()) {
    char *const q = ring_tiles + ring.stage * kStage, *const k = q + kTile, *const v = k + kTile;
    mbarrier_wait(&full[ring.stage], ring.parity);
    if constexpr (COSINE) {  // in turns: the other half may still be read
      inverse = inverses + (mine * 2 + (window - work.first) % 2) * 2 * kRows;
      const int of = thread % kWarpgroup;
      inverse[of] = inverse_length<TYPE, D>(q, of);
      barrier_sync(1 + mine, kWarpgroup);
    }
    FragmentC s[KEYS / 8];
    wgmma_fence(floats(s));
    multiply_rows<TYPE, D>(s, q, k);
    wgmma_commit();
    wgmma_wait<0>(floats(s));
    finish_scores<COSINE>(s, by, bias, inverse, row);
    mask_seams(s, a, order, place, row);
    advance(a, place);

    float top[2], sum[2];
    exponentiate(s, top, sum);
    FragmentA p[4];
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        p[n / 2].r[n % 2 * 2 + half] = n < KEYS / 8 ? rounded<TYPE>(s[n], half, true) : 0;
    FragmentC o[D / 8];
    pin(p);
    wgmma_fence(floats(o));
    multiply<TYPE, D>(o, p, v);
    wgmma_commit();
    wgmma_wait<0>(floats(o));
    pin(p);
    put_rows<TYPE, D>(q, o, {1.0f / sum[0], 1.0f / sum[1]}, row, inside);
    leave_stage(&done[ring.stage]);
    // Of a quad, a lane for each row.
    const bool second = lane % 2 == 1;
    if (lane % 4 < 2 && (second ? inside[1] : inside[0]))
      a.lse[(window * a.heads + work.head) * N + index] =
          fmaf(second ? top[1] : top[0], kLn2, logf(second ? sum[1] : sum[0]));
  }
}

template <DType TYPE, int KEYS>
void launch(const Device& device, const Args& a, const Order& order) {
  const Plan p = plan(a.windows(), a.heads, a.D, device.multiprocessors(), false);
  const int64_t width = static_cast<int64_t>(a.heads) * a.D;
  device.launch(a.logit_scale == nullptr ? forward_kernel<TYPE, 32, KEYS, false>
                                         : forward_kernel<TYPE, 32, KEYS, true>,
                dim3(static_cast<unsigned>(p.blocks)), dim3(kForwardThreads),
                static_cast<size_t>(p.shared_bytes), make_maps(a, a.qkv, 3 * width, order),
                make_maps(a, a.out, width, order), a, order, p.groups, p.busy);
}

template <DType TYPE>
void launch(const Device& device, const Args& a) {
  const Order order = order_of(a.Wh, a.Ww, a.shift_h, a.shift_w);
  keys_of(order) == 56 ? launch<TYPE, 56>(device, a, order) : launch<TYPE, 64>(device, a, order);
}

}  // namespace

Refusal sm90_refuses_forward(const Args& args) { return refuses(args); }

void forward_sm90(const Device& device, const Tensor&, const Args& args) {
  if (args.dtype == DType::kBF16)
    launch<DType::kBF16>(device, args);
  else
    launch<DType::kF16>(device, args);
}

}  // namespace vitkernels::window_attention
