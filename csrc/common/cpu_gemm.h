// Register-tiled matrix products of the CPU kernels: C[M][N] (+)= A[M][K] * B[K][N], fp32
// accumulation.
//
// A `Unit` is what one lane multiplies per instruction: a float (FMA), or a pair of bf16 along K
// (vdpbf16ps). A is read one broadcast unit at a time, either along its rows (kRowMajor: a[m * lda
// + k]) or down its columns (kColMajor: a[k * lda + m], a transposed product without a transpose).
// B is packed into panels of 1..kMaxPanel vectors: the panel that starts at vector v0 lies at b +
// v0 * kVec * packed_k and holds packed_k rows of its own width. A 24-accumulator tile measures 98%
// of the FMA and vdpbf16ps peak on Zen 5 with operands in L1.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cpu_vec.h"

namespace vitkernels {
namespace {

struct Bf16Pair {
  uint32_t bits;
};

template <class Unit>
constexpr int kElements = 1;  // elements of K per unit
template <>
constexpr int kElements<Bf16Pair> = 2;

// What a unit is made of when an operand is copied: bf16 for pairs, else fp32.
template <class Unit>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<Bf16Pair> {
  using type = BF16;
};

// The unit a product of T operands uses at this level; everything but bf16 with vdpbf16ps is
// widened to fp32 while packing.
template <class T>
struct UnitOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct UnitOf<BF16> {
  using type = Bf16Pair;
};
#endif

// True when rows of T are rows of units as they lie in memory.
template <class Unit, class T>
constexpr bool kInPlace = false;
template <>
constexpr bool kInPlace<float, float> = true;
template <>
constexpr bool kInPlace<Bf16Pair, BF16> = true;

enum class ALayout { kRowMajor, kColMajor };

#if defined(__AVX512F__) || defined(__aarch64__)  // 32 vector registers
constexpr int kMaxPanel = 4;
constexpr int kTileRows[kMaxPanel + 1] = {0, 14, 12, 8, 6};
#elif defined(__AVX2__)
constexpr int kMaxPanel = 2;
constexpr int kTileRows[kMaxPanel + 1] = {0, 12, 6};
#else
constexpr int kMaxPanel = 2;
constexpr int kTileRows[kMaxPanel + 1] = {0, 8, 4};
#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class Unit>
constexpr int64_t units_of(int64_t elements) {
  return ceil_div(elements, kElements<Unit>);
}

constexpr int64_t vecs_of(int64_t columns) { return ceil_div(columns, kVec); }

// Units that a packed B takes: packed_k rows, columns rounded up to whole vectors.
constexpr int64_t packed_units(int64_t packed_k, int64_t columns) {
  return packed_k * vecs_of(columns) * kVec;
}

// Panels of n vectors are as even in width as possible, the wider ones first.
constexpr int64_t panels_of(int64_t n) { return ceil_div(n, kMaxPanel); }

// Width in vectors of the panel that starts at vector v0 of n.
VK_INLINE int64_t panel_width(int64_t v0, int64_t n) {
  const int64_t panels = panels_of(n), wide = n % panels, narrow = n / panels;
  return v0 < wide * (narrow + 1) ? narrow + 1 : narrow;
}

// The first vector of panel i of n vectors; i = panels_of(n) gives n.
VK_INLINE int64_t panel_start(int64_t i, int64_t n) {
  const int64_t panels = panels_of(n), wide = n % panels;
  return i * (n / panels) + (i < wide ? i : wide);
}

VK_INLINE Vec multiply_add(const float* a, Vec b, Vec c) { return fma(splat(*a), b, c); }

#if defined(__AVX512BF16__)
VK_INLINE Vec multiply_add(const Bf16Pair* a, Vec b, Vec c) {
  int bits;
  std::memcpy(&bits, a, sizeof bits);  // rows of bf16 need not be 4-byte aligned
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(c),
                                                reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits)),
                                                reinterpret_cast<__m512bh>(b)));
}
#endif

