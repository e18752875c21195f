// Backward of CPU patch_embed, three independent parts:
//   sums over the batch    dpos, dprefix and, over fixed chunks of tokens, dbias;
//   dweight = dtokens^T X  a work item owns a block of weight lines times a block of embedding rows
//                          and runs over all patches, 128 at a time, so nothing is summed twice;
//   dimages = dtokens W    each pixel belongs to one patch: tiles of products go straight to it.
#pragma once

#include "patch_embed/patch_embed_cpu_rows.h"

namespace vitkernels {
namespace {

constexpr int64_t kChunkTokens = 128;    // patches of a product of dweight: both operands in L2
constexpr int64_t kPackTokens = 64;      // patches that an item of pack_dtokens packs
constexpr int64_t kMaxWeightRows = 384;  // embedding rows of a block of dweight

inline int64_t all_lines(const PatchEmbedArgs& a) { return a.C * a.patch_h; }

// Lines of the weight (one channel, one row) that make a block: about kBlockColumns columns, or as
// many more as fill vectors better.
inline int64_t lines_per_block(const PatchEmbedArgs& a) {
  int64_t best = 1;
  const auto waste = [&](int64_t lines) {
    const int64_t columns = lines * a.patch_w;
    return static_cast<double>(round_up(columns, kVec)) / static_cast<double>(columns);
  };
  for (int64_t lines = 1; lines * a.patch_w <= 2 * kBlockColumns; ++lines)
    if (lines * a.patch_w <= kBlockColumns || waste(lines) < waste(best) - 0.02) best = lines;
  return best;
}

inline int64_t line_blocks(const PatchEmbedArgs& a) {
  return ceil_div(all_lines(a), lines_per_block(a));
}

inline Range line_block(const PatchEmbedArgs& a, int64_t index) {
  const int64_t lines = lines_per_block(a), begin = index * lines, end = begin + lines;
  return {begin, end < all_lines(a) ? end : all_lines(a)};
}

// Floats of a row of a tile that is one block of lines wide.
inline int64_t line_columns(const PatchEmbedArgs& a) {
  return round_up(lines_per_block(a) * a.patch_w, kVec);
}

// Calls body(c, column, n): the n columns from `column` of the block belong to channel c, or are
// treated like it.
template <class Body>
VK_INLINE void for_each_channel(const PatchEmbedArgs& a, Range lines, Body&& body) {
  for (int64_t l = lines.begin; l < lines.end;) {
    const int64_t c = l / a.patch_h, next = a.alike ? lines.end : (c + 1) * a.patch_h,
                  end = next < lines.end ? next : lines.end;
    body(c, (l - lines.begin) * a.patch_w, (end - l) * a.patch_w);
    l = end;
  }
}

// ---- sums over the batch

template <class T>
VK_INLINE const T* dtokens_row(const PatchEmbedArgs& a, int64_t b, int64_t token) {
  return static_cast<const T*>(a.dtokens.data) + b * a.dtokens.batch + token * a.dtokens.row;
}

inline void store_floats(const float* p, int64_t n, const RowsView& view, int64_t row) {
  if (view.data == nullptr) return;
  VK_SWITCH_FLOAT(view.dtype, {
    scalar_t* out = static_cast<scalar_t*>(view.data) + row * view.row;
    for_each_vec(n, [&](int64_t i, int lanes) { store_or(out + i, load_or(p + i, lanes), lanes); });
  });
}

inline void sum_tokens(const PatchEmbedArgs& a, int64_t begin, int64_t end, void* scratch) {
  const int64_t tokens = a.P + patches(a);
  float* sum = static_cast<float*>(scratch);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const Range range = part(tokens, chunk, a.token_chunks);
    float* total = a.token_sums + chunk * a.D;
    std::memset(total, 0, static_cast<size_t>(a.D) * sizeof(float));
    for (int64_t t = range.begin; t < range.end; ++t) {
      std::memset(sum, 0, static_cast<size_t>(a.D) * sizeof(float));
      VK_SWITCH_FLOAT(a.dtype, {
        for (int64_t b = 0; b < a.B; ++b) {
          const scalar_t* row = dtokens_row<scalar_t>(a, b, t);
          for_each_vec(a.D, [&](int64_t d, int lanes) {
            store_or(sum + d, load_or(sum + d, lanes) + load_or(row + d, lanes), lanes);
          });
        }
      });
      if (t < a.P) {
        store_floats(sum, a.D, a.dprefix, t);
      } else {
        for (int64_t d = 0; d < a.D; ++d) total[d] += sum[d];
      }
      if (t >= a.dpos_first) store_floats(sum, a.D, a.dpos, t - a.dpos_first);
    }
  }
}

inline void store_dbias(const PatchEmbedArgs& a) {
  for (int64_t d = 0; d < a.D; ++d) {
    float sum = 0.0f;
    for (int64_t chunk = 0; chunk < a.token_chunks; ++chunk) sum += a.token_sums[chunk * a.D + d];
    a.dbias_sum[d] = sum;
  }
  store_floats(a.dbias_sum, a.D, a.dbias, 0);
}

// ---- dweight

// dtokens of the patches of all images as units along the patches: row u holds unit u of every
// embedding column.
template <class Unit>
int64_t packed_dtokens_units(const PatchEmbedArgs& a) {
  return units_of<Unit>(a.B * patches(a)) * round_up(a.D, kVec);
}

inline int64_t dtokens_blocks(const PatchEmbedArgs& a) {
  return ceil_div(a.B * patches(a), kPackTokens);
}

template <class T>
void pack_dtokens_blocks(const PatchEmbedArgs& a, int64_t begin, int64_t end) {
  using Unit = typename UnitOf<T>::type;
  constexpr int64_t kStep = kElements<Unit>;
  const int64_t N = patches(a), M = a.B * N, stride = round_up(a.D, kVec);
  const int64_t last = end * kPackTokens < M ? end * kPackTokens : M;
  for (int64_t m = begin * kPackTokens; m < last; m += kStep) {
    const T* first = dtokens_row<T>(a, m / N, a.P + m % N);
    const bool has_second = kStep == 2 && m + 1 < M;
    const int64_t second =
        has_second ? dtokens_row<T>(a, (m + 1) / N, a.P + (m + 1) % N) - first : 0;
    float* out = static_cast<float*>(a.packed_dtokens) + m / kStep * stride;
    for (int64_t d = 0; d < a.D; d += kVec)
      store(out + d, load_row_units<Unit>(first + d, second, has_second, a.D - d));
  }
}

inline int64_t weight_row_blocks(const PatchEmbedArgs& a) { return ceil_div(a.D, kMaxWeightRows); }
inline int64_t weight_blocks(const PatchEmbedArgs& a) {
  return line_blocks(a) * weight_row_blocks(a);
}

template <class Unit>
struct DweightScratch {
  Element<Unit>*rows, *line;
  Unit* packed;
  float* sums;
  int64_t stride, bytes;

