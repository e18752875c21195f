// Forward of CPU patch_embed. The weight is rounded and packed once per call, 64 columns at a time;
// then a work item makes the operand rows of up to 96 patches (they stay in L2) and multiplies them
// with one column block after the other. The tile of products is still in L1 when bias and position
// are added and tokens are stored, rounded once.
//
// A register chain of the product never crosses a group of channels of one scale, so operands of
// bf16 are exact centred integers: tokens = sum over groups of scale * (rows W) + bias + pos.
#pragma once

#include "patch_embed/patch_embed_cpu_rows.h"

namespace vitkernels {
namespace {

template <class Unit>
int64_t packed_weight_units(const PatchEmbedArgs& a) {
  return packed_units(units_of<Unit>(a.operand_row), a.D);
}

// A column block's packed weight.
template <class Unit>
VK_INLINE Unit* packed_columns(const PatchEmbedArgs& a, Range columns) {
  return static_cast<Unit*>(a.packed_weight) + columns.begin * units_of<Unit>(a.operand_row);
}

template <class Unit>
struct PackScratch {
  Element<Unit>* rows;
  int64_t stride, bytes;

  PackScratch(const PatchEmbedArgs& a, void* memory) {
    Carver carver(memory);
    stride = a.operand_row;
    rows = carver.take<Element<Unit>>(kBlockColumns * stride);
    bytes = carver.bytes();
  }
};

template <class E>
VK_INLINE float sum_of(const E* p, int64_t n) {
  Vec total = {};
  for_each_vec(n, [&](int64_t i, int lanes) { total = total + load_or(p + i, lanes); });
  return reduce_add(total);
}

// Weight rows in the order of the operand rows, zeros between groups; the bias takes what the
// centres leave over, from the weight as rounded.
template <class Unit>
void pack_weight_blocks(const PatchEmbedArgs& a, int64_t begin, int64_t end, void* memory) {
  using E = Element<Unit>;
  const PackScratch<Unit> s(a, memory);
  const int64_t K = a.patch_h * a.patch_w;
  for (int64_t block = begin; block < end; ++block) {
    const Range columns = column_block(a, block);
    for (int64_t d = columns.begin; d < columns.end; ++d) {
      E* row = s.rows + (d - columns.begin) * s.stride;
      for (int64_t g = 0, c = 0; g < a.group_count; ++g) {
        const int64_t first = c;
        while (c < a.C && a.channels[c].offset < a.groups[g].end) ++c;
        row[a.groups[g].end - 1] = E{};
        convert(a.weight_dtype, a.weight, (d * a.C + first) * K, (c - first) * K,
                row + a.groups[g].begin);
      }
      float left_over = 0.0f;
      for (int64_t c = 0; c < a.C && a.residual; ++c) {
        const float sum = sum_of(row + a.channels[c].offset, K);
        // An infinity of the weight shows in the products; here it could only cancel against them.
        if (sum - sum == 0.0f) left_over += a.channels[c].residual * sum;
      }
      a.bias[d] += left_over;
    }
    pack_transposed<Unit>(s.rows, s.stride, columns.size(), a.operand_row,
                          packed_columns<Unit>(a, columns));
  }
}

template <class Unit>
int64_t row_blocks(const PatchEmbedArgs& a) {
  return blocks_of_rows(a.B * patches(a),
                        a.operand_row * static_cast<int64_t>(sizeof(Element<Unit>)));
}

template <class Unit>
struct ForwardScratch {
  Element<Unit>*rows, *line;
  float *tile, *total;
  int64_t stride, bytes;  // stride in elements

