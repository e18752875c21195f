// CPU kernels of linear_gelu of one instruction set (VK_ISA); linear_gelu_cpu.cpp calls them
// through the table at the end.
#include "common/cpu_matmul.h"
#include "linear_gelu/linear_gelu_cpu.h"
#include "linear_gelu/linear_gelu_cpu_activation.h"

namespace vitkernels {
namespace {

template <class T>
T* at(const MatrixArg& m, int64_t row, int64_t column) {
  return static_cast<T*>(m.data) + row * m.stride + column;
}

RowsIn rows_in(const MatrixArg& m) { return {m.data, m.stride, m.dtype}; }

int64_t panels(int64_t columns) { return panels_of(vecs_of(columns)); }
int64_t padded_columns(int64_t columns) { return round_up(columns, kVec); }

// ---- scratch

constexpr int64_t kLine = 64;

template <class Unit>
int64_t copied_bytes(int64_t rows, int64_t K) {
  return rows * copied_stride<Unit>(K) * 4;
}

int64_t block_rows(const ProductArgs& p) { return ceil_div(p.M, p.row_blocks); }

template <class Unit>
int64_t sums_bytes(const ProductArgs& p) {
  return round_up(block_floats(block_rows(p)) * 4, kLine);
}

template <class T>
int64_t product_scratch_of(const ProductArgs& p) {
  using Unit = typename UnitOf<T>::type;
  const int64_t rows = round_up(block_rows(p), kVec);
  const int64_t copy =
      p.a_transposed ? rows * units_of<Unit>(p.K) * 4 + kLine : copied_bytes<Unit>(rows, p.K);
  return sums_bytes<Unit>(p) + copy;
}

template <class T>
int64_t pack_scratch_of(const ProductArgs& p) {
  using Unit = typename UnitOf<T>::type;
  const int64_t columns = kMaxPanel * kVec;
  return p.b.dtype == p.dtype ? 0
         : p.b_transposed     ? copied_bytes<Unit>(columns, p.K)
                              : p.K * columns * 4;
}

// ---- products

template <class T>
void pack_items(const ProductArgs& p, int64_t begin, int64_t end, void* scratch) {
  using Unit = typename UnitOf<T>::type;
  Unit* packed = static_cast<Unit*>(p.packed_b);
  for (int64_t i = begin; i < end; ++i) {
    if (p.b_transposed) {
      pack_panel_transposed<T>(rows_in(p.b), p.dtype, p.N, p.K, i, packed, scratch);
    } else {
      pack_panel_rows<T>(rows_in(p.b), p.dtype, p.N, p.K, i, packed, scratch);
    }
  }
}

// A tile of `rows` rows and `columns` columns of C, dense in `sums` with whole vectors.
struct Tile {
  int64_t row, rows, column, columns;
  float* sums;

  int64_t stride() const { return round_up(columns, kVec); }
};

// Asks for the lines of C that the next tile will store: a product's time lies between, and the
// stores then do not wait for memory.
template <class T>
void prefetch_next(const ProductArgs& p, const MatrixArg& m, const Tile& tile) {
  const int64_t end = tile.row + 2 * tile.rows < p.M ? tile.row + 2 * tile.rows : p.M;
  for (int64_t row = tile.row + tile.rows; row < end; ++row) {
    const char* first = reinterpret_cast<const char*>(at<T>(m, row, tile.column));
    const int64_t bytes = tile.columns * static_cast<int64_t>(sizeof(T));
    for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(first + b, 1);
  }
}

template <Activation act, class T>
__attribute__((noinline)) void store_activated(const ProductArgs& p, const Tile& tile) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* sums = tile.sums + r * tile.stride();
    T* out = at<T>(p.out, tile.row + r, tile.column);
    T* preactivation = p.preactivation.data == nullptr
                           ? nullptr
                           : at<T>(p.preactivation, tile.row + r, tile.column);
    for_each_vec(tile.columns, [&](int64_t c, int n) {
      Vec h = load(sums + c);
      if (p.bias != nullptr) h = h + load(p.bias + tile.column + c);
      if (preactivation != nullptr) store_or(preactivation + c, h, n);
      if (p.out.data != nullptr) store_or(out + c, activate<act, T>(h), n);
    });
  }
  if (p.out.data != nullptr) prefetch_next<T>(p, p.out, tile);
  if (p.preactivation.data != nullptr) prefetch_next<T>(p, p.preactivation, tile);
}

