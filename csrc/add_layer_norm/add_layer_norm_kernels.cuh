// add_layer_norm and layer_norm_add for NVIDIA GPUs, one forward kernel (FORM) and one backward:
//   y = LN(z), z = residual + row_scale * gamma * dropout(x);  out = residual + row_scale * LN(x).
//
// Algorithm: a row is read once, into registers, eight elements at a time; mean and variance are
//   two passes over the registers, in fp32. The backward reads its rows once too; each thread keeps
//   the sums over rows of dweight, dbias and dgamma for its columns, blocks write them, and
//   finish_kernel adds them in a fixed order: no atomics. Dropout's mask is computed again.
// Grid: 1..32 lanes a row up to C = 1024 (512 without 16-byte accesses), a block a row up to 8192
//   (4096); beyond, the block walks the row and reads it again in each pass. The forward strides
//   over rows; the backward's grid is persistent. add_layer_norm_plan.h has the numbers.
// Memory per block: 512 B; the backward adds 12 C bytes where a warp or less has a row.
// Limits: any C, any alignment; 16-byte accesses where C % 8 == 0 and rows begin on 16-byte lines.
// Floor: bytes per element with x, y, z in bf16 (fp32 residual) forward: x, residual in, z, y out,
//   8 (12); backward: dy, dz, z in, dz out, 8 (14), with LayerScale also x in, dx out, 12 (18).
//   ViT-B, B256 N197 C768 at 4.3 TB/s: 72, 72, 108 us. A row with row_scale 0 saves the 2 of x.
//   Not measured. The loop of C = 768 issues about 750 instructions a row (sm_80 SASS, bf16), which
//   is as long as the memory takes: predicted 75% of that bandwidth forward, 65% backward.
#pragma once

#include "add_layer_norm/add_layer_norm_plan.h"
#include "common/device.cuh"

namespace vitkernels {
namespace {

using add_layer_norm::kThreads;
using add_layer_norm::Pass;
using add_layer_norm::Plan;

enum class Form { kAddNorm, kNormAdd };

struct RowsView {  // (rows, C) with unit column stride; null data: absent
  const void* data;
  int64_t stride;
  DType dtype;
};

struct Parameter {  // (C,); null data: absent
  const void* data;
  DType dtype;
};

struct Output {  // (rows, C) contiguous; null data: not wanted
  void* data;
  DType dtype;
};

struct ForwardArgs {
  RowsView x, residual;
  Parameter weight, bias, gamma;
  const float* row_scale;
  Dropout dropout;
  Output y, z;
  float *mean, *rstd;
  int64_t rows, rows_per_sample;
  int C, lanes;
  float eps;
};

struct BackwardArgs {
  RowsView dy, dz, z, x;
  const float *mean, *rstd;
  Parameter weight, gamma;
  const float* row_scale;
  bool scale_dy;  // row_scale belongs to dy (layer_norm_add), not to the branch
  Dropout dropout;
  Output dx, dresidual;
  float* partial;  // (dweight, dbias, dgamma) x blocks x C; null: none wanted
  int64_t rows, rows_per_sample;
  int C, lanes;
};

// ---- Dtypes fixed at compile time

// The combinations that models use, without dropout: all operands alike, or a 16-bit branch on an
// fp32 residual stream (autocast); fp16 where it is usual, in add_layer_norm's forward. kAny reads
// dtypes from the arguments, at three times the instructions. Parameters keep theirs: they come
// from L1, with a branch per eight elements.
enum class Types { kAny, kF32, kBF16, kBF16Stream32, kF16, kF16Stream32 };

constexpr DType branch_type(Types t) {
  return t == Types::kF32                                 ? DType::kF32
         : t == Types::kBF16 || t == Types::kBF16Stream32 ? DType::kBF16
                                                          : DType::kF16;
}
constexpr DType stream_type(Types t) {
  return t == Types::kBF16 || t == Types::kF16 ? branch_type(t) : DType::kF32;
}

// Which operands belong to the branch and which to the stream.
template <Form FORM>
__host__ __device__ __forceinline__ void set_types(ForwardArgs& a, DType branch, DType stream) {
  a.x.dtype = branch;
  a.residual.dtype = a.z.dtype = stream;
  a.y.dtype = FORM == Form::kAddNorm ? branch : stream;
}
__host__ __device__ __forceinline__ void set_types(BackwardArgs& a, DType branch, DType stream) {
  a.dy.dtype = a.x.dtype = a.dx.dtype = branch;
  a.z.dtype = a.dz.dtype = a.dresidual.dtype = stream;
}

// ---- What both directions share

// The threads that have a row: some lanes of a warp (LANES, or the argument where that is 0), or
// the block.
template <bool BLOCK, int LANES>
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

