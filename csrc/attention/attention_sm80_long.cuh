// What the kernels of attention_sm80_long*.cu share: tiles of any number of rows brought by all
// threads, products of a warp's rows that read a tile once for all of them, dropout, and from
// scores and dP to P and dS.
//
// HEAD_DIM is that of the instance (attention_plan_sm80_long.h). Tiles are swizzled as in
// attention_sm80.cuh; rows beyond N, and columns beyond D, are zeros.
#pragma once

#include "attention/attention_plan_sm80_long.h"
#include "attention/attention_sm80.cuh"

namespace vitkernels::attention::sm80_long {

using sm80::Head;
using sm80::kLog2e;
using sm80::kTile;
using sm80::Masks;
using sm80::Rows;

// ---- Tiles

// Begins to copy rows first to first + ROWS - 1, by the whole block: a thread has one chunk in
// kLanes of every kStep-th row, at constant distances in shared memory.
template <int HEAD_DIM, int ROWS>
VK_DEVICE void begin_tile(char* tile, const Rows& from, int first, int D) {
  constexpr int kLanes = sm80::kChunkGroup<HEAD_DIM>, kStep = kThreads / kLanes;
  const int thread = static_cast<int>(threadIdx.x);
  const int chunk = thread % kLanes, row = thread / kLanes;
  char* const to = tile + sm80::chunk_offset<HEAD_DIM>(row, chunk);
#pragma unroll
  for (int on = 0; on < ROWS; on += kStep) {
    const bool inside = first + row + on < from.N && row + on < ROWS;
    const uint16_t* const source =
        from.data + (inside ? first + row + on : 0) * from.stride + chunk * 8;
#pragma unroll
    for (int further = 0; further < HEAD_DIM / 8; further += kLanes) {
      const bool there = inside && (chunk + further) * 8 < D;
      if (ROWS % kStep == 0 || row + on < ROWS)
        copy_async<16>(to + (on * (HEAD_DIM / 8) + further) * 16,
                       there ? source + further * 8 : from.data, there ? 16 : 0);
    }
  }
}

// ---- Products of M tiles of 16 rows of a warp

// The rows' operand: in registers, or where it is in shared memory.
template <int HEAD_DIM, int M, bool KEPT>
struct RowOperand {
  FragmentA kept[KEPT ? M : 1][KEPT ? HEAD_DIM / 16 : 1];
  const char* tile;

  // Once the tile is there.
  VK_DEVICE void load() {
    if constexpr (KEPT) {
#pragma unroll
      for (int m = 0; m < M; ++m)
        sm80::load_tile<HEAD_DIM>(kept[m], tile + m * kTile * 2 * HEAD_DIM);
    }
  }
  VK_DEVICE FragmentA fragment(int m, int step, int offset) const {
    if constexpr (KEPT) return kept[m][step];
    FragmentA a;
    load_matrices(a.r, tile + m * kTile * 2 * HEAD_DIM + sm80::further<HEAD_DIM>(offset, step * 2));
    return a;
  }
};

// c = a b^T for COUNT * 8 rows of `b` from row `first`, a multiple of 16, on.
template <DType TYPE, int HEAD_DIM, int M, int COUNT, bool KEPT>
VK_DEVICE void multiply_rows(FragmentC (&c)[M][COUNT], const RowOperand<HEAD_DIM, M, KEPT>& a,
                             const char* b, int first) {
  constexpr int kRow = 2 * HEAD_DIM;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row_offset = sm80::chunk_offset<HEAD_DIM>(lane % 16, lane / 16);
  const int offset =
      first * kRow + sm80::chunk_offset<HEAD_DIM>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < COUNT; ++n) c[m][n] = {};
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    FragmentA rows[M];
#pragma unroll
    for (int m = 0; m < M; ++m) rows[m] = a.fragment(m, step, row_offset);
#pragma unroll
    for (int n = 0; n < COUNT; n += 2) {  // matrices: rows n (k low, k high), then n + 1
      uint32_t r[4];
      load_matrices(r, b + sm80::further<HEAD_DIM>(offset, step * 2) + n * 8 * kRow);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_m16n8k16<TYPE>(c[m][n], rows[m], FragmentB{{r[0], r[1]}});
        mma_m16n8k16<TYPE>(c[m][n + 1], rows[m], FragmentB{{r[2], r[3]}});
      }
    }
  }
}

