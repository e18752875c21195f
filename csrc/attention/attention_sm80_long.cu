// Forward of attention on sm_80 tensor cores for any number of queries and keys: bf16 and fp16,
// head dims to 128 in steps of 8, any bias or mask, dropout. attention_sm80.cu has the short ones.
//
// A block has 128 queries of a (batch item, head), a warp 32 of them in two tiles of 16, so that
// each fragment of k and v read from shared memory serves two products. k and v come in tiles of 64
// keys (48 above head dim 96, 32 beside options) through a ring of three, by asynchronous copies,
// in the order they are used in:
//
//   tile of k   S = q k^T in registers; softmax with a running maximum; o shrinks where that grew
//   tile of v   o += P v, P rounded to 16 bits where it is
//
// While one tile is at work the next two are under way; one barrier a tile. Keys beyond the last
// whole tile go in steps of 16, of which the last alone is masked: 577 keys are 9 * 64 + 1 and cost
// 592, 1370 are 21 * 64 + 26 and cost 1376.
//
// Grid: B * H * ceil(Nq / 128) blocks of 4 warps, two on a multiprocessor: 255 registers, shared
// memory 40 KB at head dim 64, 68 KB at 128. k and v of a head come from L2 after its first block.
// 4 B H Nq Nk D FLOP, for B 64, H 12, N 577, D 64: 65 GFLOP, 0.21 ms at the 312 TF/s of an A100;
// 92% of the products computed count. Least traffic (q, k, v in, out, lse out): 229 MB, 0.15 ms at
// 1.56 TB/s. Reads of shared memory take 50% (D 64, q in registers) to 67% (D 128, q read again) of
// the products' cycles.
#include "attention/attention_sm80_long.cuh"

namespace vitkernels::attention {
namespace {

using namespace sm80_long;

constexpr int kTiles = 2;  // of 16 queries of a warp

// Two rows of a tile for each thread, of which a quad has the same.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
};

// What scores are taken relative to, in units of log2: infinite ones share the row, so that lse is
// inf.
VK_DEVICE float shift_of(float top, float by) { return top - top == 0.0f ? top * by : top; }
VK_DEVICE float finite(float shift) { return shift - shift == 0.0f ? shift : 0.0f; }

// Scores of COUNT * 8 keys become probabilities before their division by the row's sum.
template <int HEAD_DIM, int COUNT>
VK_DEVICE void raise(FragmentC (&s)[COUNT], FragmentC (&o)[HEAD_DIM / 8], Softmax& row, float by) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = row.top[half];
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
      top = fmaxf(top, fmaxf(s[n].v[2 * half], s[n].v[2 * half + 1]));  // a NaN is left out
    top = sm80::quad_max(top);
    const float shift = finite(shift_of(top, by));
    const float shrink =
        top == row.top[half] ? 1.0f : exp2_approx(shift_of(row.top[half], by) - shift);
    row.top[half] = top;
    float sum = row.sum[half] * shrink;
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[n].v[i] = exp2_approx(fmaf(s[n].v[i], by, -shift));
        sum += s[n].v[i];
      }
    row.sum[half] = sum;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n)
      o[n].v[2 * half] *= shrink, o[n].v[2 * half + 1] *= shrink;
  }
}

// P of keys `first` to first + COUNT * 8 - 1, of a warp's queries from `query` on. at: where the
// keys are in their tile.
template <DType TYPE, int HEAD_DIM, Masks MASKS, bool LAST, int COUNT, bool KEPT>
VK_DEVICE void score_keys(FragmentA (&rounded)[kTiles][COUNT / 2],
                          FragmentC (&o)[kTiles][HEAD_DIM / 8], Softmax (&rows)[kTiles],
                          const RowOperand<HEAD_DIM, kTiles, KEPT>& q, const char* k, int at,
                          const Args& a, const Head& head, uint64_t seed, int query, int first) {
  const int row = query + static_cast<int>(threadIdx.x) % kWarp / 4;
  const int column = first + static_cast<int>(threadIdx.x) % 4 * 2;
  FragmentC p[kTiles][COUNT];
  multiply_rows<TYPE, HEAD_DIM>(p, q, k, at);
  const float by = score_factor<MASKS>(a);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    finish_scores<MASKS, false, LAST>(p[m], a, head, row + m * kTile, column);
    raise<HEAD_DIM, COUNT>(p[m], o[m], rows[m], by);
    if (MASKS == Masks::kNone || a.dropout.seed == nullptr) continue;
    const uint32_t kept = kept_bits<false, COUNT>(a, head, seed, row + m * kTile, column);
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if ((kept >> (4 * n + i) & 1) == 0) p[m][n].v[i] = 0.0f;
  }
  round_rows<TYPE>(rounded, p);
}

