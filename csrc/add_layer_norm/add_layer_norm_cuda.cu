// add_layer_norm and layer_norm_add for NVIDIA GPUs: y = LN(z), z = residual + row_scale * gamma *
// dropout(x); and out = residual + row_scale * LN(x). Both are one forward kernel (FORM) and one
// backward kernel.
//
// Algorithm: a row is read once into registers, eight elements at a time (two-pass mean and
// variance in fp32, so no
//   cancellation), and written once. The backward does one pass per row too, and each thread keeps
//   the sums over rows of dweight, dbias and dgamma for its columns; blocks write partial sums,
//   `finish_kernel` adds them in a fixed order: no atomics, the same bits every time. Dropout's
//   mask is computed again in the backward.
// Grid: C <= 1024: 1..32 lanes a row (C / 8 rounded up to a power of two), 8 warps a block,
// grid-stride over rows;
//   C <= 8192: a block a row; beyond: a block walks the row, reading it again for each pass. The
//   backward's grid is persistent: multiprocessors x blocks that fit. add_layer_norm_plan.h has the
//   numbers.
// Memory per block: 512 B static; the backward adds 12 C bytes (12 KB at most) where a warp or less
// has a row. Limits: any C >= 1, any alignment; 16-byte accesses where C % 8 == 0 and all rows
// begin on a 16-byte line. Floor, bytes per element at 4.3 TB/s with x, z and y in bf16 (fp32
// residual): forward x, residual in, z, y out: 8 (12);
//   backward dy, dz, z in, dz out: 8 (14); with LayerScale also x in, dx out: 12 (18). ViT-B, B256
//   N197 C768: 72 us, 72 us, 108 us. Rows with row_scale 0 save the 2 bytes of x. Expected
//   distance, not measured: 80-90% of the bandwidth forward; the partial sums of the backward (132
//   blocks x 3 C x 4 B, written and read) add 3%.
#include <cmath>

#include "add_layer_norm/add_layer_norm_plan.h"
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/stable.h"

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

// ---- What both directions share

// The threads that have a row: some lanes of a warp, or the block.
template <bool BLOCK>
struct Team {
  int rank, size;
  int64_t first, step;  // row of the warp's (block's) first team, and from there to its next one
  int offset;           // of this team from the first
  float* partial;       // shared: two buffers of 2 x 32 floats, used in turn
  int turn = 0;

  VK_DEVICE Team(int lanes, float* partial) : partial(partial) {
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
      sum_over_lanes(v, size);
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
  unsigned keep = 0xff;
  if (dropout.seed != nullptr) {
    keep = 0;
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed),
                   index = static_cast<uint64_t>(row.index * C);
#pragma unroll 2
    for (int j = 0; j < 8; ++j)  // not unrolled in full: ten rounds are a hundred instructions
      keep |= static_cast<unsigned>(keeps(dropout, seed, index + static_cast<uint64_t>(columns[j])))
              << j;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) f[j] = keep >> j & 1 ? row.scale * dropout.scale : 0.0f;
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
#pragma unroll
    for (int j = 0; j < 8; ++j) z[i][j] = residual[j];
  }
}