// COUNT neighbours in C's form, rounded to 16 bits, as A's of the next product.
template <DType TYPE, int M, int COUNT>
VK_DEVICE void round_rows(FragmentA (&a)[M][COUNT / 2], const FragmentC (&c)[M][COUNT]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int k = 0; k < COUNT; k += 2) {
      const FragmentC &low = c[m][k], &high = c[m][k + 1];
      a[m][k / 2] = {{pack<TYPE>(low.v[0], low.v[1]), pack<TYPE>(low.v[2], low.v[3]),
                      pack<TYPE>(high.v[0], high.v[1]), pack<TYPE>(high.v[2], high.v[3])}};
    }
}

// c += a b for STEPS * 16 rows of `b` from row `first`, a multiple of 16, on.
template <DType TYPE, int HEAD_DIM, int M, int STEPS>
VK_DEVICE void multiply_add(FragmentC (&c)[M][HEAD_DIM / 8], const FragmentA (&a)[M][STEPS],
                            const char* b, int first) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int offset =
      first * 2 * HEAD_DIM + sm80::chunk_offset<HEAD_DIM>(lane / 8 % 2 * 8 + lane % 8, lane / 16);
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n += 2) {  // matrices: chunk n (rows low, high), then n + 1
      uint32_t r[4];
      load_matrices_transposed(r,
                               b + sm80::further<HEAD_DIM>(offset, n) + k * kTile * 2 * HEAD_DIM);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_m16n8k16<TYPE>(c[m][n], a[m][k], FragmentB{{r[0], r[1]}});
        mma_m16n8k16<TYPE>(c[m][n + 1], a[m][k], FragmentB{{r[2], r[3]}});
      }
    }
}

// ---- Scores. kNone leaves the factor `score_factor` to the exponent; kAny has it in the scores.

template <Masks MASKS>
VK_DEVICE float score_factor(const Args& a) {
  return MASKS == Masks::kAny ? 1.0f : a.scale * kLog2e;
}

// row, column: of the thread's first element. Keys beyond the last get -inf where they are columns,
// and LAST says that there may be some.
template <Masks MASKS, bool BY_KEY, bool LAST, int COUNT>
VK_DEVICE void finish_scores(FragmentC (&s)[COUNT], const Args& a, const Head& head, int row,
                             int column) {
  if constexpr (MASKS == Masks::kAny) {
    sm80::finish_scores<MASKS, BY_KEY, COUNT>(s, a, head, row, column);
  } else if constexpr (LAST && !BY_KEY) {
    if (column / kTile * kTile + COUNT * 8 <= a.Nk) return;
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column + n * 8 + i % 2 >= a.Nk) s[n].v[i] = -INFINITY;
  }
}

// ---- Dropout

VK_DEVICE uint64_t dropout_seed(const Args& a) {
  return a.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*a.dropout.seed);
}

// Bit 4 n + i: whether element i of fragment n is kept. One loop for all fragments, since ten
// rounds of Philox for each would be most of the kernel's code.
template <bool BY_KEY, int COUNT>
VK_DEVICE uint32_t kept_bits(const Args& a, const Head& head, uint64_t seed, int row, int column) {
  static_assert(COUNT <= 8, "32 bits");
  const int64_t head_row = (static_cast<int64_t>(head.b) * a.H + head.h) * a.Nq;
  uint32_t bits = 0;
#pragma unroll 1
  for (int n = 0; n < COUNT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + i / 2 * 8, c = column + n * 8 + i % 2;
      const int64_t index = (head_row + (BY_KEY ? c : r)) * a.Nk + (BY_KEY ? r : c);
      bits |= static_cast<uint32_t>(keeps(a.dropout, seed, static_cast<uint64_t>(index)))
              << (4 * n + i);
    }
  return bits;
}

// ---- P and dS

// Whether delta is rowsum(P dP) instead of rowsum(dout out): all keys are in one tile, where that
// costs nothing; `out` is rounded, and few keys do not average that.
VK_DEVICE bool sums_in_tile(const Args& a) { return a.Nk <= kTile; }