  DweightScratch(const PatchEmbedArgs& a, void* memory) {
    Carver carver(memory);
    stride = line_columns(a);
    rows = carver.take<Element<Unit>>(kChunkTokens * stride);
    line = carver.take<Element<Unit>>(line_elements(a));
    packed = carver.take<Unit>(kChunkTokens / kElements<Unit> * stride);
    sums = carver.take<float>(ceil_div(a.D, weight_row_blocks(a)) * stride);
    bytes = carver.bytes();
  }
};

// Rows of pixels as the B operand of the product; rows of floats one panel wide are one already.
template <class Unit>
VK_INLINE const Unit* pack_pixels(const DweightScratch<Unit>& s, int64_t tokens, int64_t columns) {
  if constexpr (kElements<Unit> == 1)
    if (s.stride == round_up(columns, kVec) && s.stride <= kMaxPanel * kVec) return s.rows;
  pack_rows<Unit>(s.rows, s.stride, tokens, columns, s.packed);
  return s.packed;
}

inline void store_dweight(const PatchEmbedArgs& a, Range d_range, Range lines, const float* sums,
                          int64_t stride) {
  VK_SWITCH_FLOAT(a.dweight.dtype, {
    for (int64_t d = d_range.begin; d < d_range.end; ++d) {
      const float* sum = sums + (d - d_range.begin) * stride;
      scalar_t* out =
          static_cast<scalar_t*>(a.dweight.data) + d * patch_elements(a) + lines.begin * a.patch_w;
      for_each_channel(a, lines, [&](int64_t c, int64_t column, int64_t n) {
        const Vec scale = splat(a.channels[c].scale);
        const Vec rest = splat(a.residual ? a.channels[c].residual * a.dbias_sum[d] : 0.0f);
        for_each_vec(n, [&](int64_t i, int lanes) {
          store_or(out + column + i, fma(scale, load_or(sum + column + i, lanes), rest), lanes);
        });
      });
    }
  });
}

template <class T, class Unit>
void dweight_items(const PatchEmbedArgs& a, int64_t begin, int64_t end, void* memory) {
  const DweightScratch<Unit> s(a, memory);
  const int64_t M = a.B * patches(a), D = round_up(a.D, kVec), row_parts = weight_row_blocks(a);
  for (int64_t item = begin; item < end; ++item) {
    const Range lines = line_block(a, item / row_parts),
                d_range = part(a.D, item % row_parts, row_parts);
    const int64_t columns = lines.size() * a.patch_w;
    if (M == 0)
      std::memset(s.sums, 0, static_cast<size_t>(d_range.size() * s.stride) * sizeof(float));
    for (int64_t m = 0; m < M; m += kChunkTokens) {
      const Range tokens = {m, m + kChunkTokens < M ? m + kChunkTokens : M};
      operand_rows<T>(
          a, tokens, lines,
          [&](int64_t c, int64_t row) { return (c * a.patch_h + row - lines.begin) * a.patch_w; },
          s.rows, s.stride, s.line);
      const Unit* pixels = pack_pixels<Unit>(s, tokens.size(), columns);
      const int64_t units = units_of<Unit>(tokens.size());
      const Unit* g =
          static_cast<const Unit*>(a.packed_dtokens) + m / kElements<Unit> * D + d_range.begin;
      gemm<ALayout::kColMajor>(d_range.size(), columns, units, g, D, pixels, units, 0, s.sums,
                               s.stride, m > 0);
    }
    store_dweight(a, d_range, lines, s.sums, s.stride);
  }
}

// ---- dimages

template <class Unit>
int64_t packed_lines_units(const PatchEmbedArgs& a) {
  return line_blocks(a) * units_of<Unit>(a.D) * line_columns(a);
}

template <class Unit>
VK_INLINE Unit* packed_lines(const PatchEmbedArgs& a, int64_t block) {
  return static_cast<Unit*>(a.packed_weight) + block * units_of<Unit>(a.D) * line_columns(a);
}

template <class Unit>
struct LinesScratch {
  Element<Unit>* rows;
  int64_t stride, bytes;

