// patch_merge_layer_norm for NVIDIA GPUs: row (b, i, j) of the merged map holds the C channels of
// pixels (2i + s % 2, 2j + s / 2) of x, s = 0..3, zeros beyond an odd edge; y = LN(row).
//
// Algorithm: a row is read once, from where its pixels lie, into registers, eight channels at a
//   time; mean and variance are two passes over the registers, in fp32. The backward reads x and dy
//   once and writes dx to the same pixels: a pixel belongs to one row, so nothing is added up
//   there. Each thread keeps the sums over rows of dweight and dbias for its columns, blocks write
//   them, and finish_kernel adds them in a fixed order: no atomics.
// Grid: 1..32 lanes a row up to C = 256, a block a row up to C = 1024. Beyond, where C % 8 != 0 and
//   for a y wider than x, a block walks the row and reads it again in each pass. Persistent: as
//   many blocks as stay (patch_merge_plan.h), which keep weight and bias in shared memory.
// Memory per block: 512 B + 32 C forward, 512 B + 48 C (16 C with a block per row) backward.
// Limits: B, H, W up to 2^30, C up to 2^28. 16-byte accesses where C % 8 == 0: an operand whose
//   pixels do not begin on 16-byte lines is copied first, so that bits do not depend on its place.
// Floor: bytes per element of x in 16 bits: forward 4 (x in, y out), backward 6 (dy, x in, dx out).
//   Swin-T's first merge, B128 of 56 x 56 x 96, at 4.3 TB/s: 36 and 54 us. Not measured.
//   Two rows of it are about 530 instructions of a warp forward and 790 backward (sm_90a SASS,
//   bf16), where the memory's time has room for 660 and 990.
#pragma once

#include "common/layer_norm_rows.cuh"
#include "patch_merge/patch_merge_plan.h"

namespace vitkernels {
namespace {

using patch_merge::kThreads;
using patch_merge::Plan;

struct MapView {  // (B, H, W, C) with unit channel stride; null data: absent
  void* data;
  int64_t stride_b, stride_h, stride_w;
  DType dtype;
};

struct RowsView {  // (rows, 4 C) with unit column stride
  void* data;
  int64_t stride;
  DType dtype;
};

struct MapSize {
  int64_t rows;
  int H, W, C;
};

struct ForwardArgs {
  MapView x;
  RowsView y;
  Parameter weight, bias;
  float *mean, *rstd;
  MapSize size;
  int lanes;
  float eps;
};

struct BackwardArgs {
  MapView x, dx;
  RowsView y;  // dy
  Parameter weight;
  const float *mean, *rstd;
  float* partial;  // (dweight, dbias) x blocks x 4 C; null: none wanted
  MapSize size;
  int lanes;
};

// ---- Widths fixed at compile time

// Those that models use: x and y alike, or y in 16 bits of an fp32 x (autocast). Which of the two
// 16-bit formats it is, is asked for every eight elements. kAny asks for the width too.
enum class Widths { kAny, k16, k32, k16Of32 };

template <Widths WIDTHS, class Args>
__host__ __device__ __forceinline__ void set_widths(Args& a) {
  const auto narrow = [](DType t) { return t == DType::kBF16 ? DType::kBF16 : DType::kF16; };
  if (WIDTHS == Widths::kAny) return;
  a.x.dtype = WIDTHS == Widths::k16 ? narrow(a.x.dtype) : DType::kF32;
  a.y.dtype = WIDTHS == Widths::k32 ? DType::kF32 : narrow(a.y.dtype);
}

// ---- Rows and their pixels

// A row of the merged map and the rows `step` after it. A team past the last one goes on with rows
// of length 0, so that its warp stays together.
struct Patch {
  int64_t row;
  int length;      // 4 C
  int b, h, w;     // of the merged map
  int db, dh, dw;  // the same of `step`: one division for all rows
  int has;         // bits: 1 the pixels below, 2 those on the right, 4 the row itself

  VK_DEVICE Patch(const MapSize& size, int64_t first, int64_t step) : row(first) {
    const int rows_h = (size.H + 1) / 2, rows_w = (size.W + 1) / 2;
    const auto split = [&](int64_t r, int& b, int& h, int& w) {
      const int64_t above = divide(r, rows_w), image = divide(above, rows_h);
      b = static_cast<int>(image);
      h = static_cast<int>(above - image * rows_h);
      w = static_cast<int>(r - above * rows_w);
    };
    split(first, b, h, w);
    split(step, db, dh, dw);
    look(size);
  }

