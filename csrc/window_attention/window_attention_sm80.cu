// Forward of window_attention on sm_80 tensor cores (mma.sync, ldmatrix, cp.async): bf16 and fp16,
// head dim 32, windows to 64 tokens, with and without shift and cosines; no dropout. Larger
// windows: window_attention_sm80_large.cu.
//
// A block has one head and goes through the windows of its group: while one is computed, q, k and v
// of the next are under way into the other half of shared memory. Warp w owns query rows 16 w to
// 16 w + 15: S = Q K^T in registers, softmax by quads of lanes, P rounded to 16 bits becomes the A
// operand of O = P V where it is. Tokens are read from and written to where they lie in the
// unshifted map. The bias of the head is expanded once a block, in the order of the fragments.
//
// Grid: heads * groups blocks of 128 threads; 40.8 KB of shared memory; one barrier a window, two
// with cosines. Launch settings: window_attention_plan_sm80.h.
#include "window_attention/window_attention_sm80.cuh"

namespace vitkernels::window_attention {
namespace {

using namespace sm80;

template <DType TYPE, int D, bool COSINE>
__global__ void __launch_bounds__(kThreads, forward_blocks(COSINE))
    forward_kernel(Args a, int64_t groups) {
  check_launch_bounds<kThreads>();
  VK_SWIZZLED_SHARED(char, tiles);
  constexpr int kStage = 3 * tile_bytes(D);
  auto* bias = reinterpret_cast<float4*>(tiles + 2 * kStage);
  auto* tokens = reinterpret_cast<int*>(tiles + 2 * kStage + kScoreBytes);
  auto* inverse = reinterpret_cast<float*>(tokens + kTile);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int N = a.Wh * a.Ww, head = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.heads));
  const int64_t group = blockIdx.x / static_cast<unsigned>(a.heads);
  const int64_t windows = static_cast<int64_t>(a.B) * (a.H / a.Wh) * (a.W / a.Ww);
  const int64_t first = group * windows / groups, last = (group + 1) * windows / groups;
  const int64_t channel = static_cast<int64_t>(head) * D, width = static_cast<int64_t>(a.heads) * D;
  const bool has_rows = warp * 16 < N;

  if (thread < N) tokens[thread] = packed_token(a, thread);
  clear_padding<D>(tiles, 6, N);
  expand_bias(bias, a, head, N);
  const float by = head_factor(a, head) * kLog2e;
  const Seams all_seams = seams_of(a);
  WindowPlace place = place_of(a, first), next = place;
  __syncthreads();
  begin_tiles<D, 3>(tiles, a, a.qkv, channel, width, next, tokens, N);
  commit_copies();

  for (int64_t window = first; window < last; ++window, place = next) {
    char* stage = tiles + ((window - first) & 1) * kStage;
    char* other = tiles + ((window - first + 1) & 1) * kStage;
    wait_copies<0>();
    __syncthreads();  // this window's tiles are there, and nobody reads the other's
    advance(a, next);
    if (window + 1 < last) {
      begin_tiles<D, 3>(other, a, a.qkv, channel, width, next, tokens, N);
      commit_copies();
    }
    if constexpr (COSINE) {
      inverse_lengths<TYPE, D>(inverse, stage);
      __syncthreads();
    }
    if (has_rows) {
      FragmentC s[8] = {};
      multiply_rows<TYPE, D>(s, stage, warp * 16, stage + tile_bytes(D));
      finish_scores<COSINE>(s, by, bias, inverse, seams_in(a, all_seams, place));

      float top[2], sum[2];
      exponentiate(s, top, sum);
      FragmentC o[D / 8] = {};
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const FragmentC &low = s[2 * step], &high = s[2 * step + 1];
        const FragmentA p = {{pack<TYPE>(low.v[0], low.v[1]), pack<TYPE>(low.v[2], low.v[3]),
                              pack<TYPE>(high.v[0], high.v[1]), pack<TYPE>(high.v[2], high.v[3])}};
        multiply_step<TYPE, D>(o, p, stage + 2 * tile_bytes(D), step);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane / 4 + 8 * half;
        if (lane % 4 == 0 && row < N)
          a.lse[(window * a.heads + head) * N + row] = fmaf(top[half], kLn2, logf(sum[half]));
      }
      // Its query rows are in registers: the warp's room for the way out.
      store_rows<TYPE, D>(o, {1.0f / sum[0], 1.0f / sum[1]}, stage, a, a.out, channel, place,
                          tokens, N);
    }
  }
}

template <DType TYPE>
void launch(const Device& device, const Args& a) {
  const Plan p =
      plan(a.windows(), a.heads, a.D, device.multiprocessors(), a.logit_scale != nullptr, false);
  device.launch(
      a.logit_scale == nullptr ? forward_kernel<TYPE, 32, false> : forward_kernel<TYPE, 32, true>,
      dim3(static_cast<unsigned>(p.blocks)), dim3(kThreads), static_cast<size_t>(p.shared_bytes), a,
      p.groups);
}

}  // namespace

Refusal sm80_refuses_forward(const Args& args) {
  const Refusal why = refuses(args);
  return why.empty() ? refuses_large(args, false) : why;
}

void forward_sm80(const Device& device, const Tensor&, const Args& args) {
  if (args.tokens() > kTile) return forward_large(device, args);
  if (args.dtype == DType::kBF16)
    launch<DType::kBF16>(device, args);
  else
    launch<DType::kF16>(device, args);
}

}  // namespace vitkernels::window_attention