void add_slabs(const ProductArgs& p, const Tile& tile) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* sums = tile.sums + r * tile.stride();
    float* all = p.sums + (tile.row + r) * p.N + tile.column;
    for_each_vec(tile.columns, [&](int64_t c, int n) {
      Vec v = load(sums + c);
      if (!p.first_slab) v = v + load_or(all + c, n);
      if (p.last_slab) {
        store(sums + c, v);
      } else {
        store_or(all + c, v, n);
      }
    });
  }
}

void finish_tile(const ProductArgs& p, const Tile& tile) {
  if (p.sums != nullptr) add_slabs(p, tile);
  if (!p.last_slab) return;
  const DType dtype = p.out.data != nullptr ? p.out.dtype : p.preactivation.dtype;
  VK_SWITCH_FLOAT(dtype,
                  VK_SWITCH_ACTIVATION(p.activation, store_activated<act, scalar_t>(p, tile)));
}

template <class T>
void product_items(const ProductArgs& p, int64_t begin, int64_t end, void* scratch) {
  using Unit = typename UnitOf<T>::type;
  const Unit* b = static_cast<const Unit*>(p.packed_b);
  float* sums = static_cast<float*>(scratch);
  Unit* copy = reinterpret_cast<Unit*>(static_cast<char*>(scratch) + sums_bytes<Unit>(p));
  const int64_t vecs = vecs_of(p.N), count = panels_of(vecs);
  const Chains chains{1, units_of<Unit>(p.K), nullptr};
  BlockOfA<Unit> a{};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / p.column_groups, group = item % p.column_groups;
    const int64_t first = block * p.M / p.row_blocks;
    const int64_t rows = (block + 1) * p.M / p.row_blocks - first;
    if (item == begin || group == 0) {
      if (p.a_transposed) {
        pack_columns<Unit>(at<const T>(p.a, 0, first), p.a.stride, p.K, rows, copy);
        a = {copy, 0};
      } else {
        a = block_of_rows<T>(rows_in(p.a), p.dtype, first, rows, p.K, copy);
      }
    }
    for (int64_t i = group * count / p.column_groups; i < (group + 1) * count / p.column_groups;
         ++i) {
      const int64_t column = panel_start(i, vecs) * kVec;
      const auto finish = [&](int64_t row, int64_t n, int64_t width, float* c) {
        const int64_t columns = width * kVec;
        finish_tile(p,
                    {first + row, n, column, column + columns < p.N ? columns : p.N - column, c});
      };
      if (p.a_transposed) {
        matmul_block<ALayout::kColMajor>(rows, a, b, vecs, i, chains, sums, finish);
      } else {
        matmul_block<ALayout::kRowMajor>(rows, a, b, vecs, i, chains, sums, finish);
      }
    }
  }
}

// ---- few rows

// Packing W would cost more than the product: each row of W is read once where it lies, along K.
constexpr int kMaxFewRows = 4, kDotColumns = 4;

template <class T, int kRows>
void dot_rows(const ProductArgs& p, const float* x, int64_t x_stride, int64_t column, float* sums,
              int64_t stride) {
  const T* w[kDotColumns];
  for (int j = 0; j < kDotColumns; ++j)
    w[j] = at<const T>(p.b, column + j < p.N ? column + j : p.N - 1, 0);
  Vec acc[kRows][kDotColumns] = {};
  for_each_vec(p.K, [&](int64_t k, int n) {
#pragma GCC unroll 4
    for (int j = 0; j < kDotColumns; ++j) {
      const Vec v = load_or(w[j] + k, n);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r][j] = fma(load(x + r * x_stride + k), v, acc[r][j]);
    }
  });
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kDotColumns; ++j) sums[r * stride + j] = reduce_add(acc[r][j]);
}

