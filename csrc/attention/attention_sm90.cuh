// What the parts of attention's sm_90 forward (attention_sm90.cu) share: rows of a head in swizzled
// shared memory, scores of a warpgroup and of a warp, bias, softmax, the way out.
//
// A head's rows lie in one or two parts (attention_plan_sm90.h), each as TMA writes it. Rows past N
// and columns past D are zero there; score columns past Nk become -inf, query rows past Nq are
// computed and not stored.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "attention/attention_cuda.h"
#include "attention/attention_plan_sm90.h"
#include "common/device.cuh"
#include "common/mma.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

namespace vitkernels::attention::sm90 {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// Unsigned, so that quotients are shifts.
VK_DEVICE int lane_index() { return static_cast<int>(threadIdx.x % kWarp); }
VK_DEVICE int warp_index() { return static_cast<int>(threadIdx.x / kWarp); }

// ---- Tiles

template <int WIDTH>
struct Parts {
  static constexpr int kFirst = first_part(WIDTH), kRest = WIDTH - kFirst;  // columns
  static constexpr int kFirstPitch = 2 * kFirst, kRestPitch = 2 * kRest;    // bytes of a row
  static constexpr Swizzle kFirstSwizzle = static_cast<Swizzle>(kFirstPitch),
                           kRestSwizzle = static_cast<Swizzle>(kRestPitch);
};

// The rows of one head of Q, K or V.
struct Tile {
  char *first, *rest;
};

template <int WIDTH>
VK_DEVICE Tile tile_at(char* at, int rows) {
  return {at, at + first_part_bytes(rows, WIDTH)};
}

// The 16 bytes of columns 16 * step + 8 * high and on, where `swizzled` has them. The row is a
// multiple of 8 plus lane % 8, so that what the swizzle exchanges is the same for all rows of a
// lane.
template <int WIDTH>
VK_DEVICE const char* chunk_at(const Tile& tile, int row, int step, int high) {
  using P = Parts<WIDTH>;
  const bool rest = step * 16 >= P::kFirst;
  const int pitch = rest ? P::kRestPitch : P::kFirstPitch;
  const int chunk = rest ? step - P::kFirst / 16 : step;
  const int turn = (lane_index() % 8 * pitch / 128) ^ high;
  return (rest ? tile.rest : tile.first) + row * pitch + ((turn ^ 2 * chunk) << 4);
}

// Of Q, K and V: the first part's columns and, where there is one, the second's.
struct Maps {
  TensorMap first[3], rest[3];
};

// Begins to load all rows of head h of sample b.
template <int WIDTH>
VK_DEVICE void load_tile(const Tile& tile, const Maps& maps, int which, MBarrier* barrier, int rows,
                         int h, int b) {
  using P = Parts<WIDTH>;
  const int box = box_rows(rows);
  for (int row = 0; row < rows; row += box) {
    tma_load(tile.first + row * P::kFirstPitch, maps.first[which], barrier, {0, row, h, b});
    if constexpr (P::kRest > 0)
      tma_load(tile.rest + row * P::kRestPitch, maps.rest[which], barrier, {P::kFirst, row, h, b});
  }
}

// After `full`, a stage is there to read; after `empty`, to load into.
struct Ring {
  MBarrier *full, *empty;
  int stages;
  int at = 0;  // the stage, and the parity of its phase in the next byte: registers are scarce

  VK_DEVICE int slot() const { return at & 0xff; }
  VK_DEVICE int phase() const { return at >> 8; }
  VK_DEVICE void advance() {
    ++at;
    if (slot() == stages) at = (phase() ^ 1) << 8;
  }
};

// ---- Products of a warpgroup

// 64 rows of the result, as one product or two: width 128 is one of 128 columns.
template <int WIDTH>
struct Sums {
  static constexpr int kFirst = WIDTH == 128 ? 128 : first_part(WIDTH), kRest = WIDTH - kFirst;
  float first[kFirst / 2], rest[kRest > 0 ? kRest / 2 : 4];