template <Form FORM, bool VEC, bool BLOCK, int CHUNKS>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ ForwardArgs a) {
  check_launch_bounds<kThreads>();
  constexpr int HELD = CHUNKS == 0 ? 1 : CHUNKS;
  VK_SHARED(float, partial, [2 * 2 * kWarp]);
  Team<BLOCK> team(a.lanes, partial);
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
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float d = columns.holds(j) ? z[i][j] - mean : 0.0f;
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

template <bool VEC, bool BLOCK, int CHUNKS, bool DGAMMA>
__global__ void __launch_bounds__(kResidency<VEC, BLOCK, CHUNKS, DGAMMA>.threads,
                                  kResidency<VEC, BLOCK, CHUNKS, DGAMMA>.blocks)
    backward_kernel(const __grid_constant__ BackwardArgs a) {
  check_launch_bounds<kResidency<VEC, BLOCK, CHUNKS, DGAMMA>.threads>();
  constexpr int HELD = CHUNKS == 0 ? 1 : CHUNKS;
  VK_SHARED(float, partial, [2 * 2 * kWarp]);
  Team<BLOCK> team(a.lanes, partial);
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
    const auto over_teams = [&](auto& sums) {
      for (int distance = team.size; distance < kWarp; distance *= 2) {
#pragma unroll
        for (int i = 0; i < HELD; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            sums.held[i][j] += __shfl_xor_sync(kAllLanes, sums.held[i][j], distance);
      }
    };
    over_teams(dweight);
    over_teams(dbias);
    if constexpr (DGAMMA) over_teams(dgamma);
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

// ---- Which instance

using ForwardKernel = void (*)(ForwardArgs);
using BackwardKernel = void (*)(BackwardArgs);

template <Form FORM>
ForwardKernel forward_instance(const Plan& p) {
  const int key = (p.block_per_row ? 10 : 0) + p.chunks;
  if (!p.vectorized) {
    switch (key) {
      case 1:
        return forward_kernel<FORM, false, false, 1>;
      case 2:
        return forward_kernel<FORM, false, false, 2>;
      case 12:
        return forward_kernel<FORM, false, true, 2>;
      default:
        return forward_kernel<FORM, false, true, 0>;
    }
  }
  switch (key) {
    case 1:
      return forward_kernel<FORM, true, false, 1>;
    case 2:
      return forward_kernel<FORM, true, false, 2>;
    case 3:
      return forward_kernel<FORM, true, false, 3>;
    case 4:
      return forward_kernel<FORM, true, false, 4>;
    case 11:
      return forward_kernel<FORM, true, true, 1>;
    case 12:
      return forward_kernel<FORM, true, true, 2>;
    case 14:
      return forward_kernel<FORM, true, true, 4>;
    default:
      return forward_kernel<FORM, true, true, 0>;
  }
}

template <bool DGAMMA>
BackwardKernel backward_instance(const Plan& p) {
  const int key = (p.block_per_row ? 10 : 0) + p.chunks;
  if (!p.vectorized) {
    switch (key) {
      case 1:
        return backward_kernel<false, false, 1, DGAMMA>;
      case 2:
        return backward_kernel<false, false, 2, DGAMMA>;
      case 12:
        return backward_kernel<false, true, 2, DGAMMA>;
      default:
        return backward_kernel<false, true, 0, DGAMMA>;
    }
  }
  switch (key) {
    case 1:
      return backward_kernel<true, false, 1, DGAMMA>;
    case 2:
      return backward_kernel<true, false, 2, DGAMMA>;
    case 3:
      return backward_kernel<true, false, 3, DGAMMA>;
    case 4:
      return backward_kernel<true, false, 4, DGAMMA>;
    case 11:
      return backward_kernel<true, true, 1, DGAMMA>;
    case 12:
      return backward_kernel<true, true, 2, DGAMMA>;
    case 14:
      return backward_kernel<true, true, 4, DGAMMA>;
    default:
      return backward_kernel<true, true, 0, DGAMMA>;
  }
}

// ---- Launchers

// Collects the operands of one call: their views, the checks they need, and whether 16-byte
// accesses fit them all.
class Operands {
 public:
  Operands(const char* op, const Tensor& x)
      : op_(op), C_(x.dim() > 0 ? x.size(x.dim() - 1) : 0), numel_(x.numel()) {
    VK_CHECK(C_ >= 1 && C_ <= INT32_MAX / 2, op_, "C must be from 1 to 2^30, got ", C_);
    rows_ = numel_ / C_;
    samples_ = x.dim() > 1 ? x.size(0) : 1;
  }

  int64_t rows() const { return rows_; }
  int64_t rows_per_sample() const {
    return samples_ == 0 ? 1 : std::max<int64_t>(rows_ / samples_, 1);
  }
  int C() const { return static_cast<int>(C_); }
  bool aligned() const { return aligned_; }

  RowsView rows(const OptTensor& t, const char* name) {
    if (!t.has_value()) return {nullptr, 0, DType::kF32};
    check_device(*t, name);
    VK_CHECK(t->numel() == numel_ && t->size(t->dim() - 1) == C_, op_, name,
             " must have the shape of x");
    const Rows view = as_rows(*t, op_, name);
    check_float(view.dtype, name);
    owners_.push_back(view.owner);
    note(view.data, view.stride * size_of(view.dtype));
    return {view.data, view.stride, view.dtype};
  }

  Parameter parameter(const OptTensor& t, const char* name) {
    if (!t.has_value()) return {nullptr, DType::kF32};
    check_device(*t, name);
    VK_CHECK(t->dim() == 1 && t->numel() == C_, op_, name, " must have shape (C,)");
    owners_.push_back(torch::stable::contiguous(*t));
    const DType dtype = dtype_of(*t, op_, name);
    check_float(dtype, name);
    note(owners_.back().const_data_ptr(), 0);
    return {owners_.back().const_data_ptr(), dtype};
  }

  const float* floats(const OptTensor& t, int64_t numel, const char* name) {
    if (!t.has_value()) return nullptr;
    check_device(*t, name);
    VK_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == numel && t->is_contiguous(),
             op_, name, " must be contiguous float32 with ", numel, " elements");
    return static_cast<const float*>(t->const_data_ptr());
  }
  const float* row_scale(const OptTensor& t) { return floats(t, samples_, "row_scale"); }

  Dropout dropout(const OptTensor& seed, double p) {
    if (p == 0.0) return {nullptr, 0, 1.0f};
    VK_CHECK(p > 0.0 && p < 1.0, op_, "dropout_p must be in [0, 1), got ", p);
    VK_CHECK(seed.has_value(), op_, "seed must be given when dropout_p > 0");
    check_device(*seed, "seed");
    VK_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op_,
             "seed must be one int64");
    return {static_cast<const int64_t*>(seed->const_data_ptr()),
            static_cast<uint64_t>(std::nearbyint(p * 0x1p32)), static_cast<float>(1.0 / (1.0 - p))};
  }

  // A new contiguous tensor and its view.
  Output output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype,
                Tensor* out) {
    *out = empty_like_shape(like, shape, dtype);
    const DType tag = dtype_of(dtype, op_, "an output's dtype");
    check_float(tag, "an output's dtype");
    note(out->const_data_ptr(), C_ * size_of(tag));
    return {out->mutable_data_ptr(), tag};
  }

 private:
  void check_device(const Tensor& t, const char* name) {
    VK_CHECK(Device::holds(t), op_, name, " is on another device than this kernel's");
  }
  void check_float(DType dtype, const char* name) {
    VK_CHECK(dtype != DType::kBool, op_, name, " must be float32, bfloat16 or float16, got bool");
  }
  void note(const void* data, int64_t row_bytes) {
    aligned_ = aligned_ && reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
  }

  const char* op_;
  int64_t C_, numel_, rows_ = 0, samples_ = 1;
  bool aligned_ = true;
  std::vector<Tensor> owners_;  // contiguous copies, alive until the launch
};

