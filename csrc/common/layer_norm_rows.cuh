// What the LayerNorm kernels of add_layer_norm and patch_merge share: the threads of a row,
// parameters, statistics, and the sums over rows that become the parameters' gradients.
#pragma once

#include "common/dependent_launch.cuh"
#include "common/device.cuh"

namespace vitkernels {
namespace {

struct Parameter {  // one value a column; null data: absent
  const void* data;
  DType dtype;
};

// ---- The threads that have a row: some lanes of a warp (LANES, or the argument where that is 0),
// or the block

template <bool BLOCK, int LANES = 0>
struct Team {
  int rank, size;
  int64_t first, step;  // row of the warp's (block's) first team, and from there to its next one
  int offset;           // of this team from the first
  float* partial;       // shared: two buffers of 2 x 32 floats, used in turn
  int turn = 0;

  VK_DEVICE Team(int lanes_argument, float* partial) : partial(partial) {
    const int lanes = LANES == 0 ? lanes_argument : LANES;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if constexpr (BLOCK) {
      rank = thread, size = threads, first = blockIdx.x, step = gridDim.x, offset = 0;
    } else {
      const int teams = threads / lanes;
      rank = thread % lanes, size = lanes, offset = thread % kWarp / lanes;
      first = static_cast<int64_t>(blockIdx.x) * teams + thread / kWarp * (kWarp / lanes);
      step = static_cast<int64_t>(gridDim.x) * teams;
    }
  }

  // Chunk `chunk` of a row of `length` columns. Of CHUNKS chunks that a row needs, all but the last
  // are whole wherever a row belongs to whole warps.
  template <bool VEC, int CHUNKS>
  VK_DEVICE Columns<VEC> columns(int chunk, int length) const {
    Columns<VEC> c(chunk, rank, size, length);
    c.whole = (BLOCK || LANES > 0) && chunk + 1 < CHUNKS;
    return c;
  }

  template <int N>
  VK_DEVICE void sum(float (&v)[N]) {
    if constexpr (BLOCK) {
      sum_over_block(v, partial + turn * 2 * kWarp);
      turn ^= 1;
    } else if constexpr (LANES > 0) {
      sum_over_lanes(v, LANES);
    } else {  // of any size: every step is taken, a branch around it would cost more
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2)
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const float other = __shfl_xor_sync(kAllLanes, v[n], offset);
          if (offset < size) v[n] += other;
        }
    }
  }
};

// Calls use(place, columns) for each chunk of a row. Where a thread holds all CHUNKS of them a
// chunk has its place; with 0 each of the `chunks` is loaded again, by load(chunk), to place 0.
template <int CHUNKS, class ColumnsOf, class Load, class Use>
VK_DEVICE void each_chunk(int chunks, const ColumnsOf& columns_of, const Load& load,
                          const Use& use) {
  if constexpr (CHUNKS > 0) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) use(i, columns_of(i));
  } else {
    for (int i = 0; i < chunks; ++i) {
      load(i);
      use(0, columns_of(i));
    }
  }
}

// ---- Parameters

template <bool VEC>
VK_DEVICE void load_parameter(const Parameter& p, const Columns<VEC>& columns, float absent,
                              float (&v)[8]) {
  if (p.data != nullptr) {
    to_floats(load_raw<VEC, true>(p.data, p.dtype, columns), p.dtype, v);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = absent;
  }
}

// Parameters of all rows as fp32 in shared memory, `padded` columns each: eight neighbours are two
// pieces of four, the first ones before all second ones, so that lanes' 16-byte loads follow each
// other. An absent parameter, and the columns past the row's, hold `absent`.
class SharedParameters {
 public:
  VK_DEVICE SharedParameters(float* shared, int padded) : shared_(shared), padded_(padded) {}

  VK_DEVICE int padded() const { return padded_; }
  VK_DEVICE void fill(int which, const Parameter& p, int columns, float absent) const {
    for (int c = static_cast<int>(threadIdx.x); c < padded_; c += static_cast<int>(blockDim.x))
      shared_[which * padded_ + c % 8 / 4 * (padded_ / 2) + c / 8 * 4 + c % 4] =
          p.data != nullptr && c < columns ? load_scalar(p.data, p.dtype, c) : absent;
  }
  // Columns that begin before the padded end.
  VK_DEVICE void load(int which, const Columns<true>& columns, float (&v)[8]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 four = *reinterpret_cast<const uint4*>(shared_ + which * padded_ +
                                                         half * (padded_ / 2) + columns.first / 2);
      v[4 * half] = bits_to_float(four.x), v[4 * half + 1] = bits_to_float(four.y);
      v[4 * half + 2] = bits_to_float(four.z), v[4 * half + 3] = bits_to_float(four.w);
    }
  }

 private:
  float* shared_;
  int padded_;
};

// ---- Statistics

struct Statistics {
  float mean, rstd;
};

// The length of a row, which its sums are divided by: one division for all rows.
struct Divisor {
  float value, inverse;

  VK_BOTH explicit Divisor(int length)
      : value(static_cast<float>(length)), inverse(1.0f / static_cast<float>(length)) {}
};

