// window_attention for any dtype, window, shift, head dim, stride and alignment: IEEE fp32
// products.
//
//   forward    grid: (window, head, 16 rows); scores of the rows stand in shared memory, a warp has
//              two of them. K, then V go through it in tiles of 32 tokens, a token to a lane.
//   backward   grid: (chunk of the windows, head), so that a block sums the table's gradient of its
//              windows in shared memory. A window's rows (queries), eight at a time, give dq and
//              the table's gradient; then its columns (keys), eight at a time, dk and dv. Scores
//              and probabilities are computed anew in both.
//   finish     adds the chunks' sums in order.
//
// Memory per block: simt_forward_plan, simt_backward_plan; at most 1024 tokens and a head dim of
// 128. Tokens are found in place: the window's row r is the map's row (r + shift) mod H.
#include "window_attention/window_attention_cuda.h"
#include "window_attention/window_attention_plan_simt.h"

namespace vitkernels::window_attention {
namespace {

constexpr float kShortest = 1e-12f;                   // of a vector in cosine attention
constexpr float kMaxLogitScale = 4.605170185988092f;  // ln 100

VK_DEVICE float infinity() { return bits_to_float(0x7f800000u); }
VK_DEVICE bool is_infinite(float x) { return fabsf(x) == infinity(); }

VK_DEVICE float max_over_warp(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, v, offset);
    v = other > v ? other : v;
  }
  return v;
}

VK_DEVICE float sum_over_warp(float v) {
  float one[1] = {v};
  sum_over_lanes(one, kWarp);
  return one[0];
}

// ---- A sum in two numbers, so that what it loses by rounding does not add up over the windows

struct alignas(8) Sum {
  float high = 0.0f, low = 0.0f;

  VK_DEVICE void add(float value) {  // Knuth's two-sum
    const float sum = high + value, part = sum - high;
    low += (high - (sum - part)) + (value - part);
    high = sum;
  }
  VK_DEVICE void add_product(float a, float b) {
    const float product = a * b;
    low += fmaf(a, b, -product);
    add(product);
  }
};

VK_DEVICE Sum sum_over_warp(Sum sum) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float high = __shfl_xor_sync(kAllLanes, sum.high, offset);
    const float low = __shfl_xor_sync(kAllLanes, sum.low, offset);
    sum.add(high);
    sum.low += low;
  }
  return sum;
}

// ---- Where things are

// One window of one head.
struct Window {
  int sample, head, row, column;  // of its first token, in the shifted map
  int64_t index;                  // in (B, windows, heads)

  VK_DEVICE Window(const Args& a, int64_t window, int head) : head(head) {
    const int across = a.W / a.Ww, per_map = a.H / a.Wh * across;
    const int in_map = static_cast<int>(window % per_map);
    sample = static_cast<int>(window / per_map);
    row = in_map / across * a.Wh;
    column = in_map % across * a.Ww;
    index = window * a.heads + head;
  }
};

// The first channel of the head's part (0 = q, 1 = k, 2 = v; 0 of a map that is not packed) of a
// token, in elements.
VK_DEVICE int64_t address(const Args& a, const MapView& map, const Window& w, int token, int part) {
  int row = w.row + token / a.Ww + a.shift_h, column = w.column + token % a.Ww + a.shift_w;
  row = row >= a.H ? row - a.H : row;
  column = column >= a.W ? column - a.W : column;
  return w.sample * map.batch + row * map.row + column * map.column +
         (static_cast<int64_t>(part) * a.heads + w.head) * a.D;
}

// Which side of the map's two seams a token lies on.
VK_DEVICE int region(const Args& a, const Window& w, int token) {
  const int row = w.row + token / a.Ww, column = w.column + token % a.Ww;
  return (a.shift_h > 0 && row >= a.H - a.shift_h ? 2 : 0) +
         (a.shift_w > 0 && column >= a.W - a.shift_w ? 1 : 0);
}

// The row of the table for query i and key j.
VK_DEVICE int table_row(const Args& a, int i, int j) {
  return (i / a.Ww - j / a.Ww + a.Wh - 1) * (2 * a.Ww - 1) + i % a.Ww - j % a.Ww + a.Ww - 1;
}

VK_DEVICE float logit(const Args& a, int head) {
  return load_scalar(a.logit_scale, a.logit_dtype, head * a.logit_step);
}

