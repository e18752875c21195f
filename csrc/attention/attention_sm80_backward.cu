// Backward of attention on sm_80 tensor cores: what attention_sm80.cu serves, without the gradient
// of a bias. The path's other calls are attention_sm80_long_backward.cu's.
//
// A block has one (batch item, head) and two passes of one form. A pass has rows that the warps own
// in tiles of 16, and columns that all go through, 16 at a time:
//
//   pass        rows     columns    of 16 x 16: S, dP           sums
//   by query    q, dout  k, v       q k^T, dout v^T             dq += dS k
//   by key      k, v     q, dout    k q^T, v dout^T             dk += dS q, dv += P dout
//
// P = 2^(S - lse), dS = P (dP - delta) in fp32, rounded to 16 bits as the A operand of the sums
// where it is: P and dS never leave registers, no two warps add to one element. delta = rowsum(dout
// out). S and dP are computed twice: seven products instead of five, and no exchange through shared
// memory.
//
// Grid: B * H blocks of up to 6 warps (8 above head dim 64), two on a multiprocessor where shared
// memory allows. Shared memory: the four operands (197 x 64: 106 KB), one barrier; or two operands
// and of the rows one tile a warp, the next under way while one is computed, three barriers. Least
// traffic: five operands in, three out, 620 MB at B 256, H 12, N 197, D 64 (129 us at 4.8 TB/s);
// 107 GFLOP. Launch settings: attention_plan_sm80.h.
#include "attention/attention_sm80.cuh"

namespace vitkernels::attention {
namespace {

using namespace sm80;

// Where the operands of a pass are in shared memory, in the order of the map: tiles of the rows
// (all, or one a warp), and the columns.
struct Pass {
  char *rows[2], *columns[2];
};

// Begins to copy COUNT tiles of a pass's rows from `tile` on, or of its columns.
template <int HEAD_DIM, bool KEYS>
VK_DEVICE void begin_operands(char* const (&to)[2], const Args& a, const Head& head, int tile,
                              int count, int thread, int threads) {
  const int N = KEYS ? a.Nk : a.Nq;
  begin_pair<HEAD_DIM>(to[0], rows_of(KEYS ? a.k : a.q, head, N), to[1],
                       rows_of(KEYS ? a.v : a.dout, head, N), tile * kTile, count * kTile, a.D,
                       thread, threads);
}

// lse in units of log2 (0 where it is -inf) and delta of each query, for after the block's barrier.
template <DType TYPE>
VK_DEVICE void fill_row_sums(float2* row_sums, const Args& a, const Head& head) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 4;
  const Rows dout = rows_of(a.dout, head, a.Nq), out = rows_of(a.out, head, a.Nq);
  const float* lse = a.lse + static_cast<int64_t>(blockIdx.x) * a.Nq;
  const int step = static_cast<int>(blockDim.x) / 4;
#pragma unroll 1
  for (int row = thread / 4; row < tiles(a.Nq) * kTile; row += step) {
    float sum = 0.0f;
    if (row < a.Nq)
      for (int chunk = lane; chunk < a.D / 8; chunk += 4) {
        const uint4 x = load_streaming_16(dout.data + row * dout.stride + chunk * 8);
        const uint4 y = load_streaming_16(out.data + row * out.stride + chunk * 8);
        const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 p = unpack<TYPE>(xs[i]), q = unpack<TYPE>(ys[i]);
          sum = fmaf(p.x, q.x, fmaf(p.y, q.y, sum));
        }
      }
    sum = quad_sum(sum);
    if (lane != 0) continue;
    const float given = row < a.Nq ? lse[row] : 0.0f;
    row_sums[row] = make_float2(given == -INFINITY ? 0.0f : given * kLog2e, sum);
  }
}

// Whether delta is rowsum(P dP) instead: all keys are in one tile, where that costs nothing; `out`
// is rounded, and few keys do not average that.
VK_DEVICE bool sums_in_tile(const Args& a) { return a.Nk <= kTile; }

