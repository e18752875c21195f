// Backward of window_attention on sm_80 tensor cores: what window_attention_sm80_large.cu serves.
//
// At 16 x 16 tokens a head of a window is 128 KB of q, k, v, out, dout and gradients, 7,400 cycles
// of a multiprocessor's share of an H200's memory, 21 MFLOP, 6,500 cycles at the rate of wgmma, and
// 65,536 exponentials, 4,096 cycles.
//
// A block has one head and goes through the windows of its group, the tiles of the next under way.
// Warp w owns keys 16 w to 16 w + 15, k and v of them as A in registers; the block takes 8 F
// queries at a time: S^T = K Q^T and dP^T = V dO^T in registers, P = 2^(S - lse), dS = P (dP -
// delta) with delta = rowsum(dO O); rounded to 16 bits they are the A of dV += P^T dO and dK +=
// dS^T Q where they are. dS goes to shared memory, a row for each query: two warps make 16 rows
// each of dQ = dS K of it. Cosines: k becomes unit vectors once the warps have theirs, q chunk by
// chunk in a copy, and gradients of q and k pass through the normalisation on their way out.
//
// dbias: thread j stands for token j and has the pairs whose query lies as many rows below and
// columns right of the key, modulo the window, as token j of token 0: of each query one key. Those
// are the pairs of four entries of the table, which no other thread adds to. add_partials adds the
// blocks' columns in order.
//
// Grid: heads * groups blocks of a warp for each 16 keys; 94 KB of shared memory at 144 tokens, 162
// KB at 256; two barriers a window and two for 8 F queries. Launch settings:
// window_attention_plan_sm80_large.h.
#include "window_attention/window_attention_sm80_large.cuh"