template <DType TYPE, int HEAD_DIM, Masks MASKS>
__global__ void __launch_bounds__(kThreads, kResident) forward_kernel(Args a, int blocks) {
  check_launch_bounds<kThreads>();
  VK_DYNAMIC_SHARED(char, shared);
  constexpr int kColumns = forward_columns(HEAD_DIM, MASKS == Masks::kAny);
  constexpr int kTileBytes = kColumns * 2 * HEAD_DIM;
  constexpr bool kKeep = keeps_queries(HEAD_DIM, MASKS == Masks::kAny);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned index = blockIdx.x / static_cast<unsigned>(blocks);
  const int block_query = static_cast<int>(blockIdx.x - index * blocks) * kForwardRows;
  const int query = block_query + warp * kTiles * kTile;  // the warp's first
  const bool works = query < a.Nq;
  const Head head = sm80::head_of(a, index);
  const uint64_t seed = MASKS == Masks::kAny ? dropout_seed(a) : 0;
  char* const ring = shared + kForwardRows * 2 * HEAD_DIM;

  // Tile t is of k for an even t, of v for an odd one.
  const auto place = [&](int t) { return ring + t % kRing * kTileBytes; };
  const auto begin = [&](int t) {
    const int first = t / 2 * kColumns;
    if (first < a.Nk)
      begin_tile<HEAD_DIM, kColumns>(place(t), sm80::rows_of(t % 2 == 0 ? a.k : a.v, head, a.Nk),
                                     first, a.D);
    commit_copies();
  };
  begin_tile<HEAD_DIM, kForwardRows>(shared, sm80::rows_of(a.q, head, a.Nq), block_query, a.D);
  begin(0);
  begin(1);

  RowOperand<HEAD_DIM, kTiles, kKeep> q;
  q.tile = shared + warp * kTiles * kTile * 2 * HEAD_DIM;
  FragmentC o[kTiles][HEAD_DIM / 8] = {};
  Softmax rows[kTiles];
  int first = 0, t = 0;
#pragma unroll 1
  for (; first + kColumns <= a.Nk; first += kColumns, t += 2) {
    FragmentA p[kTiles][kColumns / kTile];
    wait_copies<1>();
    __syncthreads();  // the tile of k is there; nobody reads the tile before
    begin(t + 2);
    if (first == 0) q.load();
    if (works)
      score_keys<TYPE, HEAD_DIM, MASKS, false, kColumns / 8>(p, o, rows, q, place(t), 0, a, head,
                                                             seed, query, first);
    wait_copies<1>();
    __syncthreads();  // the tile of v is there; nobody reads k
    begin(t + 3);
    if (works) multiply_add<TYPE, HEAD_DIM>(o, p, place(t + 1), 0);
  }
  wait_copies<0>();
  __syncthreads();  // both tiles of the keys that are left are there
  if (!works) return;
  if (first == 0) q.load();
#pragma unroll 1
  for (int at = 0; first + at < a.Nk; at += kTile) {
    FragmentA p[kTiles][1];
    score_keys<TYPE, HEAD_DIM, MASKS, true, 2>(p, o, rows, q, place(t), at, a, head, seed, query,
                                               first + at);
    multiply_add<TYPE, HEAD_DIM>(o, p, place(t + 1), at);
  }

  const Rows out = sm80::rows_of(a.out, head, a.Nq);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    float by[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = sm80::quad_sum(rows[m].sum[half]), top = rows[m].top[half];
      // A row with an infinite score is NaN, one without any score 0.
      by[half] = top == INFINITY ? NAN : sum == 0.0f ? 0.0f : 1.0f / sum;
      if (MASKS == Masks::kAny && a.dropout.seed != nullptr) by[half] *= a.dropout.scale;
      const int at = query + m * kTile + lane / 4 + 8 * half;
      const float shift = finite(shift_of(top, score_factor<MASKS>(a)));
      if (lane % 4 == 0 && at < a.Nq)
        a.lse[static_cast<int64_t>(index) * a.Nq + at] =
            sum == 0.0f ? -INFINITY : fmaf(shift, sm80::kLn2, logf(sum));
    }
    sm80::store_tile<TYPE, HEAD_DIM>(o[m], by, out, query + m * kTile, a.D);
  }
}

template <DType TYPE>
void launch(const Device& device, const Args& a) {
  const bool options = has_options(a);
  const int64_t blocks = blocks_of(a.Nq, kForwardRows);
  with_instance(a.D, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    device.launch(options ? forward_kernel<TYPE, kHeadDim, Masks::kAny>
                          : forward_kernel<TYPE, kHeadDim, Masks::kNone>,
                  dim3(grid_of(static_cast<int64_t>(a.B) * a.H * blocks)), dim3(kThreads),
                  static_cast<size_t>(forward_shared(kHeadDim, options)), a,
                  static_cast<int>(blocks));
  });
}

}  // namespace

void forward_sm80_long(const Device& device, const Args& args) {
  if (args.dtype == DType::kBF16)
    launch<DType::kBF16>(device, args);
  else
    launch<DType::kF16>(device, args);
}

}  // namespace vitkernels::attention