// What the product of q and k, or their cosine, is multiplied with.
VK_DEVICE float factor(const Args& a, int head) {
  if (a.logit_scale == nullptr) return a.scale;
  const float value = logit(a, head);
  return expf(value > kMaxLogitScale ? kMaxLogitScale : value);
}

VK_DEVICE float masked_score(const Args& a, const Window& w, float product, int i, int j) {
  const bool apart = region(a, w, i) != region(a, w, j);
  const int64_t at = table_row(a, i, j) * a.bias_row + w.head * a.bias_head;
  return apart ? -infinity() : product + load_scalar(a.bias_table, a.bias_dtype, at);
}

VK_DEVICE float dropout_factor(const Args& a, uint64_t seed, const Window& w, int i, int j) {
  if (a.dropout.seed == nullptr) return 1.0f;
  const int64_t N = a.tokens();
  return keeps(a.dropout, seed, static_cast<uint64_t>((w.index * N + i) * N + j)) ? a.dropout.scale
                                                                                  : 0.0f;
}
VK_DEVICE uint64_t seed_of(const Args& a) {
  return a.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*a.dropout.seed);
}

// The lengths of the tokens first to first + count - 1 of q or k, for cosines, by the whole block.
VK_DEVICE void measure(const Args& a, const Window& w, int part, int first, int count,
                       float* lengths) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int token = first + warp; token < first + count && token < a.tokens(); token += kSimtWarps) {
    const int64_t at = address(a, a.qkv, w, token, part);
    float squares = 0.0f;
    for (int d = lane; d < a.D; d += kWarp) {
      const float x = load_scalar(a.qkv.data, a.dtype, at + d);
      squares = fmaf(x, x, squares);
    }
    squares = sum_over_warp(squares);
    if (lane == 0) lengths[token] = sqrtf(squares);
  }
}

// Tokens first, first + 1, ... of one part of a window to rows of shared memory, by the whole
// block; times `scale`, or divided by their lengths where these are given. Rows past the window's
// end are 0.
VK_DEVICE void load_rows(const Args& a, const MapView& map, const Window& w, int part, int first,
                         int rows, float scale, const float* lengths, float* to) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int pitch = simt_pitch(a.D);
  for (int r = warp; r < rows; r += kSimtWarps) {
    const int token = first + r;
    const bool inside = token < a.tokens();
    const int64_t at = inside ? address(a, map, w, token, part) : 0;
    const float length = inside && lengths != nullptr ? lengths[token] : 1.0f;
    const float by = length < kShortest ? kShortest : length;
    for (int d = lane; d < a.D; d += kWarp) {
      const float x = inside ? load_scalar(map.data, a.dtype, at + d) : 0.0f;
      to[r * pitch + d] = lengths != nullptr ? x / by : x * scale;
    }
  }
}

// The lane's token against one row.
VK_DEVICE float dot(const float* tile, const float* row, int D, int pitch) {
  const float* mine = tile + static_cast<int>(threadIdx.x) % kWarp * pitch;
  float sum = 0.0f;
  for (int d = 0; d < D; ++d) sum = fmaf(row[d], mine[d], sum);
  return sum;
}

// ---- Forward