  LinesScratch(const PatchEmbedArgs& a, void* memory) {
    Carver carver(memory);
    stride = line_columns(a);
    rows = carver.take<Element<Unit>>(a.D * stride);
    bytes = carver.bytes();
  }
};

template <class Unit>
void pack_line_blocks(const PatchEmbedArgs& a, int64_t begin, int64_t end, void* memory) {
  const LinesScratch<Unit> s(a, memory);
  for (int64_t block = begin; block < end; ++block) {
    const Range lines = line_block(a, block);
    const int64_t columns = lines.size() * a.patch_w, first = lines.begin * a.patch_w;
    for (int64_t d = 0; d < a.D; ++d)
      convert(a.weight_dtype, a.weight, d * patch_elements(a) + first, columns,
              s.rows + d * s.stride);
    pack_rows<Unit>(s.rows, s.stride, a.D, columns, packed_lines<Unit>(a, block));
  }
}

// Items of dimages: blocks of patches that never cross an image.
inline int64_t blocks_per_image(const PatchEmbedArgs& a) {
  const int64_t images = a.B > 0 ? a.B : 1;
  return ceil_div(blocks_of_rows(images * patches(a), a.D * 4), images);
}
inline int64_t image_blocks(const PatchEmbedArgs& a) { return a.B * blocks_per_image(a); }

template <class Unit>
struct DimagesScratch {
  Unit* rows;
  float* tile;
  int64_t stride, bytes;

  DimagesScratch(const PatchEmbedArgs& a, void* memory) {
    Carver carver(memory);
    const int64_t most = ceil_div(patches(a), blocks_per_image(a));
    stride = line_columns(a);
    rows = carver.take<Unit>(most * round_up(units_of<Unit>(a.D), kVec));
    tile = carver.take<float>(most * stride);
    bytes = carver.bytes();
  }
};

// The tile's rows are the patches `rows` of image b, its columns the block of lines.
template <class T>
void store_dimages(const PatchEmbedArgs& a, int64_t b, Range rows, Range lines, const float* tile,
                   int64_t stride) {
  const int64_t height = a.grid_h * a.patch_h;
  for (int64_t l = lines.begin; l < lines.end; ++l) {
    const int64_t c = l / a.patch_h, row = l % a.patch_h;
    const Vec scale = splat(a.channels[c].scale * a.channels[c].factor);
    T* channel = static_cast<T*>(a.dimages) + (b * a.C + c) * height * a.width;
    const float* p = tile + (l - lines.begin) * a.patch_w;
    for (int64_t n = rows.begin, y = n / a.grid_w, x = n % a.grid_w; n < rows.end; ++n, ++x) {
      if (x == a.grid_w) x = 0, ++y;
      T* out = channel + (y * a.patch_h + row) * a.width + x * a.patch_w;
      if (a.patch_w == 1) {
        *out = from_float<T>(scale[0] * *p);
      } else {
        for_each_vec(a.patch_w, [&](int64_t i, int lanes) {
          store_or(out + i, scale * load_or(p + i, lanes), lanes);
        });
      }
      p += stride;
    }
  }
}

template <class T>
void dimages_items(const PatchEmbedArgs& a, int64_t begin, int64_t end, void* memory) {
  using Unit = typename UnitOf<T>::type;
  const DimagesScratch<Unit> s(a, memory);
  const int64_t parts = blocks_per_image(a), units = units_of<Unit>(a.D);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / parts;
    const Range rows = part(patches(a), item % parts, parts);
    const RowUnits<Unit> g = row_units<Unit>(dtokens_row<T>(a, b, a.P + rows.begin), a.dtokens.row,
                                             rows.size(), a.D, s.rows);
    for (int64_t block = 0; block < line_blocks(a); ++block) {
      const Range lines = line_block(a, block);
      gemm<ALayout::kRowMajor>(rows.size(), lines.size() * a.patch_w, units, g.data, g.stride,
                               packed_lines<Unit>(a, block), units, 0, s.tile, s.stride, false);
      VK_SWITCH_FLOAT(a.images.dtype, store_dimages<scalar_t>(a, b, rows, lines, s.tile, s.stride));
    }
  }
}

}  // namespace
}  // namespace vitkernels
