// What the sm_90 kernels of window_attention share, forward and backward: the order of a window's
// tokens, the thread that moves windows by TMA, operands of wgmma, scores.
//
// A window's tile of one head has 64 rows, its tokens in the order of window_attention_plan_sm90.h:
// each part of a window that a shift may send elsewhere is a box of its own and begins at a
// multiple of eight rows, so a seam parts groups of eight rows, never rows of one. Rows without a
// token are zero in every tile and get a bias of -inf as keys; nothing of them is stored.
//
// A warpgroup has a ring of stages in shared memory. Of each stage, `full` completes when its
// window has come, `done` when the four warps of the warpgroup have put the results in its place;
// the thread that moves windows then stores these and loads the next window there.
#pragma once

#include "common/tma.cuh"
#include "common/wgmma.cuh"
#include "window_attention/window_attention_plan_sm90.h"
#include "window_attention/window_attention_tiles.cuh"

namespace vitkernels::window_attention::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kNoToken = -1;

// A tensor map for each part of a window.
struct Maps {
  TensorMap parts[4];
};

// ---- Which windows

// What a warpgroup does: one head of the windows first to last - 1; none if it has no work.
struct Work {
  int head, group;
  int64_t first, last;
};

VK_DEVICE Work work_of(const Args& a, int64_t groups, int busy, int warpgroup) {
  const int64_t worker = static_cast<int64_t>(blockIdx.x) * busy + warpgroup;
  const int group = static_cast<int>(divide(worker, a.heads));
  const int head = static_cast<int>(worker - static_cast<int64_t>(group) * a.heads);
  if (warpgroup >= busy || group >= groups) return {head, group, 0, 0};
  const int64_t windows = static_cast<int64_t>(a.B) * (a.H / a.Wh) * (a.W / a.Ww);
  return {head, group, divide(group * windows, groups),
          divide((group + int64_t{1}) * windows, groups)};
}

// The stage and the parity of the window at hand.
template <int STAGES>
struct Ring {
  int stage = 0, parity = 0;

