// Forward of attention on sm_80 tensor cores (mma.sync, ldmatrix, cp.async): bf16 and fp16, head
// dims to 128 in steps of 8, up to 272 queries and keys, any bias or mask; no dropout. The path's
// other calls are attention_sm80_long.cu's.
//
// A block has one (batch item, head): q, k and v go to shared memory once, by asynchronous copies
// that are all issued at the start. A warp owns tiles of 16 queries: S = Q K^T for 48 keys in
// registers (16 beside a bias, and at the end), softmax with a running maximum by quads of lanes,
// P rounded to 16 bits becomes the A operand of O += P V where it is.
//
// Grid: B * H blocks of up to 8 warps (197 queries: 7, two tiles each but for one), two on a
// multiprocessor where shared memory allows, so that one loads while the other computes. One
// barrier. Shared memory: k, v and q (197 x 64: 78 KB); where that is more than there is, one tile
// of q a warp, the next of which is under way while one is computed. Least traffic is q, k, v once
// in, out and lse once out: 310 MB at B 256, H 12, N 197, D 64 is 65 us at 4.8 TB/s, 72.6 us at
// what copies reach; 31 GFLOP. Launch settings: attention_plan_sm80.h.
#include "attention/attention_sm80.cuh"

namespace vitkernels::attention {
namespace {

using namespace sm80;

// A warp's 16 rows of the softmax; each thread has two, of which a quad has the same.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
};

// What scores are taken relative to: infinite ones share the row, so that lse is inf.
VK_DEVICE float shift_of(float top) { return top - top == 0.0f ? top : 0.0f; }

// The keys from `first` on, COUNT * 8 of them.
template <DType TYPE, int HEAD_DIM, Masks MASKS, int COUNT>
VK_DEVICE void attend(FragmentC (&o)[HEAD_DIM / 8], Softmax& row, const Args& a, const Head& head,
                      const FragmentA (&q)[HEAD_DIM / 16], char* k, char* v, int query, int first) {
  FragmentC s[COUNT];
  multiply_rows<TYPE, HEAD_DIM, COUNT>(s, q, k, first);
  finish_scores<MASKS, false, COUNT>(s, a, head, query,
                                     first + static_cast<int>(threadIdx.x) % 4 * 2);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = row.top[half];
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
      top = fmaxf(top, fmaxf(s[n].v[2 * half], s[n].v[2 * half + 1]));  // a NaN is left out
    top = quad_max(top);
    const float shift = shift_of(top);
    const float shrink = top == row.top[half] ? 1.0f : exp2f(row.top[half] - shift);
    row.top[half] = top;
    float sum = row.sum[half] * shrink;
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[n].v[i] = exp2f(s[n].v[i] - shift);
        sum += s[n].v[i];
      }
    row.sum[half] = sum;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n)
      o[n].v[2 * half] *= shrink, o[n].v[2 * half + 1] *= shrink;
  }
#pragma unroll
  for (int n = 0; n < COUNT; n += 2)
    multiply_step<TYPE, HEAD_DIM>(o, s[n], s[n + 1], v, first + n * 8);
}

template <DType TYPE, int HEAD_DIM, Masks MASKS>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<HEAD_DIM>)
    forward_kernel(Args a, int slots) {
  check_launch_bounds<kForwardThreads>();
  VK_DYNAMIC_SHARED(char, shared);
  constexpr int kTileBytes = kTile * 2 * HEAD_DIM;
  constexpr int kColumns = forward_columns(MASKS == Masks::kAny);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const int query_tiles = tiles(a.Nq), key_tiles = tiles(a.Nk);
  const bool whole = slots == query_tiles;
  const Head head = head_of(a, blockIdx.x);
  const Rows queries = rows_of(a.q, head, a.Nq), out = rows_of(a.out, head, a.Nq);
  char *const k = shared, *const v = k + key_tiles * kTileBytes;
  char* const q = v + key_tiles * kTileBytes;

  begin_rows<HEAD_DIM>(q, queries, 0, slots * kTile, a.D, thread, threads);
  begin_pair<HEAD_DIM>(k, rows_of(a.k, head, a.Nk), v, rows_of(a.v, head, a.Nk), 0,
                       key_tiles * kTile, a.D, thread, threads);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

#pragma unroll 1
  for (int tile = warp; tile < query_tiles; tile += warps) {
    char* const own = q + (whole ? tile : warp) * kTileBytes;
    FragmentA fq[HEAD_DIM / 16];
    if (!whole) {
      wait_copies<0>();
      __syncwarp();  // what its lanes have copied is there
    }
    load_tile<HEAD_DIM>(fq, own);
    if (!whole && tile + warps < query_tiles) {
      __syncwarp();  // all lanes have read
      begin_rows<HEAD_DIM>(own, queries, (tile + warps) * kTile, kTile, a.D, lane, kWarp);
      commit_copies();
    }
    const int query = tile * kTile + lane / 4;
    FragmentC o[HEAD_DIM / 8] = {};
    Softmax row;
    int first = 0;
    if constexpr (kColumns > kTile) {
#pragma unroll 1
      for (; a.Nk - first > kColumns - kTile; first += kColumns)
        attend<TYPE, HEAD_DIM, MASKS, kColumns / 8>(o, row, a, head, fq, k, v, query, first);
    }
#pragma unroll 1
    for (; first < a.Nk; first += kTile)
      attend<TYPE, HEAD_DIM, MASKS, kTile / 8>(o, row, a, head, fq, k, v, query, first);

    float by[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(row.sum[half]);
      // A row with an infinite score is NaN, one without any score 0.
      by[half] = row.top[half] == INFINITY ? NAN : sum == 0.0f ? 0.0f : 1.0f / sum;
      const int at = query + 8 * half;
      if (lane % 4 == 0 && at < a.Nq)
        a.lse[static_cast<int64_t>(blockIdx.x) * a.Nq + at] =
            sum == 0.0f ? -INFINITY : fmaf(shift_of(row.top[half]), kLn2, logf(sum));
    }
    store_tile<TYPE, HEAD_DIM>(o, by, out, tile * kTile, a.D);
  }
}

template <DType TYPE>
void launch(const Device& device, const Args& a, const Plan& p) {
  with_head_dim(a.D, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    device.launch(has_masks(a) ? forward_kernel<TYPE, kHeadDim, Masks::kAny>
                               : forward_kernel<TYPE, kHeadDim, Masks::kNone>,
                  dim3(static_cast<unsigned>(a.B) * static_cast<unsigned>(a.H)),
                  dim3(static_cast<unsigned>(p.warps * kWarp)), static_cast<size_t>(p.shared_bytes),
                  a, p.slots);
  });
}

}  // namespace

Refusal sm80_refuses_forward(const Args& args) { return refuses(args); }

void forward_sm80(const Device& device, const Tensor&, const Args& args) {
  const Plan p =
      is_short(args) ? forward_plan(args.Nq, args.Nk, args.D, device.architecture()) : Plan{};
  if (p.warps == 0)
    forward_sm80_long(device, args);
  else if (args.dtype == DType::kBF16)
    launch<DType::kBF16>(device, args, p);
  else
    launch<DType::kF16>(device, args, p);
}

}  // namespace vitkernels::attention
