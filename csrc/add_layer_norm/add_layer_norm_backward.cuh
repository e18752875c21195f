// The backward kernel of add_layer_norm and layer_norm_add. add_layer_norm_cuda.cu has the map.
#pragma once

#include "add_layer_norm/add_layer_norm_rows.cuh"

namespace vitkernels {
namespace {

// xhat = (z - mean) * rstd, and dy with its row scale, of N chunks.
template <bool VEC, class Rows, int N>
VK_DEVICE void load_xhat_dy(const BackwardArgs& a, const Rows& rows, int rank, int size, int first,
                            float (&xhat)[N][8], float (&dy)[N][8]) {
  const Row& row = rows.row;
  Raw8 raw_z[N], raw_dy[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Columns<VEC> columns(first + i, rank, size, row.length);
    raw_z[i] = rows.template load<0>(i, columns);
    raw_dy[i] = rows.template load<2>(i, columns);
  }
  const float mean = rows.mean(), rstd = rows.rstd();
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

constexpr Pass backward_pass(bool dgamma) {
  return dgamma ? Pass::kBackwardGamma : Pass::kBackward;
}

template <bool VEC, bool BLOCK, int CHUNKS, bool DGAMMA>
constexpr add_layer_norm::Residency kResidency =
    add_layer_norm::residency(VEC, BLOCK, CHUNKS, backward_pass(DGAMMA));

template <Widths WIDTHS, bool VEC, bool BLOCK, int CHUNKS, bool DGAMMA>
__global__ void __launch_bounds__(kResidency<VEC, BLOCK, CHUNKS, DGAMMA>.threads,
                                  kResidency<VEC, BLOCK, CHUNKS, DGAMMA>.blocks)
    backward_kernel(const __grid_constant__ BackwardArgs arguments) {
  check_launch_bounds<kResidency<VEC, BLOCK, CHUNKS, DGAMMA>.threads>();
  constexpr bool RING = WIDTHS != Widths::kAny;
  BackwardArgs a = arguments;
  fix_types<WIDTHS>(a);
  constexpr int HELD = CHUNKS == 0 ? 1 : CHUNKS;
  VK_SHARED(float, partial, [2 * 2 * kWarp]);
  VK_DYNAMIC_SHARED(float, dynamic);
  Team<BLOCK, kLanes<WIDTHS, BLOCK, CHUNKS>> team(a.lanes, partial);
  const int chunks = CHUNKS == 0 ? (a.C + 8 * team.size - 1) / (8 * team.size) : CHUNKS;
  const int64_t blocks = gridDim.x;
  // This block's row of each of the three partial sums.
  const auto sums_of = [&](int which) {
    return a.partial == nullptr ? nullptr : a.partial + (which * blocks + blockIdx.x) * a.C;
  };
  ColumnSums<CHUNKS, VEC> dweight, dbias;
  ColumnSums<DGAMMA ? CHUNKS : 0, VEC> dgamma;

  const SharedParameters shared(dynamic, team.size * chunks * 8);
  float* after_parameters = dynamic + (RING ? kBackwardParameters * shared.padded() : 0);
  if constexpr (RING) {
    shared.fill(0, a.weight, a.C, 1.0f);
    shared.fill(1, a.gamma, a.C, 1.0f);
    __syncthreads();
  }
  const auto parameter = [&](int which, const Columns<VEC>& columns, float (&v)[8]) {
    if constexpr (RING)
      shared.load(which, columns, v);
    else
      load_parameter(which == 0 ? a.weight : a.gamma, columns, 1.0f, v);
  };

  auto rows = [&] {
    using Reads = BackwardReads<DGAMMA>;
    if constexpr (RING)
      return RingRows<Reads, WIDTHS, decltype(team), CHUNKS>(
          a, team, reinterpret_cast<char*>(after_parameters));
    else
      return DirectRows<Reads, decltype(team), VEC>(a, team, chunks);
  }();
  const Row& row = rows.row;
  using Index = RowIndex<WIDTHS>;
  for (Index first = static_cast<Index>(team.first); first < static_cast<Index>(a.rows);
       first += static_cast<Index>(team.step)) {
    rows.open(first);
    const bool first_row = first == static_cast<Index>(team.first);
    const bool skip = !a.scale_dy && row.scale == 0.0f;
    const float rstd = rows.rstd();
    float xhat[HELD][8], dy[HELD][8];
    unsigned kept = 0;
    const auto load = [&](int chunk) {
      if (a.dropout.seed != nullptr && (DGAMMA || a.dx.data != nullptr) && !skip)
        kept = kept_by<HELD, VEC>(a.dropout, row, a.C, team.rank, team.size, chunk);
      if (a.dy.data != nullptr) load_xhat_dy<VEC>(a, rows, team.rank, team.size, chunk, xhat, dy);
    };
    if constexpr (CHUNKS > 0) load(0);
    const auto columns_of = [&](int chunk) {
      return team.template columns<VEC, RING ? CHUNKS : 0>(chunk, row.length);
    };
    const auto pass = [&](auto use) { each_chunk<CHUNKS>(chunks, columns_of, load, use); };

    float sums[2] = {0.0f, 0.0f};  // of weight * dy and weight * dy * xhat
    if (a.dy.data != nullptr) {
      pass([&](int i, const Columns<VEC>& columns) {
        float weight[8], products[8];
        parameter(0, columns, weight);
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
    const float mean_wdy = sums[0] * a.divisor.inverse, mean_wdy_xhat = sums[1] * a.divisor.inverse;

    pass([&](int i, const Columns<VEC>& columns) {
      float g[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) g[j] = 0.0f;
      if (a.dz.data != nullptr) to_floats(rows.template load<1>(i, columns), a.dz.dtype, g);
      if (a.dy.data != nullptr) {
        float weight[8];
        if constexpr (CHUNKS == 0) parameter(0, columns, weight);
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
      drop(a.dropout, kept >> (8 * i), g);
      if constexpr (DGAMMA) {
        float x[8];
        to_floats(rows.template load<3>(i, columns), a.x.dtype, x);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] *= g[j] * row.scale;
        dgamma.add(i, columns, x, sums_of(2), first_row);
      }
      if (a.dx.data != nullptr) {
        if (!a.scale_dy) {
          float gamma[8];
          parameter(1, columns, gamma);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float product = g[j] * (row.scale * gamma[j]);
            g[j] = skip ? 0.0f : product;
          }
        }
        store(element(a.dx.data, row.index * a.C, a.dx.dtype), a.dx.dtype, columns, g);
      }
    });
    rows.close();
  }
  rows.end();
  let_next_grid_begin();

  if (a.partial == nullptr || CHUNKS == 0) return;
  if constexpr (RING && !BLOCK) __syncthreads();  // where rows were, which warps may still read
  constexpr bool kWarpTeams = kLanes<WIDTHS, BLOCK, CHUNKS> == kWarp;
  if constexpr (DGAMMA)
    write_sums<BLOCK, kWarpTeams>(team, a.C, after_parameters, sums_of, dweight, dbias, dgamma);
  else
    write_sums<BLOCK, kWarpTeams>(team, a.C, after_parameters, sums_of, dweight, dbias);
}

}  // namespace
}  // namespace vitkernels