// c (+)= a * b, or scale * a * b.
template <class Unit, ALayout layout, int kRows, int kVecs, bool kScaled = false>
__attribute__((noinline)) void gemm_tile(int64_t K, const Unit* a, int64_t lda, const Unit* b,
                                         float* c, int64_t ldc, bool accumulate,
                                         float scale = 1.0f) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec{};
  for (int64_t k = 0; k < K; ++k) {
    Vec bv[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) bv[v] = load(reinterpret_cast<const float*>(b) + v * kVec);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Unit* unit = layout == ALayout::kColMajor ? a + r : a + r * lda;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = multiply_add(unit, bv[v], acc[r][v]);
    }
    a += layout == ALayout::kColMajor ? lda : 1;
    b += kVecs * kVec;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* out = c + r * ldc + v * kVec;
      if constexpr (kScaled) {
        const Vec factor = splat(scale);
        store(out, accumulate ? fma(acc[r][v], factor, load(out)) : acc[r][v] * factor);
      } else {
        store(out, accumulate ? load(out) + acc[r][v] : acc[r][v]);
      }
    }
}

template <class Unit, ALayout layout, int kRows, int kVecs, bool kScaled = false>
VK_INLINE void gemm_rows(int64_t rows, int64_t K, const Unit* a, int64_t lda, const Unit* b,
                         float* c, int64_t ldc, bool accumulate, float scale = 1.0f) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      return gemm_tile<Unit, layout, kRows, kVecs, kScaled>(K, a, lda, b, c, ldc, accumulate,
                                                            scale);
    gemm_rows<Unit, layout, kRows - 1, kVecs, kScaled>(rows, K, a, lda, b, c, ldc, accumulate,
                                                       scale);
  }
}

// M rows in tiles as even as possible: 25 rows are 5 tiles of 5, not 4 of 6 and a slow one of 1.
template <class Unit, ALayout layout, int kVecs>
void gemm_panel(int64_t M, int64_t K, const Unit* a, int64_t lda, const Unit* b, float* c,
                int64_t ldc, bool accumulate) {
  const int64_t tiles = ceil_div(M, kTileRows[kVecs]);
  const int64_t a_row = layout == ALayout::kColMajor ? 1 : lda;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t rows = (M + tiles - 1 - t) / tiles;
    gemm_rows<Unit, layout, kTileRows[kVecs], kVecs>(rows, K, a, lda, b, c, ldc, accumulate);
    a += rows * a_row;
    c += rows * ldc;
  }
}

// Units of K that one register accumulates before it is added to C: shorter chains round less, and
// that much of a panel stays in L1 while all rows pass over it.
constexpr int64_t kMaxChain = 48;

// C[M][columns rounded up to vectors] (+)= A * B[k0 .. k0 + K). All of M, columns, K may be
// anything; A begins at unit k0.
template <ALayout layout, class Unit>
void gemm(int64_t M, int64_t columns, int64_t K, const Unit* a, int64_t lda, const Unit* b,
          int64_t packed_k, int64_t k0, float* c, int64_t ldc, bool accumulate) {
  const int64_t vecs = vecs_of(columns), chains = ceil_div(K, kMaxChain);
  for (int64_t v0 = 0; v0 < vecs;) {
    const int64_t width = panel_width(v0, vecs);
    const Unit* panel = b + v0 * kVec * packed_k + k0 * width * kVec;
    float* out = c + v0 * kVec;
    for (int64_t chain = 0; chain < chains; ++chain) {
      const int64_t first = chain * K / chains, n = (chain + 1) * K / chains - first;
      const Unit* rows = a + (layout == ALayout::kColMajor ? first * lda : first);
      const Unit* part = panel + first * width * kVec;
      const bool add = accumulate || chain > 0;
      if (width == 1) gemm_panel<Unit, layout, 1>(M, n, rows, lda, part, out, ldc, add);
      if (width == 2) gemm_panel<Unit, layout, 2>(M, n, rows, lda, part, out, ldc, add);
      if constexpr (kMaxPanel == 4) {
        if (width == 3) gemm_panel<Unit, layout, 3>(M, n, rows, lda, part, out, ldc, add);
        if (width == 4) gemm_panel<Unit, layout, 4>(M, n, rows, lda, part, out, ldc, add);
      }
    }
    v0 += width;
  }
}