// keys: rows of the thread's own that exist, counted from its first, where rows are keys.
template <bool BY_KEY>
VK_DEVICE void sum_tile(float2 (&of_query)[4], const FragmentC (&p)[2], const FragmentC (&dp)[2],
                        int keys) {
  float sums[4] = {};
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!BY_KEY || i / 2 * 8 < keys) {
        float& sum = sums[BY_KEY ? 2 * n + i % 2 : i / 2];
        sum = fmaf(p[n].v[i], dp[n].v[i], sum);
      }
#pragma unroll
  for (int query = 0; query < (BY_KEY ? 4 : 2); ++query) {
#pragma unroll
    for (int lanes = BY_KEY ? 4 : 1; lanes < (BY_KEY ? 32 : 4); lanes *= 2)
      sums[query] += __shfl_xor_sync(kAllLanes, sums[query], lanes);
    of_query[query].y = sums[query];
  }
}

// Products q k^T and dP of M times 16 x 16 become P and dS; P is the one after dropout. of_query:
// lse and delta, by tile and half of the rows, or by column. A masked key has no gradient, whatever
// dP is.
template <Masks MASKS, bool BY_KEY, int M>
VK_DEVICE void differentiate(FragmentC (&s)[M][2], FragmentC (&dp)[M][2],
                             float2 (&of_query)[BY_KEY ? 1 : M][4], const Args& a, const Head& head,
                             uint64_t seed, int row, int column) {
  const float by = score_factor<MASKS>(a);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float2(&stats)[4] = of_query[BY_KEY ? 0 : m];
    finish_scores<MASKS, BY_KEY, true>(s[m], a, head, row + m * kTile, column);
    uint32_t kept = 0xff;
    float kept_factor = 1.0f;
    if (MASKS == Masks::kAny && a.dropout.seed != nullptr) {
      kept = kept_bits<BY_KEY, 2>(a, head, seed, row + m * kTile, column);
      kept_factor = a.dropout.scale;
    }
    bool masked[8];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& p = s[m][n].v[i];
        masked[4 * n + i] = p == -INFINITY;
        p = exp2_approx(fmaf(p, by, -stats[BY_KEY ? 2 * n + i % 2 : i / 2].x));
        if (MASKS == Masks::kAny)
          dp[m][n].v[i] *= (kept >> (4 * n + i) & 1) != 0 ? kept_factor : 0.0f;
      }
    if (sums_in_tile(a) && (m == 0 || !BY_KEY)) sum_tile<BY_KEY>(stats, s[m], dp[m], a.Nk - row);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float &p = s[m][n].v[i], &d = dp[m][n].v[i];
        d = masked[4 * n + i] ? 0.0f : p * (d - stats[BY_KEY ? 2 * n + i % 2 : i / 2].y);
        if (MASKS == Masks::kAny) p *= (kept >> (4 * n + i) & 1) != 0 ? kept_factor : 0.0f;
      }
  }
}

// ---- Host

// Whether a call needs the instances with Masks::kAny. Those without them take the largest score
// for the largest product, and -inf for a probability of 0, which holds for a positive scale.
inline bool has_options(const Args& a) {
  return sm80::has_masks(a) || a.dropout.seed != nullptr || !(a.scale > 0.0f);
}

// f of the instance's head dim, as a constant.
template <class F>
void with_instance(int D, const F& f) {
  switch (instance_dim(D)) {
    case 64:
      return f(std::integral_constant<int, 64>());
    case 80:
      return f(std::integral_constant<int, 80>());
    case 96:
      return f(std::integral_constant<int, 96>());
    default:
      return f(std::integral_constant<int, 128>());
  }
}

inline unsigned grid_of(int64_t blocks) { return static_cast<unsigned>(blocks); }

// Launches that attention_sm80_long_backward.cu leaves to attention_sm80_long_dbias.cu. row_sums:
// (B, H, padded_sums(Nq)) pairs of lse, in units of log2, and delta.
void dbias_sm80_long(const Device& device, const Tensor& like, const Args& args,
                     const float2* row_sums);

}  // namespace vitkernels::attention::sm80_long