  // v[i] of FragmentC for columns 8 j and on.
  VK_DEVICE float& at(int j, int i) {
    return j < kFirst / 8 ? first[4 * j + i] : rest[4 * (j - kFirst / 8) + i];
  }
};

// Begins s = Q K^T of 64 queries from `query` on and the keys from `key` on.
template <DType TYPE, int WIDTH, int C>
VK_DEVICE void begin_scores(float (&s)[C], const Tile& q, int query, const Tile& k, int key) {
  using P = Parts<WIDTH>;
  const WgmmaOperand first_q =
      wgmma_operand<P::kFirstSwizzle>(q.first + query * P::kFirstPitch, 16, 8 * P::kFirstPitch);
  const WgmmaOperand first_k =
      wgmma_operand<P::kFirstSwizzle>(k.first + key * P::kFirstPitch, 16, 8 * P::kFirstPitch);
  wgmma_fence(s);
#pragma unroll
  for (int step = 0; step < P::kFirst / 16; ++step)
    wgmma<TYPE>(s, advanced(first_q, 32 * step), advanced(first_k, 32 * step), step > 0);
  if constexpr (P::kRest > 0) {
    const WgmmaOperand rest_q =
        wgmma_operand<P::kRestSwizzle>(q.rest + query * P::kRestPitch, 16, 8 * P::kRestPitch);
    const WgmmaOperand rest_k =
        wgmma_operand<P::kRestSwizzle>(k.rest + key * P::kRestPitch, 16, 8 * P::kRestPitch);
#pragma unroll
    for (int step = 0; step < P::kRest / 16; ++step)
      wgmma<TYPE>(s, advanced(rest_q, 32 * step), advanced(rest_k, 32 * step), true);
  }
  wgmma_commit();
}

template <int STEPS>
VK_DEVICE void pin_all(FragmentA (&p)[STEPS]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) pin_registers(p[step]);
}

// Begins o (+)= P V for 16 * STEPS keys from `key` on; until finish_values, o and p are not
// touched.
template <DType TYPE, int WIDTH, int STEPS>
VK_DEVICE void begin_values(Sums<WIDTH>& o, FragmentA (&p)[STEPS], const Tile& v, int key,
                            int key_rows, bool accumulate) {
  using P = Parts<WIDTH>;
  using S = Sums<WIDTH>;
  const WgmmaOperand first = wgmma_operand<P::kFirstSwizzle>(
      v.first + key * P::kFirstPitch, first_part_bytes(key_rows, WIDTH), 8 * P::kFirstPitch);
  pin_all(p);
  if constexpr (S::kRest > 0) pin_registers(o.rest);
  wgmma_fence(o.first);
  if constexpr (S::kRest > 0) {
    const WgmmaOperand rest =
        wgmma_operand<P::kRestSwizzle>(v.rest + key * P::kRestPitch, 16, 8 * P::kRestPitch);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const bool add = accumulate || step > 0;
      wgmma<TYPE, Major::kMN>(o.first, p[step], advanced(first, step * 16 * P::kFirstPitch), add);
      wgmma<TYPE, Major::kMN>(o.rest, p[step], advanced(rest, step * 16 * P::kRestPitch), add);
    }
  } else {
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
      wgmma<TYPE, Major::kMN>(o.first, p[step], advanced(first, step * 16 * P::kFirstPitch),
                              accumulate || step > 0);
  }
  wgmma_commit();
}

template <int WIDTH>
VK_DEVICE void finish_values(Sums<WIDTH>& o) {
  wgmma_wait<0>(o.first);
  if constexpr (Sums<WIDTH>::kRest > 0) pin_registers(o.rest);
}

// ---- Scores. c[4 j + i] is v[i] of FragmentC for columns `key` + 8 j and on.

VK_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
VK_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// A head by its index, b * H + h: taken apart where that is needed, to keep registers free.
struct Head {
  int b, h;
};

VK_DEVICE Head head_at(const Args& a, int index) {
  const int b = static_cast<int>(static_cast<unsigned>(index) / static_cast<unsigned>(a.H));
  return {b, index - b * a.H};
}

// The bias in shared memory lies as the fragments of 16 x 8 do: row block, then column block, then
// lane, four elements each.
VK_DEVICE int64_t bias_fragment(int block, int columns, int j, int lane) {
  return (static_cast<int64_t>(block) * (columns / 8) + j) * kWarp + lane;
}

VK_DEVICE float4 to_floats(uint2 raw, bool bf16) {
  if (bf16)
    return make_float4(bits_to_float(raw.x << 16), bits_to_float(raw.x & 0xffff0000u),
                       bits_to_float(raw.y << 16), bits_to_float(raw.y & 0xffff0000u));
  return make_float4(unpack_f16_low(raw.x), unpack_f16_high(raw.x), unpack_f16_low(raw.y),
                     unpack_f16_high(raw.y));
}