// ---- packing

// A vector of kVec units from `n` elements at p (n <= 0: zeros; never reads past n).
template <class Unit, class T>
VK_INLINE Vec load_units(const T* p, int64_t n) {
#if defined(__AVX512BF16__)
  if constexpr (kElements<Unit> == 2) {
    if (n <= 0) return Vec{};
    const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1;
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_epi16(mask, p));
  }
#endif
  static_assert(kElements<Unit> == 1 || kInPlace<Unit, T>);
  if (n >= kVec) return load(p);
  return n <= 0 ? Vec{} : load_n(p, static_cast<int>(n));
}

template <int kDistance>
VK_INLINE void transpose_step(Vec (&rows)[kVec]) {
  IVec low = {}, high = {};
#pragma GCC unroll 16
  for (int l = 0; l < kVec; ++l) {
    low[l] = l & kDistance ? kVec + l - kDistance : l;
    high[l] = l & kDistance ? kVec + l : l + kDistance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kVec; ++i) {
    if (i & kDistance) continue;
    const Vec a = rows[i], b = rows[i + kDistance];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kDistance] = __builtin_shuffle(a, b, high);
  }
  if constexpr (kDistance > 1) transpose_step<kDistance / 2>(rows);
}

// Where row r of an operand begins, when rows are evenly apart; packing takes any such function.
template <class T>
struct EvenRows {
  const T* data;
  int64_t stride;

  VK_INLINE const T* operator()(int64_t r) const { return data + r * stride; }
};

// The elements from `column` of kVec rows from `first`, as units, transposed, to rows of a panel
// `out_stride` floats apart; kFull: all of the block exists.
template <bool kFull, class Unit, class Rows>
VK_INLINE void pack_block(const Rows& row, int64_t first, int64_t column, int64_t rows,
                          int64_t elements, int64_t units, float* out, int64_t out_stride) {
  Vec block[kVec];
#pragma GCC unroll 16
  for (int r = 0; r < kVec; ++r) {
    if constexpr (kFull) {
      block[r] = load_units<Unit>(row(first + r) + column, kVec * kElements<Unit>);
    } else {
      block[r] = r < rows ? load_units<Unit>(row(first + r) + column, elements) : Vec{};
    }
  }
  transpose_step<kVec / 2>(block);
#pragma GCC unroll 16
  for (int r = 0; r < kVec; ++r)
    if (kFull || r < units) store(out + r * out_stride, block[r]);
}

// B = src^T: contraction along the D elements of a row, one column per row of src (K^T of scores).
template <class Unit, class Rows>
__attribute__((noinline)) void pack_transposed(const Rows& row, int64_t rows, int64_t D,
                                               Unit* packed) {
  const int64_t K = units_of<Unit>(D), vecs = vecs_of(rows);
  for (int64_t v0 = 0; v0 < vecs;) {
    const int64_t width = panel_width(v0, vecs);
    for (int64_t v = 0; v < width; ++v) {
      const int64_t row0 = (v0 + v) * kVec;
      for (int64_t k = 0; k < K; k += kVec) {
        const int64_t column = k * kElements<Unit>, elements = D - column;
        float* out = reinterpret_cast<float*>(packed + v0 * kVec * K) + (k * width + v) * kVec;
        if (rows - row0 >= kVec && elements >= kVec * kElements<Unit>) {
          pack_block<true, Unit>(row, row0, column, kVec, elements, kVec, out, width * kVec);
        } else {
          pack_block<false, Unit>(row, row0, column, rows - row0, elements, K - k, out,
                                  width * kVec);
        }
      }
    }
    v0 += width;
  }
}