__global__ void __launch_bounds__(kSimtThreads, 1) simt_forward_kernel(Args a) {
  check_launch_bounds<kSimtThreads>();
  VK_DYNAMIC_SHARED(float, shared);
  const int N = a.tokens(), D = a.D, pitch = simt_pitch(D), padded = padded_tokens(N);
  float* tile = shared;                            // K, then V
  float* queries = tile + kTile * pitch;           // of the block's rows, scaled
  float* scores = queries + kForwardRows * pitch;  // then probabilities
  // Of q and k, for cosines alone.
  float* lengths = a.logit_scale == nullptr ? nullptr : scores + kForwardRows * padded;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int groups = (N + kForwardRows - 1) / kForwardRows;
  const int64_t items = a.windows() * a.heads * groups;
  const uint64_t seed = seed_of(a);
  constexpr int kRows = kForwardRows / kSimtWarps;

  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int first = static_cast<int>(item % groups) * kForwardRows;
    const Window w(a, item / groups / a.heads, static_cast<int>(item / groups % a.heads));
    const float cosine_factor = factor(a, w.head);
    __syncthreads();  // the item before is done with shared memory
    if (lengths != nullptr) {
      measure(a, w, 0, first, kForwardRows, lengths);
      measure(a, w, 1, 0, N, lengths + N);
      __syncthreads();
    }
    load_rows(a, a.qkv, w, 0, first, kForwardRows, a.scale, lengths, queries);
    for (int k = 0; k < N; k += kTile) {
      __syncthreads();
      load_rows(a, a.qkv, w, 1, k, kTile, 1.0f, lengths == nullptr ? nullptr : lengths + N, tile);
      __syncthreads();
      for (int r = warp * kRows; r < warp * kRows + kRows; ++r) {
        const int i = first + r, j = k + lane;
        if (i >= N) break;
        float s = dot(tile, queries + r * pitch, D, pitch);
        if (a.logit_scale != nullptr) s *= cosine_factor;
        scores[r * padded + j] = j < N ? masked_score(a, w, s, i, j) : -infinity();
      }
    }
    // A lane reads what it has written.
    for (int r = warp * kRows; r < warp * kRows + kRows; ++r) {
      const int i = first + r;
      if (i >= N) break;
      float* row = scores + r * padded;
      float most = -infinity();
      for (int j = lane; j < N; j += kWarp) most = row[j] > most ? row[j] : most;
      most = max_over_warp(most);
      // An infinite row has the probabilities that exp(s - lse) gives it.
      const float shift = is_infinite(most) ? 0.0f : most;
      float sum = 0.0f;
      for (int j = lane; j < N; j += kWarp) sum += expf(row[j] - shift);
      sum = sum_over_warp(sum);
      const float lse = shift + logf(sum), by = is_infinite(most) ? 1.0f : 1.0f / sum;
      const float subtract = is_infinite(most) ? lse : most;
      for (int j = lane; j < padded; j += kWarp) {
        const float p = j < N ? expf(row[j] - subtract) * by : 0.0f;
        row[j] = j < N ? p * dropout_factor(a, seed, w, i, j) : 0.0f;
      }
      if (lane == 0) a.lse[w.index * N + i] = lse;
    }
    float sums[kRows][4] = {};
    for (int k = 0; k < N; k += kTile) {
      __syncthreads();
      load_rows(a, a.qkv, w, 2, k, kTile, 1.0f, nullptr, tile);
      __syncthreads();
      const int end = N - k < kTile ? N - k : kTile;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int d = c * kWarp + lane;
          if (first + warp * kRows + r >= N || d >= D) continue;
          const float* row = scores + (warp * kRows + r) * padded + k;
          float sum = 0.0f;  // of the tile alone: sums of sums round less
          for (int j = 0; j < end; ++j) sum = fmaf(row[j], tile[j * pitch + d], sum);
          sums[r][c] += sum;
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int i = first + warp * kRows + r, d = c * kWarp + lane;
        if (i < N && d < D)
          store_scalar(a.out.data, a.dtype, address(a, a.out, w, i, 0) + d, sums[r][c]);
      }
  }
}

// ---- Backward

// Sums of dS over the windows of a chunk: of the table, (chunks, heads, rows), and of dS times the
// cosine, (chunks, heads).
struct Partials {
  float *table, *cosine;
  int chunks;
};

// The gradient of x for that of x / length, of one row by one warp: dunit (c: D's lanes) in, dx
// out.
VK_DEVICE void unit_backward(const float* unit, float length, int D, float (&dunit)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float along = 0.0f;
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (c * kWarp + lane < D) along = fmaf(unit[c * kWarp + lane], dunit[c], along);
  along = sum_over_warp(along);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int d = c * kWarp + lane;
    if (d < D) dunit[c] = length < kShortest ? 0.0f : (dunit[c] - unit[d] * along) / length;
  }
}

// What both passes of the backward over a window share.
struct Backward {
  const Args& a;
  const Window& w;
  float by;  // factor
  uint64_t seed;
  int first;  // of the rows (or columns) at hand
  float *tile_a, *tile_b, *rows_a, *rows_b, *p, *ds;
  const float *lse, *delta;  // lse in global memory, delta (high, low) of each token in shared
  const float *q_lengths, *k_lengths;  // for cosines alone

  // From scores' and dP's ingredients to the probability; dp is left as dropout leaves it.
  VK_DEVICE float probability(float product, int i, int j, float* s) const {
    *s = masked_score(a, w, a.logit_scale != nullptr ? product * by : product, i, j);
    return expf(*s - lse[i]);
  }
};