namespace vitkernels::window_attention {
namespace {

using namespace sm80_large;

template <int F>
constexpr int kBackwardThreads = 32 * backward_warps(F);

// As backward_rows has it.
template <int F>
VK_DEVICE int rows_of(int N) {
  return F == query_fragments(kMostTokens) ? kMostTokens : padded_rows(N);
}

// What a window has in shared memory.
struct Window {
  char *q, *k, *dout, *v, *out;
  char* units;         // of the chunk's queries
  char* ds;            // of the chunk: a row of keys for each query, `pitch` bytes apart
  float* inverse;      // lengths of q and k
  float2* terms;       // of each query: lse in log2, delta
  const float* table;  // the bias
  float* lse;
  float* sums;    // of dS, see add_pairs
  float* dlogit;  // of the rows that a quad has in dQ
  Visit* visits;  // of the stages
  Tokens tokens;
};

template <int D, int F, bool COSINE>
VK_DEVICE Window lay_out(char* memory, const Args& a) {
  const int N = a.Wh * a.Ww, rows = rows_of<F>(N), tile = tile_bytes(rows, D);
  Window w;
  w.q = memory, w.k = memory + tile, w.dout = memory + 2 * tile;  // of the first stage
  w.v = memory + 6 * tile, w.out = memory + 7 * tile;
  w.units = memory + 8 * tile;
  w.ds = w.units + (COSINE ? 8 * F * 2 * D : 0);
  auto* const table = reinterpret_cast<float*>(w.ds + 8 * F * score_pitch(rows));
  w.table = table;
  w.tokens = tokens_at(table + table_floats(a.table_rows()), rows);
  w.inverse = reinterpret_cast<float*>(w.tokens.regions + rows);
  w.terms = reinterpret_cast<float2*>(w.inverse + (COSINE ? 2 * rows : 0));
  w.lse = reinterpret_cast<float*>(w.terms + rows);
  w.sums = w.lse + rows;
  w.dlogit = w.sums + 4 * rows;
  w.visits = reinterpret_cast<Visit*>(w.dlogit + kLogitSums);
  return w;
}

// A padded query's P is 0.
template <DType TYPE, int D>
VK_DEVICE void fill_terms(const Window& w, int N) {
  constexpr int kChunks = D / 8;
#pragma unroll 1
  for (int pass = 0; pass < kChunks / 2; ++pass) {  // two threads a row
    const int i = static_cast<int>(threadIdx.x + pass * blockDim.x), row = i / kChunks;
    const auto* x = reinterpret_cast<const uint32_t*>(chunk_at<D>(w.dout, row, i % kChunks));
    const auto* y = reinterpret_cast<const uint32_t*>(chunk_at<D>(w.out, row, i % kChunks));
    float delta[1] = {0.0f};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 p = unpack<TYPE>(x[j]), q = unpack<TYPE>(y[j]);
      delta[0] = fmaf(p.x, q.x, fmaf(p.y, q.y, delta[0]));
    }
    sum_over_lanes(delta, kChunks);
    if (i % kChunks != 0) continue;
    const float lse = row < N ? w.lse[row] : INFINITY;
    const bool is_row = row >= N || lse - lse == 0.0f;  // else all of it is NaN
    w.terms[row] = make_float2(is_row ? lse * kLog2e : NAN, row < N ? delta[0] : 0.0f);
  }
}

// A warp's 16 keys: their rows, and what it has summed over queries.
template <int D>
struct Keys {
  FragmentA k[D / 16], v[D / 16];
  RowPair rows;
  FragmentC dk[D / 8] = {}, dv[D / 8] = {};
};

// P and dS of the keys with the 16 queries from `first` on, which are row `row` on of the chunk;
// CAREFUL: with `count` times eight of them.
template <DType TYPE, int D, bool COSINE, bool CAREFUL>
VK_DEVICE void add_queries(Keys<D>& keys, const Window& w, int seams, int first, int row, int count,
                           int pitch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  FragmentC p[2] = {}, ds[2] = {};
  multiply_columns<TYPE, D, 2, CAREFUL>(p, keys.k, w.q, first, count);
  multiply_columns<TYPE, D, 2, CAREFUL>(ds, keys.v, w.dout, first, count);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    if (CAREFUL && n >= count) {
      p[n] = ds[n] = {};
      continue;
    }
    finish_scores<COSINE, CAREFUL>(p[n], keys.rows, w.tokens, w.inverse, seams, first + n * 8);
    const float4 terms = *reinterpret_cast<const float4*>(w.terms + first + n * 8 + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float &x = p[n].v[i], &dx = ds[n].v[i];
      const bool masked = CAREFUL && x == -INFINITY;  // no gradient, whatever P and dP are
      x = exp2_approx(x - (i % 2 == 0 ? terms.x : terms.z));
      dx = masked ? 0.0f : x * (dx - (i % 2 == 0 ? terms.y : terms.w));
    }
  }
  multiply_step<TYPE, D>(keys.dv, as_rows<TYPE>(p[0], p[1]), w.dout, first / 16);
  const FragmentA a = as_rows<TYPE>(ds[0], ds[1]);
  if constexpr (COSINE)
    multiply_step<TYPE, D>(keys.dk, a, w.units, row / 16);
  else
    multiply_step<TYPE, D>(keys.dk, a, w.q, first / 16);
  // Register r: key r % 2 * 8 further, queries r / 2 * 8 further.
  char* const at = w.ds + (row + lane % 4 * 2) * pitch + (keys.rows.first + lane / 4) * 2;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    char* const pair = at + r / 2 * 8 * pitch + r % 2 * 16;
    *reinterpret_cast<uint16_t*>(pair) = static_cast<uint16_t>(a.r[r]);
    *reinterpret_cast<uint16_t*>(pair + pitch) = static_cast<uint16_t>(a.r[r] >> 16);
  }
}

// A row of dS: queries of the chunk from its row `first` on, 16 of them, times all keys.
template <DType TYPE, int D>
VK_DEVICE void multiply_keys(FragmentC (&dq)[D / 8], const char* ds, char* k, int first, int N,
                             int pitch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const char* at = ds + (first + lane % 16) * pitch + lane / 16 * 16;
#pragma unroll 2
  for (int step = 0; step < row_tiles(N); ++step) {
    FragmentA a;
    load_matrices(a.r, at + step * 32);
    multiply_step<TYPE, D>(dq, a, k, step);
  }
}