template <class T>
void few_rows_items(const ProductArgs& p, int64_t begin, int64_t end, void* scratch) {
  const int64_t x_stride = round_up(p.K, kVec), vecs = vecs_of(p.N);
  float* sums = static_cast<float*>(scratch);
  float* x = sums + block_floats(kMaxFewRows);
  cast_rows<T>(p.a.data, p.a.dtype, p.a.stride, p.M, p.K, x, x_stride);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = panel_start(i, vecs) * kVec, last = panel_start(i + 1, vecs) * kVec;
    const Tile tile{0, p.M, column, (last < p.N ? last : p.N) - column, sums};
    for (int64_t c = 0; c < tile.columns; c += kDotColumns) {
      const auto dot = p.M == 1   ? dot_rows<T, 1>
                       : p.M == 2 ? dot_rows<T, 2>
                       : p.M == 3 ? dot_rows<T, 3>
                                  : dot_rows<T, 4>;
      dot(p, x, x_stride, column + c, sums + c, tile.stride());
    }
    finish_tile(p, tile);
  }
}

int64_t few_rows_scratch(const ProductArgs& p) {
  return (block_floats(kMaxFewRows) + p.M * round_up(p.K, kVec)) * 4;
}

bool is_few_rows(const ProductArgs& p) {
  return p.M <= kMaxFewRows && !p.a_transposed && p.b_transposed && p.b.dtype == p.dtype;
}

void few_rows(const ProductArgs& p, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_FLOAT(p.dtype, few_rows_items<scalar_t>(p, begin, end, scratch));
}

// ---- gradient of the activation

template <Activation act, class T>
void grad_row(const GradArgs& g, int64_t r) {
  const T* dy = at<const T>(g.dy, r, 0);
  const T* preactivation = at<const T>(g.preactivation, r, 0);
  T* out = g.dh.data == nullptr ? nullptr : at<T>(g.dh, r, 0);
  for_each_vec(g.N, [&](int64_t c, int n) {
    Vec dh = load_or(dy + c, n);
    if constexpr (act != Activation::kIdentity)
      dh = dh * derivative<act, T>(load_or(preactivation + c, n));
    if (out != nullptr) store_or(out + c, dh, n);
    if (g.dbias_sum != nullptr) store_or(g.dbias_sum + c, load_or(g.dbias_sum + c, n) + dh, n);
  });
}

template <class T>
void grad_chunk(const GradArgs& g, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) VK_SWITCH_ACTIVATION(g.activation, grad_row<act, T>(g, r));
}

// ---- table

int64_t packed_bytes(const ProductArgs& p) {
  int64_t bytes = 0;
  VK_SWITCH_FLOAT(p.dtype, {
    using Unit = typename UnitOf<scalar_t>::type;
    bytes = packed_units(units_of<Unit>(p.K), p.N) * 4;
  });
  return bytes;
}

int64_t pack_scratch(const ProductArgs& p) {
  int64_t bytes = 0;
  VK_SWITCH_FLOAT(p.dtype, bytes = pack_scratch_of<scalar_t>(p));
  return bytes;
}

void pack(const ProductArgs& p, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_FLOAT(p.dtype, pack_items<scalar_t>(p, begin, end, scratch));
}

int64_t product_scratch(const ProductArgs& p) {
  int64_t bytes = 0;
  VK_SWITCH_FLOAT(p.dtype, bytes = product_scratch_of<scalar_t>(p));
  return bytes;
}

void product(const ProductArgs& p, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_FLOAT(p.dtype, product_items<scalar_t>(p, begin, end, scratch));
}

void grad(const GradArgs& g, int64_t begin, int64_t end) {
  VK_SWITCH_FLOAT(g.dtype, grad_chunk<scalar_t>(g, begin, end));
}

void sum_partials(const float* partials, int64_t count, int64_t N, MatrixArg out) {
  VK_SWITCH_FLOAT(out.dtype, {
    for_each_vec(N, [&](int64_t c, int n) {
      Vec sum = {};
      for (int64_t i = 0; i < count; ++i) sum = sum + load_or(partials + i * N + c, n);
      store_or(at<scalar_t>(out, 0, c), sum, n);
    });
  });
}

}  // namespace

const LinearGeluTable& VK_ISA_TABLE(linear_gelu)() {
  static constexpr LinearGeluTable table = {
      panels,  padded_columns, packed_bytes,     pack_scratch, pack, product_scratch,
      product, is_few_rows,    few_rows_scratch, few_rows,     grad, sum_partials};
  return table;
}

}  // namespace vitkernels