// rows[r] (of D) += the sum over the tile's tokens of values[r][k + t] tile[t].
VK_DEVICE void accumulate(const float* values, const float* tile, int end, int D, int pitch,
                          float (&sums)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int d = c * kWarp + lane;
    if (d >= D) continue;
    float sum = 0.0f;  // of the tile alone: sums of sums round less
    for (int t = 0; t < end; ++t) sum = fmaf(values[t], tile[t * pitch + d], sum);
    sums[c] += sum;
  }
}

VK_DEVICE void store_row(const Args& a, const Window& w, int token, int part,
                         const float (&values)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t at = address(a, a.dqkv, w, token, part);
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (c * kWarp + lane < a.D)
      store_scalar(a.dqkv.data, a.dtype, at + c * kWarp + lane, values[c]);
}

// Queries first to first + 7, one to a warp: delta, dq, the table's and the factor's gradient.
VK_DEVICE void query_rows(const Backward& b, float* delta, Sum* table, Sum* dfactor) {
  const Args& a = b.a;
  const int N = a.tokens(), D = a.D, pitch = simt_pitch(D), padded = padded_tokens(N);
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int i = b.first + warp;
  const bool mine = i < N;
  float *p = b.p + warp * padded, *ds = b.ds + warp * padded;
  __syncthreads();
  load_rows(a, a.qkv, b.w, 0, b.first, kBackwardRows, a.scale, b.q_lengths, b.rows_a);
  load_rows(a, a.dout, b.w, 0, b.first, kBackwardRows, 1.0f, nullptr, b.rows_b);
  Sum sum;
  for (int k = 0; k < N; k += kTile) {
    __syncthreads();
    load_rows(a, a.qkv, b.w, 1, k, kTile, 1.0f, b.k_lengths, b.tile_a);
    load_rows(a, a.qkv, b.w, 2, k, kTile, 1.0f, nullptr, b.tile_b);
    __syncthreads();
    const int j = k + lane;
    if (!mine || j >= N) continue;
    float s;
    const float probability =
        b.probability(dot(b.tile_a, b.rows_a + warp * pitch, D, pitch), i, j, &s);
    const float dp =
        dot(b.tile_b, b.rows_b + warp * pitch, D, pitch) * dropout_factor(a, b.seed, b.w, i, j);
    sum.add_product(probability, dp);
    p[j] = s == -infinity() ? -1.0f : probability;  // -1: masked
    ds[j] = dp;
  }
  sum = sum_over_warp(sum);
  if (mine) {
    for (int j = lane; j < padded; j += kWarp) {
      const bool masked = j >= N || p[j] == -1.0f;
      ds[j] = masked ? 0.0f : p[j] * ((ds[j] - sum.high) - sum.low);
    }
    if (lane == 0) delta[2 * i] = sum.high, delta[2 * i + 1] = sum.low;
  }
  __syncthreads();

  if (table != nullptr) {  // a thread has the pairs of its own rows of the table
    const int across = 2 * a.Ww - 1, rows = a.table_rows();
    for (int t = static_cast<int>(threadIdx.x); t < rows; t += kSimtThreads) {
      const int dy = t / across - (a.Wh - 1), dx = t % across - (a.Ww - 1);
      Sum total = table[t];
      for (int r = 0; r < kBackwardRows && b.first + r < N; ++r) {
        const int y = (b.first + r) / a.Ww - dy, x = (b.first + r) % a.Ww - dx;
        if (y >= 0 && y < a.Wh && x >= 0 && x < a.Ww) total.add(b.ds[r * padded + y * a.Ww + x]);
      }
      table[t] = total;
    }
  }
  if (a.dqkv.data == nullptr && dfactor == nullptr) return;
  float dq[4] = {};
  for (int k = 0; k < N; k += kTile) {
    __syncthreads();
    load_rows(a, a.qkv, b.w, 1, k, kTile, 1.0f, b.k_lengths, b.tile_a);
    __syncthreads();
    if (mine) accumulate(ds + k, b.tile_a, N - k < kTile ? N - k : kTile, D, pitch, dq);
  }
  if (!mine) return;
  if (a.logit_scale != nullptr) {  // the sum over j of dS times the cosine is q's unit times dq
    const float* unit = b.rows_a + warp * pitch;
    float along = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (c * kWarp + lane < D) along = fmaf(unit[c * kWarp + lane], dq[c], along);
    along = sum_over_warp(along);
    if (dfactor != nullptr && lane == 0) dfactor[warp].add(along);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) dq[c] *= b.by;
  if (a.logit_scale != nullptr) unit_backward(b.rows_a + warp * pitch, b.q_lengths[i], D, dq);
  if (a.dqkv.data != nullptr) store_row(a, b.w, i, 0, dq);
}