template <bool WIDE, int C>
VK_DEVICE void add_shared_bias(float (&s)[C], const char* bias, float by, bool bf16, int block,
                               int columns, int key) {
  const int lane = lane_index();
  const char* mine = bias + bias_fragment(block, columns, key / 8, lane) * (WIDE ? 16 : 8);
#pragma unroll
  for (int j = 0; j < C / 4; ++j) {
    if (key / 8 + j >= columns / 8) break;  // the tail's last step has keys beyond
    float4 x;
    if constexpr (WIDE)
      x = *reinterpret_cast<const float4*>(mine + j * kWarp * 16);
    else
      x = to_floats(*reinterpret_cast<const uint2*>(mine + j * kWarp * 8), bf16);
    s[4 * j] = fmaf(s[4 * j], by, x.x * kLog2e);
    s[4 * j + 1] = fmaf(s[4 * j + 1], by, x.y * kLog2e);
    s[4 * j + 2] = fmaf(s[4 * j + 2], by, x.z * kLog2e);
    s[4 * j + 3] = fmaf(s[4 * j + 3], by, x.w * kLog2e);
  }
}

// Columns of the bias are neighbours, or one for all keys: offsets are then constants, which cost
// no registers.
template <bool WIDE, int C>
VK_DEVICE void add_global_bias(float (&s)[C], const Args& a, int index, float by, int row,
                               int key) {
  using Element = std::conditional_t<WIDE, uint32_t, uint16_t>;
  const bool bf16 = a.bias.dtype == DType::kBF16, each = a.bias.column != 0;
  const int first = key + lane_index() % 4 * 2, left = a.Nk - first;
  const Head head = head_at(a, index);
  const int64_t start = head.b * a.bias.batch + head.h * a.bias.head + (each ? first : 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = row + 8 * half;
    if (query >= a.Nq) continue;  // not stored
    const Element* from = static_cast<const Element*>(a.bias.data) + start + query * a.bias.row;
#pragma unroll
    for (int n = 0; n < C / 2; ++n) {
      const int column = n / 2 * 8 + n % 2, at = n / 2 * 4 + half * 2 + n % 2;
      if (column >= left) continue;  // masked
      const uint32_t bits = each ? from[column] : *from;
      const float x = WIDE || bf16 ? bits_to_float(WIDE ? bits : bits << 16) : unpack_f16_low(bits);
      s[at] = fmaf(s[at], by, x * kLog2e);
    }
  }
}

// From products to scores in units of log2. Row `row` is the thread's first, of row block `block`;
// `shared` is where the head's bias is, when it is there.
template <BiasPlace BIAS, int C>
VK_DEVICE void scale_scores(float (&s)[C], const Args& a, int index, const char* shared, float by,
                            int columns, int block, int row, int key) {
  const bool wide = is_wide(a.bias.dtype), bf16 = a.bias.dtype == DType::kBF16;
  if constexpr (BIAS == BiasPlace::kShared) {
    if (wide)
      add_shared_bias<true>(s, shared, by, bf16, block, columns, key);
    else
      add_shared_bias<false>(s, shared, by, bf16, block, columns, key);
  } else if constexpr (BIAS == BiasPlace::kGlobal) {
    if (wide)
      add_global_bias<true>(s, a, index, by, row, key);
    else
      add_global_bias<false>(s, a, index, by, row, key);
  } else {
#pragma unroll
    for (int i = 0; i < C; ++i) s[i] *= by;
  }
}

// -inf in columns from `left` on; FIRST: the first block of eight that may have any. Comparisons
// with constants, which cost no registers.
template <int FIRST, int C>
VK_DEVICE void mask_columns(float (&s)[C], int left) {
  const int mine = left - lane_index() % 4 * 2;
#pragma unroll
  for (int j = FIRST; j < C / 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (8 * j + i % 2 >= mine) s[4 * j + i] = -INFINITY;
}

// The softmax of a thread's two rows: the largest score so far in units of log2, and the sum of
// 2^(score - largest) over the thread's columns.
struct Softmax {
  float top[2], sum[2];
};

// From products to scores, -inf where there is no key. Raises `top` to the thread's largest.
// Returns what scores are to be multiplied by: scale * log2 e, or 1 where that is done.
template <BiasPlace BIAS, int C>
VK_DEVICE float finish_scores(float (&s)[C], float (&top)[2], const Args& a, int index,
                              const char* bias, int columns, int block, int row, int key) {
  float by = a.scale * kLog2e;
  // A factor that may turn the -inf of masked columns into something else goes in before them.
  if (BIAS != BiasPlace::kNone || !(by > 1e-30f)) {
    scale_scores<BIAS>(s, a, index, bias, by, columns, block, row, key);
    by = 1.0f;
  }
  const int left = a.Nk - key;
  if (left < 2 * C - 8)
    mask_columns<0>(s, left);
  else if (left < 2 * C)
    mask_columns<C / 4 - 1>(s, left);
#pragma unroll
  for (int i = 0; i < C; ++i) top[i % 4 / 2] = fmaxf(top[i % 4 / 2], s[i]);
  return by;
}

// Takes the largest new scores into account: `low` is what to subtract from scores, `rescale` what
// to multiply earlier sums by.
VK_DEVICE void raise(Softmax& rows, const float (&top)[2], float by, float (&low)[2],
                     float (&rescale)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float before = rows.top[half];
    rows.top[half] = fmaxf(quad_max(top[half]) * by, before);
    low[half] = rows.top[half] == -INFINITY ? 0.0f : rows.top[half];  // all masked, or all NaN
    rescale[half] = exp2_approx(before - low[half]);
    rows.sum[half] *= rescale[half];
  }
}