  VK_DEVICE void advance(const MapSize& size, int64_t step) {
    const int rows_h = (size.H + 1) / 2, rows_w = (size.W + 1) / 2;
    row += step, b += db, h += dh, w += dw;
    if (w >= rows_w) w -= rows_w, ++h;
    if (h >= rows_h) h -= rows_h, ++b;
    look(size);
  }

  // Element of the upper left pixel's first channel.
  VK_DEVICE int64_t corner(const MapView& map) const {
    return b * map.stride_b + int64_t{2} * h * map.stride_h + int64_t{2} * w * map.stride_w;
  }

 private:
  VK_DEVICE void look(const MapSize& size) {
    const bool is_row = row < size.rows;
    length = is_row ? 4 * size.C : 0;
    has = (2 * h + 1 < size.H ? 1 : 0) + (2 * w + 1 < size.W ? 2 : 0) + (is_row ? 4 : 0);
  }
};

// Where a column of every row lies, from the row's corner.
struct Place {
  int64_t offset;
  int needs;  // bits of Patch::has; 8, which no row has, beyond the last column

  VK_DEVICE Place(const MapView& map, int column, int C) {
    const int pixel = (column >= C) + (column >= 2 * C) + (column >= 3 * C);
    offset = (pixel % 2 ? map.stride_h : 0) + (pixel >= 2 ? map.stride_w : 0) + column - pixel * C;
    needs = pixel + (column < 4 * C ? 4 : 8);
  }
  VK_DEVICE bool is_in(const Patch& patch) const { return (needs & ~patch.has) == 0; }
  // Eight columns that lie in one pixel, as a row of their own; none where they are not in the map.
  VK_DEVICE Columns<true> eight(const Patch& patch) const {
    return Columns<true>(0, 0, 1, is_in(patch) ? 8 : 0);
  }
};

// N chunks of a row of the map, from chunk `first`.
template <bool VEC, int N>
VK_DEVICE void load_patch(const MapView& map, const Patch& patch, int C, int rank, int size,
                          int first, float (&z)[N][8]) {
  const void* data = map.data;
  const int64_t corner = patch.corner(map);
  if constexpr (VEC) {
    Raw8 raw[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Place place(map, ((first + i) * size + rank) * 8, C);
      raw[i] =
          load_raw(element(data, corner + place.offset, map.dtype), map.dtype, place.eight(patch));
    }
#pragma unroll
    for (int i = 0; i < N; ++i) to_floats(raw[i], map.dtype, z[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Columns<VEC> columns(first + i, rank, size, patch.length);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const Place place(map, columns[j], C);
        z[i][j] = place.is_in(patch) ? load_scalar(data, map.dtype, corner + place.offset) : 0.0f;
      }
    }
  }
}

template <bool VEC>
VK_DEVICE void store_patch(const MapView& map, const Patch& patch, int C,
                           const Columns<VEC>& columns, const float (&v)[8]) {
  const int64_t corner = patch.corner(map);
  if constexpr (VEC) {
    const Place place(map, columns.first, C);
    store(element(map.data, corner + place.offset, map.dtype), map.dtype, place.eight(patch), v);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const Place place(map, columns[j], C);
      if (place.is_in(patch)) store_scalar(map.data, map.dtype, corner + place.offset, v[j]);
    }
  }
}

template <bool VEC>
VK_DEVICE Raw8 load_row(const RowsView& rows, const Patch& patch, const Columns<VEC>& columns) {
  const void* data = rows.data;
  return load_raw(element(data, patch.row * rows.stride, rows.dtype), rows.dtype, columns);
}

// Weight (0) and bias (1) of persistent blocks are in shared memory where a thread holds its
// chunks: from global memory each row would ask for their dtype and convert them again. Lanes past
// the last column read the first ones.
template <bool SHARED, bool VEC>
VK_DEVICE void load_parameter(const SharedParameters& shared, int which, const Parameter& p,
                              float absent, const Columns<VEC>& columns, float (&v)[8]) {
  if constexpr (SHARED)
    shared.load(which, columns.holds(0) ? columns : Columns<true>(0, 0, 1, 8), v);
  else
    load_parameter(p, columns, absent, v);
}

// ---- Forward

template <bool BLOCK, int CHUNKS>
constexpr int kForwardBlocks = patch_merge::forward_blocks(BLOCK, CHUNKS);

template <Widths WIDTHS, bool VEC, bool BLOCK, int CHUNKS>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<BLOCK, CHUNKS>)
    forward_kernel(const __grid_constant__ ForwardArgs arguments) {
  check_launch_bounds<kThreads>();
  ForwardArgs a = arguments;
  set_widths<WIDTHS>(a);
  constexpr int HELD = CHUNKS == 0 ? 1 : CHUNKS;
  VK_SHARED(float, partial, [2 * 2 * kWarp]);
  Team<BLOCK> team(a.lanes, partial);
  const int length = 4 * a.size.C;
  const int chunks = CHUNKS == 0 ? (length + 8 * team.size - 1) / (8 * team.size) : CHUNKS;
  const Divisor divisor(length);

  VK_DYNAMIC_SHARED(float, parameters);
  const SharedParameters shared(parameters, length);
  if constexpr (CHUNKS > 0) {
    shared.fill(0, a.weight, length, 1.0f);
    shared.fill(1, a.bias, length, 0.0f);
    __syncthreads();
  }

  Patch patch(a.size, team.first + team.offset, team.step);
  for (int64_t first = team.first; first < a.size.rows;
       first += team.step, patch.advance(a.size, team.step)) {
    float z[HELD][8];
    const auto load = [&](int chunk) {
      load_patch<VEC>(a.x, patch, a.size.C, team.rank, team.size, chunk, z);
    };
    if constexpr (CHUNKS > 0) load(0);
    const auto columns_of = [&](int chunk) {
      return Columns<VEC>(chunk, team.rank, team.size, patch.length);
    };
    const auto pass = [&](auto use) { each_chunk<CHUNKS>(chunks, columns_of, load, use); };

    const Statistics of_row = statistics<VEC>(team, z, divisor, a.eps, pass);
    const float mean = of_row.mean, rstd = of_row.rstd;
    if (team.rank == 0 && patch.length > 0) {
      a.mean[patch.row] = mean;
      a.rstd[patch.row] = rstd;
    }

    pass([&](int i, const Columns<VEC>& columns) {
      float weight[8], bias[8], y[8];
      load_parameter<(CHUNKS > 0)>(shared, 0, a.weight, 1.0f, columns, weight);
      load_parameter<(CHUNKS > 0)>(shared, 1, a.bias, 0.0f, columns, bias);
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] = (z[i][j] - mean) * rstd * weight[j] + bias[j];
      store(element(a.y.data, patch.row * a.y.stride, a.y.dtype), a.y.dtype, columns, y);
    });
  }
}