// Keys first to first + 7, one to a warp: dk and dv.
VK_DEVICE void key_columns(const Backward& b) {
  const Args& a = b.a;
  const int N = a.tokens(), D = a.D, pitch = simt_pitch(D), padded = padded_tokens(N);
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int j = b.first + warp;
  const bool mine = j < N;
  float *p = b.p + warp * padded, *ds = b.ds + warp * padded;
  __syncthreads();
  load_rows(a, a.qkv, b.w, 1, b.first, kBackwardRows, 1.0f, b.k_lengths, b.rows_a);
  load_rows(a, a.qkv, b.w, 2, b.first, kBackwardRows, 1.0f, nullptr, b.rows_b);
  float dk[4] = {}, dv[4] = {};
  for (int k = 0; k < N; k += kTile) {
    __syncthreads();
    load_rows(a, a.qkv, b.w, 0, k, kTile, a.scale, b.q_lengths, b.tile_a);
    load_rows(a, a.dout, b.w, 0, k, kTile, 1.0f, nullptr, b.tile_b);
    __syncthreads();
    const int i = k + lane;
    if (mine && i < N) {
      float s;
      const float probability =
          b.probability(dot(b.tile_a, b.rows_a + warp * pitch, D, pitch), i, j, &s);
      const float keep = dropout_factor(a, b.seed, b.w, i, j);
      const float dp = dot(b.tile_b, b.rows_b + warp * pitch, D, pitch) * keep;
      p[i] = probability * keep;
      ds[i] = s == -infinity() ? 0.0f : probability * ((dp - b.delta[2 * i]) - b.delta[2 * i + 1]);
    }
    __syncwarp();
    if (mine) {
      const int end = N - k < kTile ? N - k : kTile;
      accumulate(p + k, b.tile_b, end, D, pitch, dv);
      accumulate(ds + k, b.tile_a, end, D, pitch, dk);
    }
  }
  if (!mine) return;
  store_row(a, b.w, j, 2, dv);
  if (a.logit_scale != nullptr) {
#pragma unroll
    for (int c = 0; c < 4; ++c) dk[c] *= b.by;
    unit_backward(b.rows_a + warp * pitch, b.k_lengths[j], D, dk);
  }
  store_row(a, b.w, j, 1, dk);
}

__global__ void __launch_bounds__(kSimtThreads, 1) simt_backward_kernel(Args a, Partials partials) {
  check_launch_bounds<kSimtThreads>();
  VK_DYNAMIC_SHARED(float, shared);
  const int N = a.tokens(), pitch = simt_pitch(a.D), padded = padded_tokens(N);
  const int chunk = static_cast<int>(blockIdx.x) / a.heads,
            head = static_cast<int>(blockIdx.x) % a.heads, thread = static_cast<int>(threadIdx.x);
  float* tile_a = shared;
  float* tile_b = tile_a + kTile * pitch;
  float* rows_a = tile_b + kTile * pitch;
  float* rows_b = rows_a + kBackwardRows * pitch;
  float* p = rows_b + kBackwardRows * pitch;
  float* ds = p + kBackwardRows * padded;
  float* delta = ds + kBackwardRows * padded;
  float* lengths = a.logit_scale == nullptr ? nullptr : delta + 2 * N;
  Sum* dfactor = reinterpret_cast<Sum*>(delta + 4 * N);
  Sum* table = dfactor + kSimtWarps;
  for (int t = thread; t < a.table_rows(); t += kSimtThreads) table[t] = Sum();
  if (thread < kSimtWarps) dfactor[thread] = Sum();

  const float by = factor(a, head);
  const uint64_t seed = seed_of(a);
  for (int64_t window = chunk; window < a.windows(); window += partials.chunks) {
    const Window w(a, window, head);
    if (lengths != nullptr) {
      __syncthreads();
      measure(a, w, 0, 0, N, lengths);
      measure(a, w, 1, 0, N, lengths + N);
    }
    Backward b{a,      w,       by,
               seed,   0,       tile_a,
               tile_b, rows_a,  rows_b,
               p,      ds,      a.lse + w.index * N,
               delta,  lengths, lengths == nullptr ? nullptr : lengths + N};
    __syncthreads();
    for (b.first = 0; b.first < N; b.first += kBackwardRows)
      query_rows(b, delta, partials.table == nullptr ? nullptr : table,
                 partials.cosine == nullptr ? nullptr : dfactor);
    if (a.dqkv.data == nullptr) continue;
    for (b.first = 0; b.first < N; b.first += kBackwardRows) key_columns(b);
  }
  __syncthreads();
  if (partials.table != nullptr)
    for (int t = thread; t < a.table_rows(); t += kSimtThreads)
      partials.table[static_cast<int64_t>(blockIdx.x) * a.table_rows() + t] =
          table[t].high + table[t].low;
  if (partials.cosine != nullptr && thread == 0) {
    Sum sum;
    for (int i = 0; i < kSimtWarps; ++i) sum.add(dfactor[i].high), sum.low += dfactor[i].low;
    partials.cosine[blockIdx.x] = sum.high + sum.low;
  }
}