// Scores and dP of 16 x 16 become P and dS. of_query: lse and delta, by half of the rows, or by
// column. keys: rows of the thread's own that exist, counted from its first. A masked key has no
// gradient, whatever dP is.
template <bool BY_KEY>
VK_DEVICE void differentiate(FragmentC (&s)[2], FragmentC (&dp)[2], float2 (&of_query)[4],
                             bool sums_here, int keys) {
  bool masked[8];
  float sums[4] = {};
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = BY_KEY ? 2 * n + i % 2 : i / 2;
      masked[4 * n + i] = s[n].v[i] == -INFINITY;
      s[n].v[i] = exp2f(s[n].v[i] - of_query[query].x);
      if (!BY_KEY || i / 2 * 8 < keys) sums[query] = fmaf(s[n].v[i], dp[n].v[i], sums[query]);
    }
  if (sums_here) {
#pragma unroll
    for (int query = 0; query < (BY_KEY ? 4 : 2); ++query) {
      float sum = sums[query];
#pragma unroll
      for (int lanes = BY_KEY ? 4 : 1; lanes < (BY_KEY ? 32 : 4); lanes *= 2)
        sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      of_query[query].y = sum;
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float delta = of_query[BY_KEY ? 2 * n + i % 2 : i / 2].y;
      dp[n].v[i] = masked[4 * n + i] ? 0.0f : s[n].v[i] * (dp[n].v[i] - delta);
    }
}

template <DType TYPE, int HEAD_DIM, Masks MASKS, bool BY_KEY>
VK_DEVICE void run_pass(const Pass& pass, const Args& a, const Head& head, const float2* row_sums,
                        bool whole) {
  constexpr int kTileBytes = kTile * 2 * HEAD_DIM;
  constexpr bool kKeep = keeps_rows(HEAD_DIM, MASKS == Masks::kAny);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int row_tiles = tiles(BY_KEY ? a.Nk : a.Nq), columns = BY_KEY ? a.Nq : a.Nk;
#pragma unroll 1
  for (int tile = warp; tile < row_tiles; tile += warps) {
    const int slot = (whole ? tile : warp) * kTileBytes;
    char* const own[2] = {pass.rows[0] + slot, pass.rows[1] + slot};
    FragmentA rows_0[HEAD_DIM / 16], rows_1[HEAD_DIM / 16];
    if (!whole) {
      wait_copies<0>();
      __syncwarp();  // what its lanes have copied is there
    }
    load_tile<HEAD_DIM>(rows_0, own[0]);
    if constexpr (kKeep) load_tile<HEAD_DIM>(rows_1, own[1]);
    const auto begin_next = [&] {
      if (whole || tile + warps >= row_tiles) return;
      __syncwarp();  // all lanes have read
      begin_operands<HEAD_DIM, BY_KEY>(own, a, head, tile + warps, 1, lane, kWarp);
      commit_copies();
    };
    if constexpr (kKeep) begin_next();
    const int row = tile * kTile + lane / 4;
    float2 of_query[4];
    if constexpr (!BY_KEY) of_query[0] = row_sums[row], of_query[1] = row_sums[row + 8];
    FragmentC sums_0[HEAD_DIM / 8] = {}, sums_1[BY_KEY ? HEAD_DIM / 8 : 1] = {};
#pragma unroll 1
    for (int first = 0; first < columns; first += kTile) {
      FragmentC s[2], dp[2];
      multiply_rows<TYPE, HEAD_DIM, 2>(s, rows_0, pass.columns[0], first);
      const int column = first + lane % 4 * 2;
      finish_scores<MASKS, BY_KEY, 2>(s, a, head, row, column);
      if constexpr (!kKeep) load_tile<HEAD_DIM>(rows_1, own[1]);
      multiply_rows<TYPE, HEAD_DIM, 2>(dp, rows_1, pass.columns[1], first);
      if constexpr (BY_KEY) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float4 two = *reinterpret_cast<const float4*>(row_sums + column + n * 8);
          of_query[2 * n] = make_float2(two.x, two.y);
          of_query[2 * n + 1] = make_float2(two.z, two.w);
        }
      }
      differentiate<BY_KEY>(s, dp, of_query, sums_in_tile(a), a.Nk - row);
      if constexpr (BY_KEY)
        multiply_step<TYPE, HEAD_DIM>(sums_1, s[0], s[1], pass.columns[1], first);
      multiply_step<TYPE, HEAD_DIM>(sums_0, dp[0], dp[1], pass.columns[0], first);
    }
    if constexpr (!kKeep) begin_next();
    const HeadView& to = BY_KEY ? a.dk : a.dq;
    if (to.data != nullptr)
      store_tile<TYPE, HEAD_DIM>(sums_0, {a.scale, a.scale},
                                 rows_of(to, head, BY_KEY ? a.Nk : a.Nq), tile * kTile, a.D);
    if constexpr (BY_KEY) {
      if (a.dv.data != nullptr)
        store_tile<TYPE, HEAD_DIM>(sums_1, {1.0f, 1.0f}, rows_of(a.dv, head, a.Nk), tile * kTile,
                                   a.D);
    }
  }
}