// ---- Backward

// xhat = (z - mean) * rstd, and dy, of N chunks.
template <bool VEC, int N>
VK_DEVICE void load_xhat_dy(const BackwardArgs& a, const Patch& patch, int rank, int size,
                            int first, float (&xhat)[N][8], float (&dy)[N][8]) {
  Raw8 raw[N];
#pragma unroll
  for (int i = 0; i < N; ++i)
    raw[i] = load_row(a.y, patch, Columns<VEC>(first + i, rank, size, patch.length));
  load_patch<VEC>(a.x, patch, a.size.C, rank, size, first, xhat);
  const float mean = patch.length > 0 ? a.mean[patch.row] : 0.0f,
              rstd = patch.length > 0 ? a.rstd[patch.row] : 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to_floats(raw[i], a.y.dtype, dy[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) xhat[i][j] = (xhat[i][j] - mean) * rstd;
  }
}

// The few warps whose sums fit in registers cannot have enough loads under way to hide memory: L2
// fetches the next row.
VK_DEVICE void prefetch_patch(const BackwardArgs& a, const Patch& patch, int rank, int size,
                              int chunks) {
  const void *x = a.x.data, *dy = a.y.data;
#pragma unroll 1
  for (int i = 0; i < chunks; ++i) {
    const Columns<true> columns(i, rank, size, patch.length);
    const Place place(a.x, columns.first, a.size.C);
    prefetch(element(x, patch.corner(a.x) + place.offset, a.x.dtype), a.x.dtype,
             place.eight(patch));
    prefetch(element(dy, patch.row * a.y.stride, a.y.dtype), a.y.dtype, columns);
  }
}