  template <int N>
  VK_DEVICE void sum(float (&v)[N]) {
    if constexpr (BLOCK) {
      sum_over_block(v, partial + turn * 2 * kWarp);
      turn ^= 1;
    } else {
      sum_over_lanes(v, LANES == 0 ? size : LANES);
    }
  }
};

// One row of the team. A team past the last row goes on with a row of length 0, so that its warp
// stays together.
struct Row {
  int64_t index;
  int length;
  float scale;  // row_scale of its sample

  template <class Args>
  VK_DEVICE Row(const Args& a, int64_t row)
      : index(row < a.rows ? row : 0), length(row < a.rows ? a.C : 0) {
    scale = length == 0              ? 0.0f
            : a.row_scale == nullptr ? 1.0f
                                     : a.row_scale[divide(index, a.rows_per_sample)];
  }
};

template <bool VEC>
VK_DEVICE Raw8 load_row(const RowsView& rows, const Row& row, const Columns<VEC>& columns) {
  return load_raw(element(rows.data, row.index * rows.stride, rows.dtype), rows.dtype, columns);
}

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

// What the branch is multiplied with, gamma apart: row_scale[b] * keep / (1 - p).
template <bool VEC>
VK_DEVICE void branch_factors(const Dropout& dropout, const Row& row, int64_t C,
                              const Columns<VEC>& columns, float (&f)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) f[j] = row.scale;
  if (dropout.seed == nullptr) return;
  unsigned keep = 0;
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const uint64_t index = static_cast<uint64_t>(row.index * C);
#pragma unroll 2
  for (int j = 0; j < 8; ++j)  // not unrolled in full: ten rounds are a hundred instructions
    keep |= static_cast<unsigned>(keeps(dropout, seed, index + static_cast<uint64_t>(columns[j])))
            << j;
#pragma unroll
  for (int j = 0; j < 8; ++j) f[j] = keep >> j & 1 ? f[j] * dropout.scale : 0.0f;
}

// ---- Forward

// z of N chunks, from chunk `first`. `other` keeps the residual as it came, for layer_norm_add's
// last step.
template <Form FORM, bool VEC, int N>
VK_DEVICE void load_z(const ForwardArgs& a, const Row& row, int rank, int size, int first,
                      float (&z)[N][8], Raw8 (&other)[N]) {
  const bool skip = FORM == Form::kAddNorm && row.scale == 0.0f;  // a dropped branch is not read
  Raw8 x[N];
#pragma unroll
  for (int i = 0; i < N; ++i)
    x[i] = load_row(a.x, row, Columns<VEC>(first + i, rank, size, skip ? 0 : row.length));
  if (a.residual.data != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      other[i] = load_row(a.residual, row, Columns<VEC>(first + i, rank, size, row.length));
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to_floats(x[i], a.x.dtype, z[i]);
    if (FORM == Form::kNormAdd || a.residual.data == nullptr) continue;
    float residual[8];
    to_floats(other[i], a.residual.dtype, residual);
    if (!skip) {
      const Columns<VEC> columns(first + i, rank, size, row.length);
      float factor[8], gamma[8];
      branch_factors(a.dropout, row, a.C, columns, factor);
      load_parameter(a.gamma, columns, 1.0f, gamma);
#pragma unroll
      for (int j = 0; j < 8; ++j) residual[j] += factor[j] * gamma[j] * z[i][j];
    }
    // As new_residual stores it: the backward reads the rounded sum, and mean must belong to it.
    to_floats(to_raw(residual, a.residual.dtype), a.residual.dtype, z[i]);
  }
}

// In the warp's instances of several chunks a row has the whole warp.
template <Types TYPES, bool BLOCK, int CHUNKS>
constexpr int kLanes = TYPES != Types::kAny && !BLOCK && CHUNKS > 1 ? kWarp : 0;