// Row blockIdx.x * threads + thread of the table for head blockIdx.y; its first thread
// dlogit_scale.
__global__ void __launch_bounds__(kSimtThreads, 1) simt_finish_kernel(Args a, Partials partials) {
  check_launch_bounds<kSimtThreads>();
  const int head = static_cast<int>(blockIdx.y);
  const int row = static_cast<int>(blockIdx.x) * kSimtThreads + static_cast<int>(threadIdx.x);
  if (partials.table != nullptr && row < a.table_rows()) {
    Sum sum;
    for (int chunk = 0; chunk < partials.chunks; ++chunk)
      sum.add(
          partials.table[(static_cast<int64_t>(chunk) * a.heads + head) * a.table_rows() + row]);
    store_scalar(a.dbias_table, a.bias_dtype, static_cast<int64_t>(row) * a.heads + head,
                 sum.high + sum.low);
  }
  if (partials.cosine != nullptr && row == 0) {
    Sum sum;
    for (int chunk = 0; chunk < partials.chunks; ++chunk)
      sum.add(partials.cosine[chunk * a.heads + head]);
    const bool clamped = logit(a, head) > kMaxLogitScale;
    store_scalar(a.dlogit_scale, a.logit_dtype, head,
                 clamped ? 0.0f : (sum.high + sum.low) * factor(a, head));
  }
}

}  // namespace

void forward_simt(const Device& device, const Tensor&, const Args& args) {
  const SimtPlan p = simt_forward_plan(args.windows(), args.heads, args.tokens(), args.D);
  device.launch(simt_forward_kernel, dim3(static_cast<unsigned>(p.blocks)), dim3(kSimtThreads),
                static_cast<size_t>(p.shared_bytes), args);
}

void backward_simt(const Device& device, const Tensor& like, const Args& args) {
  const SimtPlan p = simt_backward_plan(args.windows(), args.heads, args.tokens(), args.D,
                                        args.table_rows(), device.multiprocessors());
  Partials partials{nullptr, nullptr, p.chunks};
  OptTensor table, cosine;
  if (args.dbias_table != nullptr) {
    table = empty_like_shape(like, {p.chunks, args.heads, args.table_rows()}, ScalarType::Float);
    partials.table = static_cast<float*>(table->mutable_data_ptr());
  }
  if (args.dlogit_scale != nullptr) {
    cosine = empty_like_shape(like, {p.chunks, args.heads}, ScalarType::Float);
    partials.cosine = static_cast<float*>(cosine->mutable_data_ptr());
  }
  device.launch(simt_backward_kernel, dim3(static_cast<unsigned>(p.blocks)), dim3(kSimtThreads),
                static_cast<size_t>(p.shared_bytes), args, partials);
  const int rows = args.dbias_table != nullptr ? args.table_rows() : 1;
  if (args.dbias_table != nullptr || args.dlogit_scale != nullptr)
    device.launch(simt_finish_kernel,
                  dim3(static_cast<unsigned>((rows + kSimtThreads - 1) / kSimtThreads),
                       static_cast<unsigned>(args.heads)),
                  dim3(kSimtThreads), 0, args, partials);
}

}  // namespace vitkernels::window_attention
