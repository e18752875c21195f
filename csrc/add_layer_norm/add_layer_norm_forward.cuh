// The forward kernel of add_layer_norm and layer_norm_add. add_layer_norm_cuda.cu has the map.
#pragma once

#include "add_layer_norm/add_layer_norm_rows.cuh"

namespace vitkernels {
namespace {

// z of N chunks, from chunk `first`. `other` keeps the residual as it came, for layer_norm_add's
// last step; `parameter(which, columns, v)` is weight (0), bias (1) or gamma (2).
template <Form FORM, bool VEC, class Rows, class LoadParameter, int N>
VK_DEVICE void load_z(const ForwardArgs& a, const Rows& rows, const LoadParameter& parameter,
                      int rank, int size, int first, float (&z)[N][8], Raw8 (&other)[N]) {
  const Row& row = rows.row;
  const bool skip = FORM == Form::kAddNorm && row.scale == 0.0f;  // a dropped branch is not read
  unsigned kept = 0;
  if (a.dropout.seed != nullptr && !skip)
    kept = kept_by<N, VEC>(a.dropout, row, a.C, rank, size, first);
  [[maybe_unused]] Raw8 x[N];
  const auto load = [&](int i) {
    const Columns<VEC> columns(first + i, rank, size, row.length);
    x[i] = rows.template load<0>(i, columns);
    if (a.residual.data != nullptr) other[i] = rows.template load<1>(i, columns);
  };
  if constexpr (!Rows::kAtHand) {  // all loads under way before the first is waited for
#pragma unroll
    for (int i = 0; i < N; ++i) load(i);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (Rows::kAtHand) load(i);
    to_floats(x[i], a.x.dtype, z[i]);
    if (FORM == Form::kNormAdd || a.residual.data == nullptr) continue;
    float residual[8];
    to_floats(other[i], a.residual.dtype, residual);
    if (!skip) {
      const Columns<VEC> columns(first + i, rank, size, row.length);
      float gamma[8];
      parameter(2, columns, gamma);
      drop(a.dropout, kept >> (8 * i), z[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) residual[j] += row.scale * gamma[j] * z[i][j];
    }
    // As new_residual stores it: the backward reads the rounded sum, and mean must belong to it.
    to_floats(to_raw(residual, a.residual.dtype), a.residual.dtype, z[i]);
  }
}

template <Form FORM, Widths WIDTHS, bool VEC, bool BLOCK, int CHUNKS>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<WIDTHS, BLOCK, CHUNKS>)
    forward_kernel(const __grid_constant__ ForwardArgs arguments) {
  check_launch_bounds<kThreads>();
  constexpr bool RING = WIDTHS != Widths::kAny;
  ForwardArgs a = arguments;
  fix_types<WIDTHS>(a);
  if constexpr (FORM == Form::kNormAdd) a.dropout.seed = nullptr, a.z.data = nullptr;
  constexpr int HELD = CHUNKS == 0 ? 1 : CHUNKS;
  VK_SHARED(float, partial, [2 * 2 * kWarp]);
  VK_DYNAMIC_SHARED(float, dynamic);
  Team<BLOCK, kLanes<WIDTHS, BLOCK, CHUNKS>> team(a.lanes, partial);
  const int chunks = CHUNKS == 0 ? (a.C + 8 * team.size - 1) / (8 * team.size) : CHUNKS;

  const SharedParameters shared(dynamic, team.size * chunks * 8);
  if constexpr (RING) {
    shared.fill(0, a.weight, a.C, 1.0f);
    shared.fill(1, a.bias, a.C, 0.0f);
    if constexpr (FORM == Form::kAddNorm) shared.fill(2, a.gamma, a.C, 1.0f);
    __syncthreads();
  }
  const auto parameter = [&](int which, const Columns<VEC>& columns, float (&v)[8]) {
    if constexpr (RING)
      shared.load(which, columns, v);
    else
      load_parameter(which == 0   ? a.weight
                     : which == 1 ? a.bias
                                  : a.gamma,
                     columns, which == 1 ? 0.0f : 1.0f, v);
  };

  auto rows = [&] {
    using Reads = ForwardReads<FORM>;
    if constexpr (RING)
      return RingRows<Reads, WIDTHS, decltype(team), CHUNKS>(
          a, team, reinterpret_cast<char*>(dynamic + kForwardParameters * shared.padded()));
    else
      return DirectRows<Reads, decltype(team), VEC>(a, team, chunks);
  }();
  const Row& row = rows.row;
  using Index = RowIndex<WIDTHS>;
  for (Index first = static_cast<Index>(team.first); first < static_cast<Index>(a.rows);
       first += static_cast<Index>(team.step)) {
    rows.open(first);
    float z[HELD][8];
    Raw8 other[HELD];
    const auto load = [&](int chunk) {
      load_z<FORM, VEC>(a, rows, parameter, team.rank, team.size, chunk, z, other);
    };
    if constexpr (CHUNKS > 0) load(0);
    const auto columns_of = [&](int chunk) {
      return team.template columns<VEC, RING ? CHUNKS : 0>(chunk, row.length);
    };
    const auto pass = [&](auto use) { each_chunk<CHUNKS>(chunks, columns_of, load, use); };

    const Statistics of_row = statistics<VEC>(team, z, a.divisor, a.eps, pass);
    const float mean = of_row.mean, rstd = of_row.rstd;
    if (team.rank == 0 && row.length > 0) {
      a.mean[row.index] = mean;
      a.rstd[row.index] = rstd;
    }

    pass([&](int i, const Columns<VEC>& columns) {
      if (a.z.data != nullptr)
        store(element(a.z.data, row.index * a.C, a.z.dtype), a.z.dtype, columns, z[i]);
      float weight[8], bias[8], y[8];
      parameter(0, columns, weight);
      parameter(1, columns, bias);
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] = (z[i][j] - mean) * rstd * weight[j] + bias[j];
      if constexpr (FORM == Form::kNormAdd) {
        if constexpr (RING) other[i] = rows.template load<1>(i, columns);  // not held meanwhile
        float residual[8];
        to_floats(other[i], a.residual.dtype, residual);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          y[j] = row.scale == 0.0f ? residual[j] : residual[j] + row.scale * y[j];
      }
      store(element(a.y.data, row.index * a.C, a.y.dtype), a.y.dtype, columns, y);
    });
    rows.close();
  }
  rows.end();
}

}  // namespace
}  // namespace vitkernels