std::vector<int64_t> without_last(std::vector<int64_t> shape) {
  shape.pop_back();
  return shape;
}

template <Form FORM>
void launch_forward(const Device& device, Operands& operands, ForwardArgs& a) {
  a.rows = operands.rows();
  a.rows_per_sample = operands.rows_per_sample();
  a.C = operands.C();
  const Plan p = add_layer_norm::plan(a.rows, a.C, operands.aligned(), device.multiprocessors(),
                                      Pass::kForward);
  a.lanes = p.lanes;
  if (a.rows > 0)
    device.launch(forward_instance<FORM>(p), dim3(static_cast<unsigned>(p.blocks)), dim3(p.threads),
                  p.shared_bytes, a);
}

// Launches the backward and, where a parameter's gradient is wanted, the sums over its blocks.
void launch_backward(const Device& device, Operands& operands, BackwardArgs& a, const Tensor& like,
                     const OptTensor (&gradients)[3]) {
  a.rows = operands.rows();
  a.rows_per_sample = operands.rows_per_sample();
  a.C = operands.C();
  const Plan p = add_layer_norm::plan(a.rows, a.C, operands.aligned(), device.multiprocessors(),
                                      backward_pass(gradients[2].has_value()));
  a.lanes = p.lanes;
  OptTensor scratch;
  FinishArgs finish{};
  bool any = false;
  for (int i = 0; i < 3; ++i) {
    if (!gradients[i].has_value()) continue;
    any = true;
    finish.out[i] = {gradients[i]->mutable_data_ptr(),
                     dtype_of(*gradients[i], "layer norm backward", "parameter")};
    finish.blocks[i] = i < 2 && a.dy.data == nullptr ? 0 : p.blocks;
  }
  if (any) {
    scratch = empty_like_shape(like, {3, p.blocks, a.C}, ScalarType::Float);
    a.partial = static_cast<float*>(scratch->mutable_data_ptr());
    finish.partial = a.partial;
    finish.stride = p.blocks * a.C;
    finish.C = a.C;
  }
  if (a.rows > 0)
    device.launch(
        gradients[2].has_value() ? backward_instance<true>(p) : backward_instance<false>(p),
        dim3(static_cast<unsigned>(p.blocks)), dim3(p.threads), p.shared_bytes, a);
  if (any)
    device.launch(finish_kernel, dim3((static_cast<unsigned>(a.C) + kWarp - 1) / kWarp, 3),
                  dim3(kWarp, kFinishRows), 0, finish);
}