  ForwardScratch(const PatchEmbedArgs& a, void* memory) {
    Carver carver(memory);
    const int64_t most = ceil_div(a.B * patches(a), row_blocks<Unit>(a));
    stride = round_up(a.operand_row, kElements<Unit>) + kVec * kElements<Unit>;  // spreads L1 sets
    rows = carver.take<Element<Unit>>(most * stride);
    line = carver.take<Element<Unit>>(line_elements(a));
    tile = carver.take<float>((most + 2) * kBlockColumns);  // store_prefix takes two rows
    total = carver.take<float>(a.group_count > 1 ? most * kBlockColumns : 0);
    bytes = carver.bytes();
  }
};

// total (+)= scale * tile
inline void add_group(int64_t rows, float scale, bool first, const float* tile, float* total) {
  const Vec factor = splat(scale);
  for (int64_t i = 0; i < rows * kBlockColumns; i += kVec)
    store(total + i,
          first ? factor * load(tile + i) : fma(factor, load(tile + i), load(total + i)));
}

// tokens = total + scale * tile + bias + pos; total is null when there is only one group.
template <class Out, class Pos>
void store_tokens(const PatchEmbedArgs& a, Range rows, Range columns, float scale,
                  const float* tile, const float* total) {
  const int64_t N = patches(a);
  const Vec factor = splat(scale);
  for (int64_t m = rows.begin, b = m / N, n = m % N; m < rows.end; ++m, ++n) {
    if (n == N) n = 0, ++b;
    Out* out = static_cast<Out*>(a.tokens.data) + b * a.tokens.batch + (a.P + n) * a.tokens.row +
               columns.begin;
    const Pos* pos = static_cast<const Pos*>(a.pos.data) + n * a.pos.row + columns.begin;
    for_each_vec(columns.size(), [&](int64_t d, int lanes) {
      Vec sum = fma(factor, load(tile + d), load_or(a.bias + columns.begin + d, lanes));
      if (total != nullptr) sum = sum + load(total + d);
      store_or(out + d, sum + load_or(pos + d, lanes), lanes);
    });
    tile += kBlockColumns;
    if (total != nullptr) total += kBlockColumns;
  }
}

// The prefix tokens of image b, with their positions where they have some.
inline void store_prefix(const PatchEmbedArgs& a, int64_t b, float* row) {
  for (int64_t p = 0; p < a.P; ++p)
    VK_SWITCH_FLOAT(a.tokens.dtype, {
      scalar_t* out = static_cast<scalar_t*>(a.tokens.data) + b * a.tokens.batch + p * a.tokens.row;
      for (int64_t d0 = 0; d0 < a.D; d0 += kBlockColumns) {
        const int64_t n = a.D - d0 < kBlockColumns ? a.D - d0 : kBlockColumns;
        float* pos = row + kBlockColumns;
        convert(a.prefix.dtype, a.prefix.data, p * a.prefix.row + d0, n, row);
        convert(a.prefix_pos.dtype, a.prefix_pos.data, p * a.prefix_pos.row + d0, n, pos);
        for_each_vec(n, [&](int64_t d, int lanes) {
          store_or(out + d0 + d, load_or(row + d, lanes) + load_or(pos + d, lanes), lanes);
        });
      }
    });
}

template <class T, class Unit>
void forward_items(const PatchEmbedArgs& a, int64_t begin, int64_t end, void* memory) {
  using E = Element<Unit>;
  const ForwardScratch<Unit> s(a, memory);
  const int64_t M = a.B * patches(a), blocks = row_blocks<Unit>(a),
                K = units_of<Unit>(a.operand_row);
  for (int64_t item = begin; item < end; ++item) {
    const Range rows = part(M, item, blocks);
    for (int64_t m = 0; m < rows.size(); ++m)
      for (int64_t g = 0; g < a.group_count; ++g) s.rows[m * s.stride + a.groups[g].end - 1] = E{};
    operand_rows<T>(
        a, rows, {0, a.C * a.patch_h},
        [&](int64_t c, int64_t row) { return a.channels[c].offset + row * a.patch_w; }, s.rows,
        s.stride, s.line);
    for (int64_t block = 0; block < column_blocks(a); ++block) {
      const Range columns = column_block(a, block);
      const Unit* weight = packed_columns<Unit>(a, columns);
      for (int64_t g = 0; g < a.group_count; ++g) {
        const GroupArgs& group = a.groups[g];
        const int64_t k0 = group.begin / kElements<Unit>,
                      units = (group.end - group.begin) / kElements<Unit>;
        gemm<ALayout::kRowMajor>(
            rows.size(), columns.size(), units, reinterpret_cast<const Unit*>(s.rows) + k0,
            s.stride / kElements<Unit>, weight, K, k0, s.tile, kBlockColumns, false);
        if (g + 1 < a.group_count) add_group(rows.size(), group.scale, g == 0, s.tile, s.total);
      }
      const float scale = a.groups[a.group_count - 1].scale;
      const float* total = a.group_count > 1 ? s.total : nullptr;
      VK_SWITCH_FLOAT(a.tokens.dtype, {
        using out_t = scalar_t;
        VK_SWITCH_FLOAT(a.pos.dtype,
                        store_tokens<out_t, scalar_t>(a, rows, columns, scale, s.tile, total));
      });
    }
    if (a.P > 0)
      for (int64_t b = ceil_div(rows.begin, patches(a)); b * patches(a) < rows.end; ++b)
        store_prefix(a, b, s.tile);
  }
}

}  // namespace
}  // namespace vitkernels