// Of a row, in two passes: pass(use) calls use(i, columns) for each chunk of
// the thread, whose elements are then z[i], 0 beyond the row.
template <bool VEC, int N, class Team, class Pass>
VK_DEVICE Statistics statistics(Team& team, const float (&z)[N][8], const Divisor& length,
                                float eps, const Pass& pass) {
  float sum[1] = {0.0f};
  pass([&](int i, const Columns<VEC>&) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[0] += z[i][j];
  });
  team.sum(sum);
  const float about = sum[0] * length.inverse;  // to the last bit; then what a division gives
  const float mean = fmaf(fmaf(-about, length.value, sum[0]), length.inverse, about);

  float squares[1] = {0.0f};
  pass([&](int i, const Columns<VEC>& columns) {
    if (VEC && !columns.holds(0)) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float d = VEC || columns.holds(j) ? z[i][j] - mean : 0.0f;
      squares[0] += d * d;
    }
  });
  team.sum(squares);
  return {mean, rsqrt_approx(squares[0] * length.inverse + eps)};
}

// ---- Sums over rows, one a column

// The block's. In registers where a thread has all its columns there, else in its part of
// `partial`.
template <int CHUNKS, bool VEC>
struct ColumnSums {
  static constexpr int HELD = CHUNKS == 0 ? 1 : CHUNKS;
  float held[HELD][8] = {};

  VK_DEVICE void add(int i, const Columns<VEC>& columns, const float (&v)[8], float* partial,
                     bool first_row) {
    if constexpr (CHUNKS > 0) {
#pragma unroll
      for (int j = 0; j < 8; ++j) held[i][j] += v[j];
    } else if (partial != nullptr) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (columns.holds(j)) partial[columns[j]] = first_row ? v[j] : partial[columns[j]] + v[j];
    }
  }

  // Calls use(column, sum) for each of the thread's columns.
  template <class Team, class Use>
  VK_DEVICE void each(const Team& team, int length, Use&& use) const {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const Columns<VEC> columns(i, team.rank, team.size, length);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (columns.holds(j)) use(columns[j], held[i][j]);
    }
  }

  VK_DEVICE void add_teams_of_warp(int lanes) {
    for (int distance = lanes; distance < kWarp; distance *= 2) {
#pragma unroll
      for (int i = 0; i < HELD; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) held[i][j] += __shfl_xor_sync(kAllLanes, held[i][j], distance);
    }
  }
};

// Writes the sums that are held in registers to the block's partial sums, partial(which) of the
// which-th. With lanes per row: teams of a warp first, by shuffles (WARP: a warp has one team),
// then warp after warp adds its sums to those in shared memory, `length` floats of each.
template <bool BLOCK, bool WARP, class Team, class Partial, class... Sums>
VK_DEVICE void write_sums(const Team& team, int length, [[maybe_unused]] float* shared,
                          const Partial& partial, Sums&... sums) {
  if constexpr (BLOCK) {
    int which = 0;
    (sums.each(team, length,
               [&, to = partial(which++)](int column, float sum) { to[column] = sum; }),
     ...);
  } else {
    if constexpr (!WARP) (sums.add_teams_of_warp(team.size), ...);
    const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
    for (int warp = 0; warp < warps; ++warp) {
      if (thread / kWarp == warp && team.offset == 0) {
        int which = 0;
        (sums.each(team, length,
                   [&, of = shared + length * which++](int column, float sum) {
                     of[column] = (warp == 0 ? 0.0f : of[column]) + sum;
                   }),
         ...);
      }
      __syncthreads();
    }
    for (int which = 0; which < static_cast<int>(sizeof...(Sums)); ++which)
      for (int c = thread; c < length; c += static_cast<int>(blockDim.x))
        partial(which)[c] = shared[which * length + c];
  }
}

// ---- The sums over blocks: 32 columns a block, 16 threads a column, each every 16th partial sum,
// then a fixed order

constexpr int kFinishRows = 16;

struct FinishArgs {
  const float* partial;
  Parameter out[3];   // gradients of up to three parameters; null: not wanted
  int64_t blocks[3];  // partial sums of each
  int64_t stride;     // of one parameter's: blocks x columns
  int columns;
};

// Grid: (ceil(columns / 32), parameters), blocks of (32, kFinishRows).
__global__ void __launch_bounds__(kWarp* kFinishRows)
    finish_kernel(const __grid_constant__ FinishArgs a) {
  check_launch_bounds<kWarp * kFinishRows>();
  VK_SHARED(float, sums, [kFinishRows][kWarp]);
  const int which = static_cast<int>(blockIdx.y), x = static_cast<int>(threadIdx.x),
            y = static_cast<int>(threadIdx.y);
  const int c = static_cast<int>(blockIdx.x) * kWarp + x;
  wait_for_grid_before();
  float sum = 0.0f;
  if (a.out[which].data != nullptr && c < a.columns)
    for (int64_t block = y; block < a.blocks[which]; block += kFinishRows)
      sum += a.partial[which * a.stride + block * a.columns + c];
  sums[y][x] = sum;
  __syncthreads();
  if (y != 0 || c >= a.columns || a.out[which].data == nullptr) return;
  for (int i = 1; i < kFinishRows; ++i) sum += sums[i][x];
  store_scalar(const_cast<void*>(a.out[which].data), a.out[which].dtype, c, sum);
}

}  // namespace
}  // namespace vitkernels