std::tuple<Tensor, OptTensor, Tensor, Tensor> add_layer_norm_fwd(
    Tensor x, OptTensor residual, OptTensor weight, OptTensor bias, OptTensor gamma,
    OptTensor row_scale, OptTensor seed, double dropout_p, double eps, ScalarType out_dtype) {
  const Device device(x);
  Operands operands("add_layer_norm_fwd", x);
  VK_CHECK(
      residual.has_value() || (!gamma.has_value() && !row_scale.has_value() && dropout_p == 0.0),
      "add_layer_norm_fwd", "residual must be given when the branch is scaled or dropped");
  const std::vector<int64_t> shape = shape_of(x);
  Tensor y, z, mean = empty_like_shape(x, without_last(shape), ScalarType::Float),
               rstd = empty_like_shape(x, without_last(shape), ScalarType::Float);
  ForwardArgs a{};
  a.x = operands.rows(x, "x");
  a.residual = operands.rows(residual, "residual");
  a.weight = operands.parameter(weight, "weight");
  a.bias = operands.parameter(bias, "bias");
  a.gamma = operands.parameter(gamma, "gamma");
  a.row_scale = operands.row_scale(row_scale);
  a.dropout = operands.dropout(seed, dropout_p);
  a.y = operands.output(x, shape, out_dtype, &y);
  if (residual.has_value()) a.z = operands.output(*residual, shape, residual->scalar_type(), &z);
  a.mean = static_cast<float*>(mean.mutable_data_ptr());
  a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  a.eps = static_cast<float>(eps);
  launch_forward<Form::kAddNorm>(device, operands, a);
  return {y, residual.has_value() ? OptTensor(z) : OptTensor(), mean, rstd};
}