template <Form FORM, Types TYPES, bool VEC, bool BLOCK, int CHUNKS>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ ForwardArgs arguments) {
  check_launch_bounds<kThreads>();
  ForwardArgs a = arguments;
  if constexpr (TYPES != Types::kAny) set_types<FORM>(a, branch_type(TYPES), stream_type(TYPES));
  if constexpr (TYPES != Types::kAny || FORM == Form::kNormAdd) a.dropout.seed = nullptr;
  constexpr int HELD = CHUNKS == 0 ? 1 : CHUNKS;
  VK_SHARED(float, partial, [2 * 2 * kWarp]);
  Team<BLOCK, kLanes<TYPES, BLOCK, CHUNKS>> team(a.lanes, partial);
  const int chunks = CHUNKS == 0 ? (a.C + 8 * team.size - 1) / (8 * team.size) : CHUNKS;
  const float C = static_cast<float>(a.C);

  for (int64_t first = team.first; first < a.rows; first += team.step) {
    const Row row(a, first + team.offset);
    float z[HELD][8];
    Raw8 other[HELD];
    if constexpr (CHUNKS > 0) load_z<FORM, VEC>(a, row, team.rank, team.size, 0, z, other);
    // Calls use(i, columns) for each chunk, whose z is z[i].
    const auto pass = [&](auto use) {
      if constexpr (CHUNKS > 0) {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) use(i, Columns<VEC>(i, team.rank, team.size, row.length));
      } else {
        for (int i = 0; i < chunks; ++i) {
          load_z<FORM, VEC>(a, row, team.rank, team.size, i, z, other);
          use(0, Columns<VEC>(i, team.rank, team.size, row.length));
        }
      }
    };

    float sum[1] = {0.0f};
    pass([&](int i, const Columns<VEC>&) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[0] += z[i][j];
    });
    team.sum(sum);
    const float mean = sum[0] / C;

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
    const float rstd = 1.0f / sqrtf(squares[0] / C + a.eps);
    if (team.rank == 0 && row.length > 0) {
      a.mean[row.index] = mean;
      a.rstd[row.index] = rstd;
    }

    pass([&](int i, const Columns<VEC>& columns) {
      if (a.z.data != nullptr)
        store(element(a.z.data, row.index * a.C, a.z.dtype), a.z.dtype, columns, z[i]);
      float weight[8], bias[8], y[8];
      load_parameter(a.weight, columns, 1.0f, weight);
      load_parameter(a.bias, columns, 0.0f, bias);
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] = (z[i][j] - mean) * rstd * weight[j] + bias[j];
      if constexpr (FORM == Form::kNormAdd) {
        float residual[8];
        to_floats(other[i], a.residual.dtype, residual);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          y[j] = row.scale == 0.0f ? residual[j] : residual[j] + row.scale * y[j];
      }
      store(element(a.y.data, row.index * a.C, a.y.dtype), a.y.dtype, columns, y);
    });
  }
}

// ---- Backward

// xhat = (z - mean) * rstd, and dy with its row scale, of N chunks.
template <bool VEC, int N>
VK_DEVICE void load_xhat_dy(const BackwardArgs& a, const Row& row, int rank, int size, int first,
                            float (&xhat)[N][8], float (&dy)[N][8]) {
  Raw8 raw_z[N], raw_dy[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Columns<VEC> columns(first + i, rank, size, row.length);
    raw_z[i] = load_row(a.z, row, columns);
    raw_dy[i] = load_row(a.dy, row, columns);
  }
  const float mean = row.length > 0 ? a.mean[row.index] : 0.0f,
              rstd = row.length > 0 ? a.rstd[row.index] : 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to_floats(raw_z[i], a.z.dtype, xhat[i]);
    to_floats(raw_dy[i], a.dy.dtype, dy[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      xhat[i][j] = (xhat[i][j] - mean) * rstd;
      if (a.scale_dy) dy[i][j] = row.scale == 0.0f ? 0.0f : dy[i][j] * row.scale;
    }
  }
}

// The few warps whose sums fit in registers cannot have enough loads under way to hide memory: L2
// fetches the next row.
template <bool DGAMMA>
VK_DEVICE void prefetch_row(const BackwardArgs& a, const Row& row, int rank, int size, int chunks) {
#pragma unroll 1
  for (int i = 0; i < chunks; ++i) {
    const Columns<true> columns(i, rank, size, row.length);
    const auto from = [&](const RowsView& rows) {
      if (rows.data != nullptr)
        prefetch(element(rows.data, row.index * rows.stride, rows.dtype), rows.dtype, columns);
    };
    from(a.z);
    from(a.dy);
    from(a.dz);
    if (DGAMMA && row.scale != 0.0f) from(a.x);
  }
}