template <DType TYPE, int HEAD_DIM, Masks MASKS>
__global__ void __launch_bounds__(kBackwardThreads<HEAD_DIM>, kBackwardBlocks<HEAD_DIM>)
    backward_kernel(Args a, int slots) {
  check_launch_bounds<kBackwardThreads<HEAD_DIM>>();
  VK_DYNAMIC_SHARED(char, shared);
  constexpr int kTileBytes = kTile * 2 * HEAD_DIM;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int query_tiles = tiles(a.Nq), key_tiles = tiles(a.Nk);
  const int most = query_tiles > key_tiles ? query_tiles : key_tiles;
  const bool whole = slots == most;
  const bool by_query = a.dq.data != nullptr, by_key = a.dk.data != nullptr || a.dv.data != nullptr;
  const Head head = head_of(a, blockIdx.x);
  // Sizes of the operands' rooms in tiles: k and v, q and dout; or columns, then slots.
  const int room = whole ? key_tiles : most, other_room = whole ? query_tiles : slots;
  char* const first = shared;
  char* const second = first + 2 * room * kTileBytes;
  auto* const row_sums = reinterpret_cast<float2*>(second + 2 * other_room * kTileBytes);

  Pass pass = {{second, second + other_room * kTileBytes}, {first, first + room * kTileBytes}};
  begin_operands<HEAD_DIM, true>(pass.columns, a, head, 0, key_tiles, thread, threads);
  begin_operands<HEAD_DIM, false>(pass.rows, a, head, 0, other_room, thread, threads);
  commit_copies();
  fill_row_sums<TYPE>(row_sums, a, head);
  wait_copies<0>();
  __syncthreads();
  if (by_query) run_pass<TYPE, HEAD_DIM, MASKS, false>(pass, a, head, row_sums, whole);
  if (!by_key) return;
  if (whole) {
    pass = {{pass.columns[0], pass.columns[1]}, {pass.rows[0], pass.rows[1]}};
  } else {
    __syncthreads();  // all warps are through with the columns
    begin_operands<HEAD_DIM, false>(pass.columns, a, head, 0, query_tiles, thread, threads);
    begin_operands<HEAD_DIM, true>(pass.rows, a, head, 0, slots, thread, threads);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
  }
  run_pass<TYPE, HEAD_DIM, MASKS, true>(pass, a, head, row_sums, whole);
}

template <DType TYPE>
void launch(const Device& device, const Args& a, const Plan& p) {
  with_head_dim(a.D, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    device.launch(has_masks(a) ? backward_kernel<TYPE, kHeadDim, Masks::kAny>
                               : backward_kernel<TYPE, kHeadDim, Masks::kNone>,
                  dim3(static_cast<unsigned>(a.B) * static_cast<unsigned>(a.H)),
                  dim3(static_cast<unsigned>(p.warps * kWarp)), static_cast<size_t>(p.shared_bytes),
                  a, p.slots);
  });
}

}  // namespace

Refusal sm80_refuses_backward(const Args& args) {
  const Refusal why = refuses(args);
  if (!why.empty()) return why;
  if (!on_lines(args, args.dout, args.Nq) || !on_lines(args, args.out, args.Nq))
    return "rows of dout and out must begin on 16-byte lines";
  return "";
}

void backward_sm80(const Device& device, const Tensor& like, const Args& args) {
  const Plan p =
      is_short(args) ? backward_plan(args.Nq, args.Nk, args.D, device.architecture()) : Plan{};
  if (p.warps == 0)
    backward_sm80_long(device, like, args);
  else if (args.dtype == DType::kBF16)
    launch<DType::kBF16>(device, args, p);
  else
    launch<DType::kF16>(device, args, p);
}

}  // namespace vitkernels::attention