std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor> add_layer_norm_bwd(
    OptTensor dy, OptTensor dnew_residual, Tensor z, Tensor mean, Tensor rstd, OptTensor x,
    OptTensor weight, OptTensor bias, OptTensor gamma, OptTensor row_scale, OptTensor seed,
    double dropout_p, ScalarType x_dtype, std::vector<bool> output_mask) {
  const char* op = "add_layer_norm_bwd";
  const Device device(z);
  Operands operands(op, z);
  VK_CHECK(output_mask.size() == 5, op, "output_mask must have 5 entries, got ",
           output_mask.size());
  VK_CHECK(!output_mask[4] || x.has_value(), op,
           "x must be given when the gradient of gamma is wanted");
  const std::vector<int64_t> shape = shape_of(z);
  BackwardArgs a{};
  a.dy = operands.rows(dy, "dy");
  a.dz = operands.rows(dnew_residual, "dnew_residual");
  a.z = operands.rows(z, "z");
  if (output_mask[4]) a.x = operands.rows(x, "x");
  a.mean = operands.floats(mean, operands.rows(), "mean");
  a.rstd = operands.floats(rstd, operands.rows(), "rstd");
  a.weight = operands.parameter(weight, "weight");
  a.gamma = operands.parameter(gamma, "gamma");
  a.row_scale = operands.row_scale(row_scale);
  a.dropout = operands.dropout(seed, dropout_p);
  Tensor dx, dresidual;
  if (output_mask[0]) a.dx = operands.output(z, shape, x_dtype, &dx);
  if (output_mask[1]) a.dresidual = operands.output(z, shape, z.scalar_type(), &dresidual);
  OptTensor gradients[3];
  const OptTensor* parameters[3] = {&weight, &bias, &gamma};
  for (int i = 0; i < 3; ++i) {
    if (!output_mask[2 + i]) continue;
    VK_CHECK(parameters[i]->has_value(), op,
             "output_mask asks for the gradient of a parameter that is None");
    gradients[i] =
        empty_like_shape(**parameters[i], {operands.C()}, (*parameters[i])->scalar_type());
  }
  launch_backward(device, operands, a, z, gradients);
  return {output_mask[0] ? OptTensor(dx) : OptTensor(),
          output_mask[1] ? OptTensor(dresidual) : OptTensor(), gradients[0], gradients[1],
          gradients[2]};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_add_fwd(Tensor x, Tensor residual, OptTensor weight,
                                                      OptTensor bias, OptTensor row_scale,
                                                      double eps) {
  const Device device(x);
  Operands operands("layer_norm_add_fwd", x);
  const std::vector<int64_t> shape = shape_of(x);
  Tensor out, mean = empty_like_shape(x, without_last(shape), ScalarType::Float),
              rstd = empty_like_shape(x, without_last(shape), ScalarType::Float);
  ForwardArgs a{};
  a.x = operands.rows(x, "x");
  a.residual = operands.rows(residual, "residual");
  a.weight = operands.parameter(weight, "weight");
  a.bias = operands.parameter(bias, "bias");
  a.row_scale = operands.row_scale(row_scale);
  a.y = operands.output(residual, shape, residual.scalar_type(), &out);
  a.mean = static_cast<float*>(mean.mutable_data_ptr());
  a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  a.eps = static_cast<float>(eps);
  launch_forward<Form::kNormAdd>(device, operands, a);
  return {out, mean, rstd};
}

std::tuple<OptTensor, OptTensor, OptTensor> layer_norm_add_bwd(Tensor dout, Tensor x, Tensor mean,
                                                               Tensor rstd, OptTensor weight,
                                                               OptTensor bias, OptTensor row_scale,
                                                               std::vector<bool> output_mask) {
  const char* op = "layer_norm_add_bwd";
  const Device device(x);
  Operands operands(op, x);
  VK_CHECK(output_mask.size() == 3, op, "output_mask must have 3 entries, got ",
           output_mask.size());
  BackwardArgs a{};
  a.dy = operands.rows(dout, "dout");
  a.z = operands.rows(x, "x");
  a.mean = operands.floats(mean, operands.rows(), "mean");
  a.rstd = operands.floats(rstd, operands.rows(), "rstd");
  a.weight = operands.parameter(weight, "weight");
  a.row_scale = operands.row_scale(row_scale);
  a.scale_dy = true;
  Tensor dx;
  if (output_mask[0]) a.dx = operands.output(x, shape_of(x), x.scalar_type(), &dx);
  OptTensor gradients[3];
  const OptTensor* parameters[2] = {&weight, &bias};
  for (int i = 0; i < 2; ++i) {
    if (!output_mask[1 + i]) continue;
    VK_CHECK(parameters[i]->has_value(), op,
             "output_mask asks for the gradient of a parameter that is None");
    gradients[i] =
        empty_like_shape(**parameters[i], {operands.C()}, (*parameters[i])->scalar_type());
  }
  launch_backward(device, operands, a, x, gradients);
  return {output_mask[0] ? OptTensor(dx) : OptTensor(), gradients[0], gradients[1]};
}

}  // namespace
}  // namespace vitkernels

VK_CUDA_LIBRARY_IMPL(m) {
  m.impl("add_layer_norm_fwd.cuda", TORCH_BOX(&vitkernels::add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd.cuda", TORCH_BOX(&vitkernels::add_layer_norm_bwd));
  m.impl("layer_norm_add_fwd.cuda", TORCH_BOX(&vitkernels::layer_norm_add_fwd));
  m.impl("layer_norm_add_bwd.cuda", TORCH_BOX(&vitkernels::layer_norm_add_bwd));
}
