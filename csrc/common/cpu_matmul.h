// Products of matrices larger than the caches, on the tiles of cpu_gemm.h.
//
// The launcher cuts C[M][N] = A[M][K] * B[K][N] into blocks of rows whose A stays in L2, and those
// into groups of panels of B's columns when rows are few. All of B is packed once, panel by panel
// (pack_transposed or pack_rows of one panel's columns), and shared by the threads. A block walks
// over its panels; in each, over chains of K that keep their part of the panel in L1; in each, over
// its tiles of rows. Sums wait in a fp32 block in L2 between chains, and `finish` turns them into
// whatever is stored while they are still in L1. The order of additions depends on K alone: not on
// the blocks, not on the number of threads.
#pragma once

#include <cstdint>

#include "common/cpu_gemm.h"

namespace vitkernels {
namespace {

// Units of K in one register's sum: 192 of them and 4 vectors are 48 KB of a panel. Zen 5 streams
// that from L2 at 99% of its FMA rate, and a tile's sums are loaded and stored half as often as at
// 96.
constexpr int64_t kBlockChain = 192;

// K as `parts` equal parts of `units` units (channels of an image; one part for a plain product).
// No chain crosses a part, and part i is multiplied by scales[i] unless scales is null.
struct Chains {
  int64_t parts, units;
  const float* scales;