// The block's sums over its rows. In registers where a thread has all its columns there, else in
// its part of `partial`.
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
};

constexpr Pass backward_pass(bool dgamma) {
  return dgamma ? Pass::kBackwardGamma : Pass::kBackward;
}

template <bool VEC, bool BLOCK, int CHUNKS, bool DGAMMA>
constexpr add_layer_norm::Residency kResidency =
    add_layer_norm::residency(VEC, BLOCK, CHUNKS, backward_pass(DGAMMA));

template <Types TYPES, bool VEC, bool BLOCK, int CHUNKS, bool DGAMMA>
__global__ void __launch_bounds__(kResidency<VEC, BLOCK, CHUNKS, DGAMMA>.threads,
                                  kResidency<VEC, BLOCK, CHUNKS, DGAMMA>.blocks)
    backward_kernel(const __grid_constant__ BackwardArgs arguments) {
  check_launch_bounds<kResidency<VEC, BLOCK, CHUNKS, DGAMMA>.threads>();
  BackwardArgs a = arguments;
  if constexpr (TYPES != Types::kAny) {
    set_types(a, branch_type(TYPES), stream_type(TYPES));
    a.dropout.seed = nullptr;
  }
  constexpr int HELD = CHUNKS == 0 ? 1 : CHUNKS;
  VK_SHARED(float, partial, [2 * 2 * kWarp]);
  Team<BLOCK, kLanes<TYPES, BLOCK, CHUNKS>> team(a.lanes, partial);
  const int chunks = CHUNKS == 0 ? (a.C + 8 * team.size - 1) / (8 * team.size) : CHUNKS;
  const float C = static_cast<float>(a.C);
  const int64_t blocks = gridDim.x;
  // This block's row of each of the three partial sums.
  const auto sums_of = [&](int which) {
    return a.partial == nullptr ? nullptr : a.partial + (which * blocks + blockIdx.x) * a.C;
  };
  ColumnSums<CHUNKS, VEC> dweight, dbias;
  ColumnSums<DGAMMA ? CHUNKS : 0, VEC> dgamma;

  Row next(a, team.first + team.offset);
  for (int64_t first = team.first; first < a.rows; first += team.step) {
    const Row row = next;
    next = Row(a, first + team.step + team.offset);
    if constexpr (VEC) prefetch_row<DGAMMA>(a, next, team.rank, team.size, chunks);
    const bool first_row = first == team.first;
    const bool skip = !a.scale_dy && row.scale == 0.0f;
    const float rstd = row.length > 0 ? a.rstd[row.index] : 0.0f;
    float xhat[HELD][8], dy[HELD][8];
    const auto pass = [&](auto use) {
      if constexpr (CHUNKS > 0) {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) use(i, Columns<VEC>(i, team.rank, team.size, row.length));
      } else {
        for (int i = 0; i < chunks; ++i) {
          if (a.dy.data != nullptr) load_xhat_dy<VEC>(a, row, team.rank, team.size, i, xhat, dy);
          use(0, Columns<VEC>(i, team.rank, team.size, row.length));
        }
      }
    };

    float sums[2] = {0.0f, 0.0f};  // of weight * dy and weight * dy * xhat
    if (a.dy.data != nullptr) {
      if constexpr (CHUNKS > 0) load_xhat_dy<VEC>(a, row, team.rank, team.size, 0, xhat, dy);
      pass([&](int i, const Columns<VEC>& columns) {
        float weight[8], products[8];
        load_parameter(a.weight, columns, 1.0f, weight);
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
      team.sum(sums);
    }
    const float mean_wdy = sums[0] / C, mean_wdy_xhat = sums[1] / C;

    pass([&](int i, const Columns<VEC>& columns) {
      float g[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) g[j] = 0.0f;
      if (a.dz.data != nullptr) to_floats(load_row(a.dz, row, columns), a.dz.dtype, g);
      if (a.dy.data != nullptr) {
        float weight[8];
        if constexpr (CHUNKS == 0) load_parameter(a.weight, columns, 1.0f, weight);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float wdy = CHUNKS == 0 ? weight[j] * dy[i][j] : dy[i][j];
          g[j] += rstd * (wdy - mean_wdy - xhat[i][j] * mean_wdy_xhat);
        }
      }
      if (a.dresidual.data != nullptr)
        store(element(a.dresidual.data, row.index * a.C, a.dresidual.dtype), a.dresidual.dtype,
              columns, g);
      if (a.dx.data == nullptr && !DGAMMA) return;
      float factor[8];
      branch_factors(a.dropout, row, a.C, columns, factor);
      if constexpr (DGAMMA) {
        float x[8];
        Columns<VEC> read = columns;
        if (skip) read.end = 0;
        to_floats(load_row(a.x, row, read), a.x.dtype, x);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] *= g[j] * factor[j];
        dgamma.add(i, columns, x, sums_of(2), first_row);
      }
      if (a.dx.data != nullptr) {
        float gamma[8];
        load_parameter(a.gamma, columns, 1.0f, gamma);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          g[j] = skip ? 0.0f : a.scale_dy ? g[j] : g[j] * factor[j] * gamma[j];
        store(element(a.dx.data, row.index * a.C, a.dx.dtype), a.dx.dtype, columns, g);
      }
    });
  }

  if (a.partial == nullptr || CHUNKS == 0) return;
  constexpr int SUMS = DGAMMA ? 3 : 2;
  if constexpr (BLOCK) {
    const auto write = [&](int which, const auto& sums) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const Columns<VEC> columns(i, team.rank, team.size, a.C);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (columns.holds(j)) sums_of(which)[columns[j]] = sums.held[i][j];
      }
    };
    write(0, dweight);
    write(1, dbias);
    if constexpr (DGAMMA) write(2, dgamma);
  } else {
    // Teams of a warp first, by shuffles; then warp after warp adds its sums to those in shared
    // memory.
    VK_DYNAMIC_SHARED(float, block_sums);
    const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
    [[maybe_unused]] const auto over_teams = [&](auto& sums) {
      for (int distance = team.size; distance < kWarp; distance *= 2) {
#pragma unroll
        for (int i = 0; i < HELD; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            sums.held[i][j] += __shfl_xor_sync(kAllLanes, sums.held[i][j], distance);
      }
    };
    if constexpr (kLanes<TYPES, BLOCK, CHUNKS> == 0) {
      over_teams(dweight);
      over_teams(dbias);
      if constexpr (DGAMMA) over_teams(dgamma);
    }
    for (int warp = 0; warp < warps; ++warp) {
      if (thread / kWarp == warp && team.offset == 0) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
          const Columns<VEC> columns(i, team.rank, team.size, a.C);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (!columns.holds(j)) continue;
            float* sums = block_sums + columns[j];
            sums[0] = (warp == 0 ? 0.0f : sums[0]) + dweight.held[i][j];
            sums[a.C] = (warp == 0 ? 0.0f : sums[a.C]) + dbias.held[i][j];
            if constexpr (DGAMMA)
              sums[2 * a.C] = (warp == 0 ? 0.0f : sums[2 * a.C]) + dgamma.held[i][j];
          }
        }
      }
      __syncthreads();
    }
    for (int which = 0; which < SUMS; ++which)
      for (int c = thread; c < a.C; c += static_cast<int>(blockDim.x))
        sums_of(which)[c] = block_sums[which * a.C + c];
  }
}

