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
      float factor[8], gamma[8];
      branch_factors(a.dropout, row, a.C, columns, factor);
      parameter(2, columns, gamma);
#pragma unroll
      for (int j = 0; j < 8; ++j) residual[j] += factor[j] * gamma[j] * z[i][j];
    }
    // As new_residual stores it: the backward reads the rounded sum, and mean must belong to it.
    to_floats(to_raw(residual, a.residual.dtype), a.residual.dtype, z[i]);
  }
}

template <Form FORM, Types TYPES, bool VEC, bool BLOCK, int CHUNKS>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<TYPES, BLOCK, CHUNKS>)
    forward_kernel(const __grid_constant__ ForwardArgs arguments) {
  check_launch_bounds<kThreads>();
  constexpr bool RING = TYPES != Types::kAny;
  ForwardArgs a = arguments;
  if constexpr (RING) set_types<FORM>(a, branch_type(TYPES), stream_type(TYPES));
  if constexpr (RING || FORM == Form::kNormAdd) a.dropout.seed = nullptr;
  if constexpr (FORM == Form::kNormAdd) a.z.data = nullptr;
  constexpr int HELD = CHUNKS == 0 ? 1 : CHUNKS;
  VK_SHARED(float, partial, [2 * 2 * kWarp]);
  VK_DYNAMIC_SHARED(float, dynamic);
  Team<BLOCK, kLanes<TYPES, BLOCK, CHUNKS>> team(a.lanes, partial);
  const int chunks = CHUNKS == 0 ? (a.C + 8 * team.size - 1) / (8 * team.size) : CHUNKS;
  const float C = static_cast<float>(a.C);

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
      return RingRows<Reads, TYPES, decltype(team), CHUNKS>(
          a, team, reinterpret_cast<char*>(dynamic + kForwardParameters * shared.padded()));
    else
      return DirectRows<Reads, decltype(team), VEC>(a, team, chunks);
  }();
  const Row& row = rows.row;
  for (int64_t first = team.first; first < a.rows; first += team.step) {
    rows.open(first);
    float z[HELD][8];
    Raw8 other[HELD];
    if constexpr (CHUNKS > 0)
      load_z<FORM, VEC>(a, rows, parameter, team.rank, team.size, 0, z, other);
    // Calls use(i, columns) for each chunk, whose z is z[i].
    const auto pass = [&](auto use) {
      if constexpr (CHUNKS > 0) {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i)
          use(i, team.template columns<VEC, RING ? CHUNKS : 0>(i, row.length));
      } else {
        for (int i = 0; i < chunks; ++i) {
          load_z<FORM, VEC>(a, rows, parameter, team.rank, team.size, i, z, other);
          use(0, Columns<VEC>(i, team.rank, team.size, row.length));
        }
      }
    };

    const Statistics of_row = statistics<VEC>(team, z, C, a.eps, pass);
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