  int64_t total_units() const { return parts * units; }
};

// Rows of A for one block. kRowMajor: rows of units. kColMajor: vectors of kVec rows, each packed_k
// x kVec (pack_columns).
template <class Unit>
struct BlockOfA {
  const Unit* data;
  int64_t stride;  // kRowMajor only
};

// fp32 sums that matmul_block needs for a block of `rows` rows.
constexpr int64_t block_floats(int64_t rows) { return rows * kMaxPanel * kVec; }

template <ALayout layout, int kVecs, bool kScaled, class Unit, class Finish>
VK_INLINE void matmul_panel(int64_t rows, const BlockOfA<Unit>& a, const Unit* panel,
                            const Chains& chains, float* c, Finish&& finish) {
  constexpr int kMaxRows = kTileRows[kVecs];
  constexpr int64_t ldc = kVecs * kVec;
  // Tiles as even as possible: over all rows, or inside each vector of packed columns.
  constexpr int64_t kSplit = ceil_div(kVec, kMaxRows);  // tiles of a whole vector of rows
  const int64_t K = chains.total_units();
  const int64_t tiles =
      layout == ALayout::kRowMajor ? ceil_div(rows, kMaxRows) : ceil_div(rows, kVec) * kSplit;
  const int64_t pieces = chains.units > kBlockChain ? ceil_div(chains.units, kBlockChain) : 1;
  const bool waits = chains.parts * pieces > 1;  // else a tile's sums are finished in L1 at once
  for (int64_t part = 0; part < chains.parts; ++part)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = piece * chains.units / pieces;
      const int64_t units = (piece + 1) * chains.units / pieces - first;
      const int64_t k = part * chains.units + first;
      const bool last = part == chains.parts - 1 && piece == pieces - 1;
      const float scale = kScaled ? chains.scales[part] : 1.0f;
      int64_t row = 0;
      for (int64_t t = 0; t < tiles; ++t) {
        int64_t n;
        const Unit* at;
        if constexpr (layout == ALayout::kRowMajor) {
          n = (rows + tiles - 1 - t) / tiles;
          at = a.data + row * a.stride + k;
        } else {
          const int64_t vector = t / kSplit, room = rows - vector * kVec;
          n = ((room < kVec ? room : kVec) + kSplit - 1 - t % kSplit) / kSplit;
          at = a.data + vector * kVec * K + k * kVec + row % kVec;
          if (n == 0) continue;
        }
        float* sums = waits ? c + row * ldc : c;
        gemm_rows<Unit, layout, kMaxRows, kVecs, kScaled>(
            n, units, at, layout == ALayout::kRowMajor ? a.stride : kVec, panel + k * kVecs * kVec,
            sums, ldc, part + piece > 0, scale);
        if (last) finish(row, n, kVecs, sums);
        row += n;
      }
    }
}

// The rows of one block times panel `i` of a packed B of `vecs` vectors of columns. For each tile,
// in turn, finish(row, rows, width, sums) gets the rows [row, row + rows) of the block, of width
// vectors each, dense in `sums`. c: block_floats(rows).
template <ALayout layout, bool kScaled = false, class Unit, class Finish>
void matmul_block(int64_t rows, const BlockOfA<Unit>& a, const Unit* b, int64_t vecs, int64_t i,
                  const Chains& chains, float* c, Finish&& finish) {
  const int64_t v0 = panel_start(i, vecs), width = panel_start(i + 1, vecs) - v0;
  const Unit* panel = b + v0 * kVec * chains.total_units();
  if (width == 1) matmul_panel<layout, 1, kScaled>(rows, a, panel, chains, c, finish);
  if (width == 2) matmul_panel<layout, 2, kScaled>(rows, a, panel, chains, c, finish);
  if constexpr (kMaxPanel == 4) {
    if (width == 3) matmul_panel<layout, 3, kScaled>(rows, a, panel, chains, c, finish);
    if (width == 4) matmul_panel<layout, 4, kScaled>(rows, a, panel, chains, c, finish);
  }
}

// ---- operands

// v as T reads it back, unless the store that follows rounds it anyway.
template <class T, class Element>
VK_INLINE Vec rounded_to(Vec v) {
  if constexpr (sizeof(T) == sizeof(Element)) return v;
  T lanes[kVec];
  store(lanes, v);
  return load(lanes);
}

// Rows of `columns` elements of `from`, rounded to the compute dtype T, as elements of its units;
// the last unit and vector of a row are filled with zeros up to out_stride.
template <class T, class Element>
void cast_rows(const void* src, DType from, int64_t stride, int64_t rows, int64_t columns,
               Element* out, int64_t out_stride) {
  VK_SWITCH_FLOAT(from, {
    const scalar_t* row = static_cast<const scalar_t*>(src);
    for (int64_t r = 0; r < rows; ++r, row += stride) {
      Element* to = out + r * out_stride;
      int64_t c = 0;
      for (; c + kVec <= columns; c += kVec) store(to + c, rounded_to<T, Element>(load(row + c)));
      for (; c < out_stride; c += kVec) {
        const int n = columns > c ? static_cast<int>(columns - c) : 0;
        const int room = static_cast<int>(out_stride - c < kVec ? out_stride - c : kVec);
        store_or(to + c, n > 0 ? rounded_to<T, Element>(load_n(row + c, n)) : Vec{}, room);
      }
    }
  });
}

// A row-major operand in the dtype `from`, one block of rows at a time.
struct RowsIn {
  const void* data;
  int64_t stride;
  DType from;
};

inline const void* row_of(const RowsIn& m, int64_t row, int64_t column = 0) {
  return static_cast<const char*>(m.data) + (row * m.stride + column) * size_of(m.from);
}

// Units between rows of a copied block: whole vectors, and an odd number of cache lines, so that
// rows do not meet in the same sets of the cache.
template <class Unit>
constexpr int64_t copied_stride(int64_t K) {
  return (ceil_div(units_of<Unit>(K), 16) | 1) * 16;
}

// Rows [row, row + rows) of an operand of compute dtype T as units, in place where they can be;
// scratch: rows * copied_stride units.
template <class T, class Unit>
BlockOfA<Unit> block_of_rows(const RowsIn& m, DType dtype, int64_t row, int64_t rows, int64_t K,
                             Unit* scratch) {
  using Element = typename ElementOf<Unit>::type;
  if (m.from == dtype && kInPlace<Unit, T> && K % kElements<Unit> == 0 &&
      m.stride % kElements<Unit> == 0)
    return {static_cast<const Unit*>(row_of(m, row)), m.stride / kElements<Unit>};
  const int64_t stride = copied_stride<Unit>(K);
  cast_rows<T>(row_of(m, row), m.from, m.stride, rows, K, reinterpret_cast<Element*>(scratch),
               stride * kElements<Unit>);
  return {scratch, stride};
}

// `columns` columns of a (K, ...) operand of compute dtype T as vectors of units: A = operand^T.
// out: round_up(columns, kVec) * units_of(K). A few rows at a time: their lines stay in L1 while
// vector after vector takes its part, and those of the next rows are on their way.
template <class Unit, class T>
void pack_columns(const T* src, int64_t stride, int64_t K, int64_t columns, Unit* out) {
  constexpr int64_t kRows = 16;
  const int64_t units = units_of<Unit>(K);
  for (int64_t k0 = 0; k0 < units; k0 += kRows) {
    const int64_t end = k0 + kRows < units ? k0 + kRows : units;
    const int64_t ahead = (end + kRows < units ? end + kRows : units) * kElements<Unit>;
    for (int64_t row = end * kElements<Unit>; row < ahead && row < K; ++row)
      for (int64_t c = 0; c < columns; c += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(src + row * stride + c);
    for (int64_t c = 0; c < columns; c += kVec) {
      const int64_t n = columns - c < kVec ? columns - c : kVec;
      float* to = reinterpret_cast<float*>(out + c * units);
      for (int64_t k = k0; k < end; ++k) {
        const T* row = src + k * kElements<Unit> * stride + c;
        const bool has_second = (k + 1) * kElements<Unit> <= K;
        store(to + k * kVec, n == kVec ? load_row_units<Unit>(row, stride, has_second, kVec)
                                       : load_row_units<Unit>(row, stride, has_second, n));
      }
    }
  }
}

// Panel i of B = src^T (src: one row for each of the `columns` columns of B, K elements long).
// scratch: kMaxPanel * kVec * copied_stride units when src needs a cast.
template <class T, class Unit>
void pack_panel_transposed(const RowsIn& m, DType dtype, int64_t columns, int64_t K, int64_t i,
                           Unit* packed, void* scratch) {
  using Element = typename ElementOf<Unit>::type;
  const int64_t vecs = vecs_of(columns), v0 = panel_start(i, vecs), first = v0 * kVec;
  const int64_t end = panel_start(i + 1, vecs) * kVec, n = (end < columns ? end : columns) - first;
  Unit* panel = packed + first * units_of<Unit>(K);
  if (m.from == dtype)
    return pack_transposed<Unit>(static_cast<const T*>(row_of(m, first)), m.stride, n, K, panel);
  const int64_t stride = copied_stride<Unit>(K) * kElements<Unit>;
  Element* rows = static_cast<Element*>(scratch);
  cast_rows<T>(row_of(m, first), m.from, m.stride, n, K, rows, stride);
  pack_transposed<Unit>(rows, stride, n, K, panel);
}

// Panel i of B = src (K rows of `columns` elements). scratch: K * kMaxPanel * kVec elements when
// src needs a cast.
template <class T, class Unit>
void pack_panel_rows(const RowsIn& m, DType dtype, int64_t columns, int64_t K, int64_t i,
                     Unit* packed, void* scratch) {
  using Element = typename ElementOf<Unit>::type;
  const int64_t vecs = vecs_of(columns), v0 = panel_start(i, vecs), first = v0 * kVec;
  const int64_t end = panel_start(i + 1, vecs) * kVec, n = (end < columns ? end : columns) - first;
  Unit* panel = packed + first * units_of<Unit>(K);
  if (m.from == dtype)
    return pack_rows<Unit>(static_cast<const T*>(row_of(m, 0, first)), m.stride, K, n, panel);
  Element* rows = static_cast<Element*>(scratch);
  const int64_t stride = end - first;
  cast_rows<T>(row_of(m, 0, first), m.from, m.stride, K, n, rows, stride);
  pack_rows<Unit>(rows, stride, K, n, panel);
}

}  // namespace
}  // namespace vitkernels