template <class Unit, class T>
void pack_transposed(const T* src, int64_t stride, int64_t rows, int64_t D, Unit* packed) {
  pack_transposed<Unit>(EvenRows<T>{src, stride}, rows, D, packed);
}

// One vector of units of packed rows: the elements of a row, or of two rows side by side (the
// second may be absent).
template <class Unit, class T>
VK_INLINE Vec load_row_units(const T* p, int64_t stride, bool has_second, int64_t n) {
  if constexpr (kElements<Unit> == 2) {
    HVec first = {}, second = {};
    if (n >= kVec) {
      std::memcpy(&first, p, sizeof first);
      if (has_second) std::memcpy(&second, p + stride, sizeof second);
    } else {
      std::memcpy(&first, p, static_cast<size_t>(n) * 2);
      if (has_second) std::memcpy(&second, p + stride, static_cast<size_t>(n) * 2);
    }
    return reinterpret_cast<Vec>(__builtin_convertvector(first, UVec) |
                                 (__builtin_convertvector(second, UVec) << 16));
  } else {
    (void)stride, (void)has_second;
    return load_units<Unit>(p, n);
  }
}

// B = src: contraction along the rows, columns are the D elements (V of P * V); a last odd row is
// paired with zeros.
template <class Unit, class Rows>
__attribute__((noinline)) void pack_rows(const Rows& row, int64_t rows, int64_t D, Unit* packed) {
  constexpr int kStep = kElements<Unit>;
  const int64_t K = units_of<Unit>(rows), whole = rows / kStep, vecs = vecs_of(D);
  for (int64_t v0 = 0; v0 < vecs;) {
    const int64_t width = panel_width(v0, vecs);
    for (int64_t v = 0; v < width; ++v) {
      const int64_t column = (v0 + v) * kVec, n = D - column, out_row = width * kVec;
      float* out = reinterpret_cast<float*>(packed + v0 * kVec * K) + v * kVec;
      const auto pack_units = [&](int64_t k, bool has_second, int64_t elements) {
        const auto* first = row(k * kStep) + column;
        const int64_t step = has_second ? row(k * kStep + kStep - 1) + column - first : 0;
        store(out + k * out_row, load_row_units<Unit>(first, step, has_second, elements));
      };
      if (n >= kVec) {
        for (int64_t k = 0; k < whole; ++k) pack_units(k, true, kVec);
      } else {
        for (int64_t k = 0; k < whole; ++k) pack_units(k, true, n);
      }
      if (whole < K) pack_units(whole, false, n);
    }
    v0 += width;
  }
}

template <class Unit, class T>
void pack_rows(const T* src, int64_t stride, int64_t rows, int64_t D, Unit* packed) {
  pack_rows<Unit>(EvenRows<T>{src, stride}, rows, D, packed);
}

// The A operand: rows of units, read where they are when T allows it, widened or padded into
// `scratch` otherwise.
template <class Unit>
struct RowUnits {
  const Unit* data;
  int64_t stride;
};

template <class Unit, class Rows>
RowUnits<Unit> copied_rows(const Rows& row, int64_t rows, int64_t D, Unit* scratch) {
  const int64_t padded = round_up(units_of<Unit>(D), kVec);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < padded; k += kVec)
      store(reinterpret_cast<float*>(scratch + r * padded + k),
            load_units<Unit>(row(r) + k * kElements<Unit>, D - k * kElements<Unit>));
  return {scratch, padded};
}

template <class Unit, class T>
RowUnits<Unit> row_units(const T* src, int64_t stride, int64_t rows, int64_t D, Unit* scratch) {
  if constexpr (kInPlace<Unit, T>) {
    if (kElements<Unit> == 1 || (D % 2 == 0 && stride % 2 == 0))
      return {reinterpret_cast<const Unit*>(src), stride / kElements<Unit>};
  }
  return copied_rows(EvenRows<T>{src, stride}, rows, D, scratch);
}

}  // namespace
}  // namespace vitkernels