// Adds thread j's pairs with the chunk's queries, rows `below` and columns `right` of the key
// modulo the window, to its four sums, which lie N apart: of those that wrap in no, this, that,
// both ways.
template <DType TYPE, int F>
VK_DEVICE void add_pairs(const Window& w, const Args& a, int first, int pitch) {
  const int N = a.Wh * a.Ww, end = min(first + 8 * F, N), j = static_cast<int>(threadIdx.x);
  const int below = w.tokens.places[j] >> 16, right = w.tokens.places[j] & 0xffff;
  const char* at = w.ds + (first - j) * 2;
  for (int query = first; query < end;) {  // in one row of the window after another
    const int packed = w.tokens.places[query], x = packed & 0xffff;
    const bool wraps = (packed >> 16) < below;
    const int run = min(a.Ww - x, end - query);
    const char* row = at + (wraps ? N * 2 : 0);
    float straight = 0.0f, wrapped = 0.0f;
#pragma unroll 2
    for (int i = 0; i < run; ++i) {
      const bool round = x + i < right;
      const auto* key =
          reinterpret_cast<const uint16_t*>(row + i * (pitch + 2) + (round ? a.Ww * 2 : 0));
      const float ds = unpack<TYPE>(static_cast<uint32_t>(*key)).x;
      if (round)
        wrapped += ds;
      else
        straight += ds;
    }
    float* const sums = w.sums + (wraps ? 2 * N : 0) + j;
    sums[0] += straight;
    sums[N] += wrapped;
    at += run * (pitch + 2);
    query += run;
  }
}

// The unit vectors of the chunk's queries.
template <DType TYPE, int D, int F>
VK_DEVICE void fill_units(const Window& w, int first, int N) {
  constexpr int kChunks = D / 8;
  const int count = min(8 * F, padded_rows(N) - first) * kChunks;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const int row = i / kChunks;
    const float by = w.inverse[first + row];
    const auto* from =
        reinterpret_cast<const uint32_t*>(chunk_at<D>(w.q, first + row, i % kChunks));
    auto* to = reinterpret_cast<uint32_t*>(chunk_at<D>(w.units, row, i % kChunks));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 x = unpack<TYPE>(from[j]);
      to[j] = pack<TYPE>(x.x * by, x.y * by);
    }
  }
}

// A warp's 16 rows from `first` on.
template <DType TYPE, int D>
VK_DEVICE void make_units(char* tile, int first, const float* inverse) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane < 16) make_unit<TYPE, D>(tile, first + lane, inverse[first + lane]);
  __syncwarp();
}

// The block's column of dbias_table.
VK_DEVICE void store_column(float* column, const float* sums, const Args& a) {
  const int across = 2 * a.Ww - 1, N = a.Wh * a.Ww;
  for (int t = static_cast<int>(threadIdx.x); t < a.table_rows();
       t += static_cast<int>(blockDim.x)) {
    const int dy = t / across - (a.Wh - 1), dx = t % across - (a.Ww - 1);
    const int below = dy < 0 ? dy + a.Wh : dy, right = dx < 0 ? dx + a.Ww : dx;
    column[t] = sums[((dy < 0 ? 2 : 0) + (dx < 0 ? 1 : 0)) * N + below * a.Ww + right];
  }
}