  VK_DEVICE void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// ---- Rows

// The packed token of a row, or kNoToken.
VK_DEVICE int token_of(const Order& order, int row) {
  for (int p = 0; p < order.count; ++p) {
    const Part& part = order.parts[p];
    const int at = row - part.row;
    if (at >= 0 && at < part.height * part.width)
      return (part.y + at / part.width) << 16 | (part.x + at % part.width);
  }
  return kNoToken;
}

// Its place among the window's tokens.
VK_DEVICE int index_of(const Args& a, int token) { return (token >> 16) * a.Ww + (token & 0xffff); }

// Zeros where no token ever comes, in `count` tiles; by the whole block.
template <int D>
VK_DEVICE void clear_padding(char* tiles, int count, const int* tokens) {
  constexpr int kChunks = D / 8;
  for (int i = static_cast<int>(threadIdx.x); i < count * kRows * kChunks;
       i += static_cast<int>(blockDim.x)) {
    const int row = i / kChunks;
    if (tokens[row % kRows] == kNoToken)
      store_16(chunk_at<D>(tiles, row, i % kChunks), make_uint4(0, 0, 0, 0));
  }
}

// ---- Moving windows

// Of each warpgroup STAGES barriers `full`, then as many `done`. One thread.
template <int STAGES>
VK_DEVICE void init_barriers(MBarrier* barriers, int warpgroups) {
  for (int i = 0; i < 2 * STAGES * warpgroups; ++i)
    mbarrier_init(barriers + i, i / STAGES % 2 == 0 ? 1 : kWarpgroup / kWarp);
  mbarrier_fence_init();
}

// One thread: loads each window of `work` into the next stage, and stores what the warpgroup has
// left there. Forward: q, k and v come, `results` is the map of out. Backward: dout comes too,
// `results` is dqkv's.
template <int D, int STAGES, bool BACKWARD>
VK_DEVICE void move_windows(char* tiles, MBarrier* full, MBarrier* done, const Maps& qkv,
                            const Maps& dout, const Maps& results, const Args& a,
                            const Order& order, const Work& work, bool stores) {
  constexpr int kTiles = BACKWARD ? 4 : 3, kStage = kTiles * tile_bytes(D);
  const int channel = work.head * D, width = a.heads * D;
  // The box of a part: x, y and the sample come after its channels.
  const auto each_part = [&](const WindowPlace& place, auto move) {
#pragma unroll 1
    for (int p = 0; p < order.count; ++p) {
      int x = place.x * a.Ww + a.shift_w + order.parts[p].x;
      int y = place.y * a.Wh + a.shift_h + order.parts[p].y;
      if (x >= a.W) x -= a.W;
      if (y >= a.H) y -= a.H;
      move(p, order.parts[p].row * 2 * D, x, y, place.b);
    }
  };
  WindowPlace coming = place_of(a, work.first), leaving = coming;
  Ring<STAGES> ring;
  for (int64_t window = work.first; window < work.last + STAGES; ++window, ring.advance()) {
    char* stage = tiles + ring.stage * kStage;
    if (window >= work.first + STAGES) {
      mbarrier_wait(&done[ring.stage], ring.parity ^ 1);
      if (stores) {
        each_part(leaving, [&](int p, int row, int x, int y, int b) {
#pragma unroll
          for (int tile = 0; tile < (BACKWARD ? 3 : 1); ++tile)
            tma_store(results.parts[p], stage + tile * tile_bytes(D) + row,
                      {tile * width + channel, x, y, b});
        });
        commit_stores();
        advance(a, leaving);
        wait_stores_read<0>();
      }
    }
    if (window < work.last) {
      mbarrier_arrive_expect(&full[ring.stage], kTiles * a.Wh * a.Ww * 2 * D);
      each_part(coming, [&](int p, int row, int x, int y, int b) {
#pragma unroll
        for (int tile = 0; tile < 3; ++tile)
          tma_load(stage + tile * tile_bytes(D) + row, qkv.parts[p], &full[ring.stage],
                   {tile * width + channel, x, y, b});
        if constexpr (BACKWARD)
          tma_load(stage + 3 * tile_bytes(D) + row, dout.parts[p], &full[ring.stage],
                   {channel, x, y, b});
      });
      advance(a, coming);
    }
  }
}

// A warp has put its results where they are stored from.
VK_DEVICE void leave_stage(MBarrier* done) {
  fence_proxy_async();
  __syncwarp();
  if (threadIdx.x % kWarp == 0) mbarrier_arrive(done);
}

// ---- Products

template <int TILES>
VK_DEVICE float (&floats(FragmentC (&c)[TILES]))[4 * TILES] {
  return reinterpret_cast<float (&)[4 * TILES]>(c);
}

VK_DEVICE void pin(FragmentA (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) pin_registers(a[i]);
}

// c = a b^T over D: 64 rows of a against the first 8 * TILES rows of b.
template <DType TYPE, int D, int TILES>
VK_DEVICE void multiply_rows(FragmentC (&c)[TILES], const char* a, const char* b) {
  constexpr auto kSwizzle = static_cast<Swizzle>(2 * D);
  const WgmmaOperand rows = wgmma_operand<kSwizzle>(a, 16, 16 * D);
  const WgmmaOperand columns = wgmma_operand<kSwizzle>(b, 16, 16 * D);
#pragma unroll
  for (int step = 0; step < D / 16; ++step)
    wgmma<TYPE>(floats(c), advanced(rows, step * 32), advanced(columns, step * 32), step > 0);
}

// 16 of the 64 rows of a tile as k: the operand whose columns are the tile's.
template <int D>
VK_DEVICE WgmmaOperand rows_as_k(const char* tile, int step) {
  return wgmma_operand<static_cast<Swizzle>(2 * D)>(tile + step * 32 * D, 16, 16 * D);
}

// c = a b: a's 64 columns in the registers of its rows, b a tile.
template <DType TYPE, int D>
VK_DEVICE void multiply(FragmentC (&c)[D / 8], const FragmentA (&a)[4], const char* b) {
#pragma unroll
  for (int step = 0; step < 4; ++step)
    wgmma<TYPE, Major::kMN>(floats(c), a[step], rows_as_k<D>(b, step), step > 0);
}

// c = a^T b: a are 64 rows of 64 in 16 bits, b a tile.
template <DType TYPE, int D>
VK_DEVICE void multiply_transposed(FragmentC (&c)[D / 8], const char* a, const char* b) {
#pragma unroll
  for (int step = 0; step < 4; ++step)
    wgmma<TYPE, Major::kMN, Major::kMN>(floats(c), rows_as_k<kRows>(a, step), rows_as_k<D>(b, step),
                                        step > 0);
}

// The thread's two rows of a result, times by[half], to their place in a tile.
template <DType TYPE, int D>
VK_DEVICE void put_rows(char* tile, const FragmentC (&x)[D / 8], const float (&by)[2], int row,
                        const bool (&inside)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!inside[half]) continue;  // padding stays zero
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<uint32_t*>(chunk_at<D>(tile, row + 8 * half, n) + lane % 4 * 4) =
          pack<TYPE>(x[n].v[2 * half] * by[half], x[n].v[2 * half + 1] * by[half]);
  }
}