template <bool BLOCK, int CHUNKS>
constexpr int kBackwardBlocks = patch_merge::backward_blocks(BLOCK, CHUNKS);

template <Widths WIDTHS, bool VEC, bool BLOCK, int CHUNKS>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<BLOCK, CHUNKS>)
    backward_kernel(const __grid_constant__ BackwardArgs arguments) {
  check_launch_bounds<kThreads>();
  BackwardArgs a = arguments;
  set_widths<WIDTHS>(a);
  a.dx.dtype = a.x.dtype;
  constexpr int HELD = CHUNKS == 0 ? 1 : CHUNKS;
  VK_SHARED(float, partial, [2 * 2 * kWarp]);
  Team<BLOCK> team(a.lanes, partial);
  const int length = 4 * a.size.C;
  const int chunks = CHUNKS == 0 ? (length + 8 * team.size - 1) / (8 * team.size) : CHUNKS;
  const Divisor divisor(length);
  const int64_t blocks = gridDim.x;
  // This block's row of the partial sums of dweight (0) and dbias (1).
  const auto sums_of = [&](int which) {
    return a.partial == nullptr ? nullptr : a.partial + (which * blocks + blockIdx.x) * length;
  };
  ColumnSums<CHUNKS, VEC> dweight, dbias;

  // Where chunks are in registers: the weight, length floats, then the sums of lanes' rows.
  VK_DYNAMIC_SHARED(float, dynamic);
  const SharedParameters shared(dynamic, length);
  if constexpr (CHUNKS > 0) {
    shared.fill(0, a.weight, length, 1.0f);
    __syncthreads();
  }

  Patch next(a.size, team.first + team.offset, team.step);
  for (int64_t first = team.first; first < a.size.rows; first += team.step) {
    const Patch patch = next;
    next.advance(a.size, team.step);
    if constexpr (VEC) prefetch_patch(a, next, team.rank, team.size, chunks);
    const bool first_row = first == team.first;
    const float rstd = patch.length > 0 ? a.rstd[patch.row] : 0.0f;
    float xhat[HELD][8], dy[HELD][8];
    const auto load = [&](int chunk) {
      load_xhat_dy<VEC>(a, patch, team.rank, team.size, chunk, xhat, dy);
    };
    if constexpr (CHUNKS > 0) load(0);
    const auto columns_of = [&](int chunk) {
      return Columns<VEC>(chunk, team.rank, team.size, patch.length);
    };
    const auto pass = [&](auto use) { each_chunk<CHUNKS>(chunks, columns_of, load, use); };

    float sums[2] = {0.0f, 0.0f};  // of weight * dy and weight * dy * xhat
    pass([&](int i, const Columns<VEC>& columns) {
      float products[8], weight[8];
      load_parameter<(CHUNKS > 0)>(shared, 0, a.weight, 1.0f, columns, weight);
#pragma unroll
      for (int j = 0; j < 8; ++j) products[j] = dy[i][j] * xhat[i][j];
      dweight.add(i, columns, products, sums_of(0), first_row);
      dbias.add(i, columns, dy[i], sums_of(1), first_row);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[0] += weight[j] * dy[i][j];
        sums[1] += weight[j] * products[j];
        if constexpr (CHUNKS > 0) dy[i][j] *= weight[j];
      }
    });
    if (a.dx.data == nullptr) continue;
    team.sum(sums);
    const float mean_wdy = sums[0] * divisor.inverse, mean_wdy_xhat = sums[1] * divisor.inverse;

    pass([&](int i, const Columns<VEC>& columns) {
      float g[8], weight[8];
      if constexpr (CHUNKS == 0) load_parameter(a.weight, columns, 1.0f, weight);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float wdy = CHUNKS == 0 ? weight[j] * dy[i][j] : dy[i][j];
        g[j] = rstd * (wdy - mean_wdy - xhat[i][j] * mean_wdy_xhat);
      }
      store_patch(a.dx, patch, a.size.C, columns, g);
    });
  }

  if (a.partial == nullptr || CHUNKS == 0) return;
  write_sums<BLOCK, false>(team, length, dynamic + length, sums_of, dweight, dbias);
}

}  // namespace
}  // namespace vitkernels
