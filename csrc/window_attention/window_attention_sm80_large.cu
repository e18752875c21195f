// Forward of window_attention on sm_80 tensor cores for windows of 65 to 256 tokens: bf16 and fp16,
// head dim 32, with and without shift and cosines; no dropout.
//
// At 16 x 16 tokens a head of a window is 65,536 exponentials, 4,096 cycles of a multiprocessor,
// for 64 KB of q, k, v and out (3,700 cycles of its share of an H200's memory) and 8.4 MFLOP (2,600
// cycles at the rate of wgmma, more at that of mma.sync). So exponentials are of real pairs only:
// columns in eights, rows in sixteens, and 12 x 12 and 16 x 16 have no padding at all.
//
// A block has one head and goes through the windows of its group; q, k and v of the next are under
// way into the other half of shared memory. A warp takes 16 queries: their rows are A of S = Q K^T,
// chunks of 8 F keys with a running maximum, P rounded to 16 bits the A of O += P V where it is. A
// bias is one load from the head's column of the table at the difference of two tokens' offsets.
//
// Grid: heads * groups blocks of a warp for each 16 or 32 queries; 58 KB of shared memory at 144
// tokens, 104 KB at 256; one barrier a window, two with cosines. Launch settings:
// window_attention_plan_sm80_large.h.
#include "window_attention/window_attention_sm80_large.cuh"

namespace vitkernels::window_attention {
namespace {

using namespace sm80_large;

// What a warp has of its 16 queries, row r of its half h at [h].
template <int D>
struct Running {
  FragmentC o[D / 8] = {};
  float top[2] = {-INFINITY, -INFINITY};  // the highest score
  float sum[2] = {0.0f, 0.0f};            // of this lane's columns
};

// What they attend to.
struct Keys {
  char *k, *v;
  const float* inverse;
  int seams;
};

// Adds the keys from `first` on, F fragments; CAREFUL: `count` of them.
template <DType TYPE, int D, int F, bool COSINE, bool CAREFUL>
VK_DEVICE void add_keys(Running<D>& r, char* queries, const RowPair& rows, const Tokens& tokens,
                        const Keys& keys, int first, int count) {
  FragmentA q[D / 16];
  load_rows<D>(q, queries, rows.first);
  FragmentC s[F] = {};
  multiply_columns<TYPE, D, F, CAREFUL>(s, q, keys.k, first, count);
  float top[2] = {r.top[0], r.top[1]};
#pragma unroll
  for (int n = 0; n < F; ++n) {
    if (CAREFUL && n >= count) continue;
    finish_scores<COSINE, CAREFUL>(s[n], rows, tokens, keys.inverse, keys.seams, first + n * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[n].v[i]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float before = r.top[half];
    r.top[half] = quad_max(top[half]);
    top[half] = r.top[half] == -INFINITY ? 0.0f : r.top[half];  // none so far, or all NaN
    const float by = exp2_approx(before - top[half]);
    r.sum[half] *= by;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) r.o[n].v[2 * half] *= by, r.o[n].v[2 * half + 1] *= by;
  }
#pragma unroll
  for (int n = 0; n < F; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (CAREFUL && n >= count) {
        s[n].v[i] = 0.0f;
        continue;
      }
      s[n].v[i] = exp2_approx(s[n].v[i] - top[i / 2]);
      r.sum[i / 2] += s[n].v[i];
    }
#pragma unroll
  for (int step = 0; step < F / 2; ++step) {
    if (CAREFUL && 2 * step >= count) continue;
    multiply_step<TYPE, D>(r.o, as_rows<TYPE>(s[2 * step], s[2 * step + 1]), keys.v,
                           first / 16 + step);
  }
}

template <DType TYPE, int D, int F, bool COSINE>
__global__ void __launch_bounds__(kForwardThreads, 1) forward_kernel(Args a, int64_t groups) {
  check_launch_bounds<kForwardThreads>();
  VK_SWIZZLED_SHARED(char, tiles);
  const int N = a.Wh * a.Ww, padded = padded_rows(N), tile = tile_bytes(padded, D);
  auto* const table = reinterpret_cast<float*>(tiles + 6 * tile);
  const Tokens tokens = tokens_at(table + table_floats(a.table_rows()), padded);
  auto* const inverse = reinterpret_cast<float*>(tokens.regions + padded);
  auto* const visits = reinterpret_cast<Visit*>(inverse + (COSINE ? 2 * padded : 0));
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, step = static_cast<int>(blockDim.x) / 2;
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.heads));
  const int64_t group = blockIdx.x / static_cast<unsigned>(a.heads);
  const int64_t windows = static_cast<int64_t>(a.B) * (a.H / a.Wh) * (a.W / a.Ww);
  const int64_t first = group * windows / groups;
  int left = static_cast<int>((group + 1) * windows / groups - first);