// ---- Scores

// The head's bias times log2 e as the thread's fragments need it, -inf for keys that are no tokens.
template <int TILES>
VK_DEVICE void load_bias(FragmentC (&bias)[TILES], const Args& a, int head, int row,
                         const int* tokens) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = tokens[row + i / 2 * 8], key = tokens[n * 8 + lane % 4 * 2 + i % 2];
      bias[n].v[i] = key == kNoToken ? -INFINITY : 0.0f;
      if (query != kNoToken && key != kNoToken) bias[n].v[i] = position_bias(a, head, query, key);
    }
}

// From products to scores in units of log2: times `by` (with cosines, by the inverse lengths of
// query and key), plus the bias.
template <bool COSINE, int TILES>
VK_DEVICE void finish_scores(FragmentC (&s)[TILES], float by, const FragmentC (&bias)[TILES],
                             const float* inverse, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float row_by[2] = {by, by};
  if constexpr (COSINE) row_by[0] *= inverse[row], row_by[1] *= inverse[row + 8];
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    if constexpr (COSINE) {
      const float2 key = *reinterpret_cast<const float2*>(inverse + kRows + n * 8 + lane % 4 * 2);
      s[n].v[0] *= key.x, s[n].v[1] *= key.y, s[n].v[2] *= key.x, s[n].v[3] *= key.y;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n].v[i] = fmaf(s[n].v[i], row_by[i / 2], bias[n].v[i]);
  }
}

// Scores beyond the seams of this window become -inf.
template <int TILES>
VK_DEVICE void mask_seams(FragmentC (&s)[TILES], const Args& a, const Order& order,
                          const WindowPlace& place, int row) {
  const uint32_t below = place.y + 1 == a.H / a.Wh ? order.below : 0;
  const uint32_t right = place.x + 1 == a.W / a.Ww ? order.right : 0;
  if ((below | right) == 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int group = row / 8 + half;
    const uint32_t keys =
        (below >> group & 1 ? below : ~below) & (right >> group & 1 ? right : ~right);
#pragma unroll
    for (int n = 0; n < TILES; ++n)
      if ((keys >> n & 1) == 0) s[n].v[2 * half] = s[n].v[2 * half + 1] = -INFINITY;
  }
}

// ---- Host: maps, and what either direction refuses

// Maps of a (B, H, W, channels) map, whose boxes are D channels of the parts of a window.
inline Maps make_maps(const Args& a, const MapView& map, int64_t channels, const Order& order) {
  const auto stride = [&](int size, int64_t stride) { return size == 1 ? channels : stride; };
  Maps maps;
  for (int p = 0; p < 4; ++p) {
    const Part& part = order.parts[p < order.count ? p : 0];
    maps.parts[p] = make_tensor_map(
        map.data, a.dtype,
        {4,
         {channels, a.W, a.H, a.B, 1},
         {1, stride(a.W, map.column), stride(a.H, map.row), stride(a.B, map.batch), 1},
         {a.D, part.width, part.height, 1, 1}},
        static_cast<Swizzle>(2 * a.D));
  }
  return maps;
}

// Why TMA cannot read a map, or nothing.
inline Refusal refuses_map(const Args& a, const MapView& map, const char* name) {
  if (!on_lines(a, map)) return std::string("pixels of ") + name + " must begin on 16-byte lines";
  const auto fits = [](int size, int64_t stride) {
    return size == 1 || (stride > 0 && stride < int64_t{1} << 39);
  };
  if (!fits(a.B, map.batch) || !fits(a.H, map.row) || !fits(a.W, map.column))
    return std::string("it takes no ") + name + " that is expanded";
  return "";
}

inline Refusal refuses(const Args& a) {
  if (a.dtype == DType::kF32) return "it takes bf16 and fp16";
  if (a.D != 32) return "it takes head dim 32";
  if (a.tokens() > kRows) return "it takes windows to 64 tokens";
  if (a.dropout.seed != nullptr) return "it has no dropout";
  if (order_of(a.Wh, a.Ww, a.shift_h, a.shift_w).rows > kRows)
    return "the parts of a window, padded to 8 tokens, must have at most 64";
  return refuses_map(a, a.qkv, "qkv");
}

}  // namespace vitkernels::window_attention::sm90