// p = 2^(by * s - low) in 16 bits as the A operand of STEPS steps of 16 keys, 0 where the last step
// has keys beyond the C / 4 blocks of eight.
template <DType TYPE, int C, int STEPS>
VK_DEVICE void exponentiate(FragmentA (&p)[STEPS], const float (&s)[C], Softmax& rows, float by,
                            const float (&low)[2]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 8 * step + 2 * i, half = i % 2;
      if (at >= C) {
        p[step].r[i] = 0;
        continue;
      }
      const float first = exp2_approx(fmaf(s[at], by, -low[half]));
      const float second = exp2_approx(fmaf(s[at + 1], by, -low[half]));
      rows.sum[half] += first + second;
      p[step].r[i] = pack<TYPE>(first, second);
    }
}

// ---- The way out

// Word n of lane l of a quad becomes word l of lane n.
VK_DEVICE void transpose_in_quad(uint32_t (&w)[4]) {
  const int lane = lane_index();
#pragma unroll
  for (int n = 0; n < 4; n += 2) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, lane & 1 ? w[n] : w[n + 1], 1);
    if (lane & 1)
      w[n] = got;
    else
      w[n + 1] = got;
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, lane & 2 ? w[n] : w[n + 2], 2);
    if (lane & 2)
      w[n] = got;
    else
      w[n + 2] = got;
  }
}

// Divides BLOCKS * 8 columns of a warp's 16 rows, from block FIRST on, by the rows' sums and stores
// them; with block 0, lse. `row` is the thread's first; at(j, i) is v[i] of FragmentC for the
// columns of block FIRST + j.
template <DType TYPE, int FIRST, int BLOCKS, class At>
VK_DEVICE void store_rows(const Args& a, int index, const Softmax& rows, int row, At at) {
  const int quad = lane_index() % 4;
  const Head head = head_at(a, index);
  auto* out = static_cast<uint16_t*>(a.out.data) + head.b * a.out.batch + head.h * a.out.head;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(rows.sum[half]);
    const float by = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: fully masked
    const int query = row + 8 * half;
    if (FIRST == 0 && quad == 0 && query < a.Nq) {
      const float top = rows.top[half] == -INFINITY ? 0.0f : rows.top[half];
      a.lse[static_cast<int64_t>(index) * a.Nq + query] = fmaf(top, kLn2, logf(sum));
    }
#pragma unroll
    for (int j = 0; j < BLOCKS; j += 4) {
      uint32_t w[4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
        w[n] =
            j + n < BLOCKS ? pack<TYPE>(at(j + n, 2 * half) * by, at(j + n, 2 * half + 1) * by) : 0;
      transpose_in_quad(w);
      const int block = j + quad, column = (FIRST + block) * 8;
      if (query < a.Nq && block < BLOCKS && column < a.D)
        store_16(out + query * a.out.row + column, make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
}

// ---- Of the launchers

inline TensorMap map_of(const HeadView& view, const Args& a, int N, int rows, int columns) {
  // The stride of a dimension of size 1 is never used, but must be one that TMA takes.
  const auto stride = [](int size, int64_t given) { return size == 1 ? int64_t{8} : given; };
  return make_tensor_map(view.data, a.dtype,
                         {4,
                          {a.D, N, a.H, a.B},
                          {1, stride(N, view.row), stride(a.H, view.head), stride(a.B, view.batch)},
                          {columns, box_rows(rows), 1, 1}},
                         static_cast<Swizzle>(2 * columns));
}

inline bool tma_takes(const HeadView& view, const Args& a, int N) {
  const auto fits = [](int size, int64_t stride) {
    return size == 1 || (stride % 8 == 0 && stride > 0 && stride < int64_t{1} << 39);
  };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && fits(a.B, view.batch) &&
         fits(N, view.row) && fits(a.H, view.head);
}

}  // namespace vitkernels::attention::sm90