// ---- The sums over blocks: 32 columns a block, 16 threads a column, each every 16th partial sum,
// then a fixed order.

constexpr int kFinishRows = 16;

struct FinishArgs {
  const float* partial;
  Parameter out[3];  // dweight, dbias, dgamma
  int64_t blocks[3];
  int64_t stride;  // partial sums of one kind: blocks x C
  int C;
};

__global__ void __launch_bounds__(kWarp* kFinishRows)
    finish_kernel(const __grid_constant__ FinishArgs a) {
  check_launch_bounds<kWarp * kFinishRows>();
  VK_SHARED(float, sums, [kFinishRows][kWarp]);
  const int which = static_cast<int>(blockIdx.y), x = static_cast<int>(threadIdx.x),
            y = static_cast<int>(threadIdx.y);
  const int c = static_cast<int>(blockIdx.x) * kWarp + x;
  float sum = 0.0f;
  if (a.out[which].data != nullptr && c < a.C)
    for (int64_t block = y; block < a.blocks[which]; block += kFinishRows)
      sum += a.partial[which * a.stride + block * a.C + c];
  sums[y][x] = sum;
  __syncthreads();
  if (y != 0 || c >= a.C || a.out[which].data == nullptr) return;
  for (int i = 1; i < kFinishRows; ++i) sum += sums[i][x];
  store_scalar(const_cast<void*>(a.out[which].data), a.out[which].dtype, c, sum);
}

}  // namespace
}  // namespace vitkernels