// partial: (groups, heads, rows of the table + 1), the last of a column for dlogit_scale.
template <DType TYPE, int D, int F, bool COSINE>
__global__ void __launch_bounds__(kBackwardThreads<F>, 1)
    backward_kernel(Args a, int64_t groups, float* partial) {
  check_launch_bounds<kBackwardThreads<F>>();
  VK_SWIZZLED_SHARED(char, memory);
  const int N = a.Wh * a.Ww, rows = rows_of<F>(N), tile = tile_bytes(rows, D);
  const int pitch = score_pitch(rows);
  Window w = lay_out<D, F, COSINE>(memory, a);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.heads));
  const int64_t group = blockIdx.x / static_cast<unsigned>(a.heads);
  const int64_t windows = static_cast<int64_t>(a.B) * (a.H / a.Wh) * (a.W / a.Ww);
  const int64_t begin = group * windows / groups;
  int left = static_cast<int>((group + 1) * windows / groups - begin);
  const int width = a.heads * D;
  const int key = warp * 16;

  fill_tokens(w.tokens, a, N, 1);
  fill_bias(const_cast<float*>(w.table), a, head);
  clear_rows<D>(memory, 8, tile, N);
  if (thread == 0) w.visits[left & 1] = {place_of(a, begin), head, begin, head_factor(a, head)};
  const auto begin_stage = [&](const Visit& visit, int parity) {  // q, k and dout
    char* const stage = memory + parity * 3 * tile;
    begin_rows<D, 2>(stage, tile, a, a.qkv, visit.head * D, width, visit.place, w.tokens.places, N);
    begin_rows<D, 1>(stage + 2 * tile, tile, a, a.dout, visit.head * D, 0, visit.place,
                     w.tokens.places, N);
    commit_copies();
  };
  const auto begin_rest = [&](const Visit& visit) {  // v, out and lse
    begin_rows<D, 1>(w.v, tile, a, a.qkv, visit.head * D + 2 * width, 0, visit.place,
                     w.tokens.places, N);
    begin_rows<D, 1>(w.out, tile, a, a.out, visit.head * D, 0, visit.place, w.tokens.places, N);
    if (thread < N) copy_async<4>(w.lse + thread, lse_of(a, visit) + thread);
    commit_copies();
  };
  for (int i = thread; i < 4 * N; i += static_cast<int>(blockDim.x)) w.sums[i] = 0.0f;
  if (thread < kLogitSums) w.dlogit[thread] = 0.0f;
  __syncthreads();
  begin_stage(w.visits[left & 1], left & 1);
  begin_rest(w.visits[left & 1]);

  for (; left > 0; --left) {
    w.q = memory + (left & 1) * 3 * tile, w.k = w.q + tile, w.dout = w.k + tile;
    const Visit& visit = w.visits[left & 1];
    wait_copies<0>();
    __syncthreads();  // this window's tiles are there, and nobody reads the other's
    if (left > 1) begin_stage(advance_visit(a, w.visits, left & 1), 1 - (left & 1));
    Keys<D> keys;
    load_rows<D>(keys.k, w.k, key);
    load_rows<D>(keys.v, w.v, key);
    fill_terms<TYPE, D>(w, N);
    if constexpr (COSINE) fill_inverse_lengths<TYPE, D>(w.inverse, w.q, rows);
    __syncthreads();  // v, out and lse have been read
    if (left > 1) begin_rest(w.visits[1 - (left & 1)]);
    if constexpr (COSINE) {
      make_units<TYPE, D>(w.k, key, w.inverse + rows);
      fill_units<TYPE, D, F>(w, 0, N);
      __syncthreads();
    }
    const int seams = seam_bits(a, visit.place);
    keys.rows =
        row_pair<COSINE>(a, w.table, w.tokens, w.inverse + rows, visit.factor * kLog2e, key);

#pragma unroll 1
    for (int first = 0; first < N; first += 8 * F) {
      const bool plain = seams == 0 && first + 8 * F <= N && key + 16 <= N;
#pragma unroll 1
      for (int row = 0; row < 8 * F; row += 16) {
        if (plain)
          add_queries<TYPE, D, COSINE, false>(keys, w, seams, first + row, row, 2, pitch);
        else if (first + row < N)
          add_queries<TYPE, D, COSINE, true>(keys, w, seams, first + row, row,
                                             (N - first - row + 7) / 8, pitch);
      }
      __syncthreads();  // dS is there; nobody needs these rows of q and dout, nor the units
      if (a.dbias_table != nullptr && thread < N) add_pairs<TYPE, F>(w, a, first, pitch);
      const int part = (static_cast<int>(blockDim.x) / kWarp - 1 - warp) * 16;  // the last warps
      const bool wanted = a.dqkv.data != nullptr || a.dlogit_scale != nullptr;
      if (wanted && part < 8 * F && first + part < N) {
        const int row = first + part + lane / 4;
        FragmentC dq[D / 8] = {};
        multiply_keys<TYPE, D>(dq, w.ds, w.k, part, N, pitch);
        if constexpr (COSINE) {
          make_units<TYPE, D>(w.q, first + part, w.inverse);
          const float sum = through_unit<TYPE, D>(dq, w.q, w.inverse, row, {row < N, row + 8 < N});
          if (lane % 4 == 0) w.dlogit[(part + lane / 2) / 2] += sum;
        }
        if (a.dqkv.data != nullptr)
          store_rows<TYPE, D>(dq, {visit.factor, visit.factor}, w.q, a, a.dqkv, visit.head * D,
                              visit.place, w.tokens.places, N, first + part);
      }
      if (first + 8 * F >= N) break;
      if constexpr (COSINE) fill_units<TYPE, D, F>(w, first + 8 * F, N);
      __syncthreads();  // dS has been read
    }

    if (a.dqkv.data != nullptr) {  // nobody needs dout now: its rows are the way out
      const int row = key + lane / 4;
      if constexpr (COSINE)
        through_unit<TYPE, D>(keys.dk, w.k, w.inverse + rows, row, {row < N, row + 8 < N});
      store_rows<TYPE, D>(keys.dk, {visit.factor, visit.factor}, w.dout, a, a.dqkv,
                          visit.head * D + width, visit.place, w.tokens.places, N);
      store_rows<TYPE, D>(keys.dv, {1.0f, 1.0f}, w.dout, a, a.dqkv, visit.head * D + 2 * width,
                          visit.place, w.tokens.places, N);
    }
  }

  if (partial == nullptr) return;
  float* const column = partial + static_cast<int64_t>(blockIdx.x) * (a.table_rows() + 1);
  __syncthreads();  // the sums are there, and nobody reads lengths or terms
  store_column(column, w.sums, a);
  if constexpr (COSINE) {
    float total[1] = {thread < kLogitSums ? w.dlogit[thread] * w.visits[1].factor : 0.0f};
    sum_over_block(total, reinterpret_cast<float*>(w.terms));
    if (thread == 0) column[a.table_rows()] = total[0];
  }
}