  fill_tokens(tokens, a, N, -1);
  fill_bias(table, a, head);
  clear_rows<D>(tiles, 6, tile, N);
  if (threadIdx.x == 0) visits[left & 1] = {place_of(a, first), head, first, head_factor(a, head)};
  const auto begin = [&](int parity, const Visit& visit) {
    char* const stage = tiles + parity * 3 * tile;
    begin_rows<D, 3>(stage, tile, a, a.qkv, visit.head * D, a.heads * D, visit.place, tokens.places,
                     N);
    commit_copies();
  };
  __syncthreads();
  begin(left & 1, visits[left & 1]);

  for (; left > 0; --left) {
    char* const stage = tiles + (left & 1) * 3 * tile;
    const Visit& visit = visits[left & 1];
    wait_copies<0>();
    __syncthreads();  // this window's tiles are there, and nobody reads the other's
    if (left > 1) begin(1 - (left & 1), advance_visit(a, visits, left & 1));
    if constexpr (COSINE) {
      fill_inverse_lengths<TYPE, D>(inverse, stage, padded);
      __syncthreads();
    }
    const Keys keys = {stage + tile, stage + 2 * tile, inverse + padded, seam_bits(a, visit.place)};
    for (int row = warp * 16; row < N; row += step) {
      const RowPair rows = row_pair<COSINE>(a, table, tokens, inverse, visit.factor * kLog2e, row);
      Running<D> r;
#pragma unroll 1
      for (int key = 0; key < N; key += 8 * F) {
        if (keys.seams == 0 && key + 8 * F <= N)
          add_keys<TYPE, D, F, COSINE, false>(r, stage, rows, tokens, keys, key, F);
        else
          add_keys<TYPE, D, F, COSINE, true>(r, stage, rows, tokens, keys, key,
                                             min(F, (N - key + 7) / 8));
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        r.sum[half] = quad_sum(r.sum[half]);
        const int query = row + lane / 4 + 8 * half;
        if (lane % 4 == 0 && query < N)
          lse_of(a, visit)[query] =
              fmaf(r.top[half] == -INFINITY ? 0.0f : r.top[half], kLn2, logf(r.sum[half]));
      }
      // Nobody else has its query rows: the warp's room for the way out.
      store_rows<TYPE, D>(r.o, {1.0f / r.sum[0], 1.0f / r.sum[1]}, stage, a, a.out, visit.head * D,
                          visit.place, tokens.places, N, row);
    }
  }
}

template <DType TYPE, bool COSINE>
void launch(const Device& device, const Args& a) {
  const auto p = sm80_large::plan(a.windows(), a.tokens(), a.table_rows(), a.heads, a.D,
                                  device.multiprocessors(), device.architecture(), COSINE, false);
  device.launch(
      p.fragments == 6 ? forward_kernel<TYPE, 32, 6, COSINE> : forward_kernel<TYPE, 32, 8, COSINE>,
      dim3(static_cast<unsigned>(p.blocks)), dim3(static_cast<unsigned>(kWarp * p.warps)),
      static_cast<size_t>(p.shared_bytes), a, p.groups);
}

}  // namespace

void sm80::forward_large(const Device& device, const Args& args) {
  const bool cosine = args.logit_scale != nullptr;
  if (args.dtype == DType::kBF16)
    cosine ? launch<DType::kBF16, true>(device, args) : launch<DType::kBF16, false>(device, args);
  else
    cosine ? launch<DType::kF16, true>(device, args) : launch<DType::kF16, false>(device, args);
}

}  // namespace vitkernels::window_attention