template <DType TYPE, bool COSINE>
void launch(const Device& device, const Tensor& like, const Args& a) {
  const auto p = sm80_large::plan(a.windows(), a.tokens(), a.table_rows(), a.heads, a.D,
                                  device.multiprocessors(), device.architecture(), COSINE, true);
  OptTensor scratch;
  float* partial = nullptr;
  if (a.dbias_table != nullptr || a.dlogit_scale != nullptr) {
    const int64_t columns = static_cast<int64_t>(a.heads) * (a.table_rows() + 1);
    scratch = empty_like_shape(like, {p.groups, columns}, ScalarType::Float);
    partial = static_cast<float*>(scratch->mutable_data_ptr());
  }
  device.launch(p.fragments == 6 ? backward_kernel<TYPE, 32, 6, COSINE>
                                 : backward_kernel<TYPE, 32, 4, COSINE>,
                dim3(static_cast<unsigned>(p.blocks)), dim3(static_cast<unsigned>(kWarp * p.warps)),
                static_cast<size_t>(p.shared_bytes), a, p.groups, partial);
  if (partial != nullptr) add_partials(device, a, p.groups, partial);
}

}  // namespace

void sm80::backward_large(const Device& device, const Tensor& like, const Args& args) {
  const bool cosine = args.logit_scale != nullptr;
  if (args.dtype == DType::kBF16)
    cosine ? launch<DType::kBF16, true>(device, like, args)
           : launch<DType::kBF16, false>(device, like, args);
  else
    cosine ? launch<DType::kF16, true>(device, like, args)
           : launch<DType::kF16, false>(device, like, args);
}

}  // namespace vitkernels::window_attention
