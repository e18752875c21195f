// Backward products of patch_embed on sm_80 tensor cores:
//
//   dweight  part[d, k] = sum_m g[m, d] operand[m, k]     splits of the rows m, added in order
//   dimages  dx[m, k]   = scale * sum_d g[m, d] W[d, k]   each pixel belongs to one patch
//
// with g the patches' dtokens (bf16 or fp16), the operands of the forward, and W as it was rounded
// there. A block of eight warps has 128 x 128 of the result, 64 rows or features at a time and two
// stages: g and W come by cp.async, pixels through registers. Of dweight both operands have their
// sum's index outermost: ldmatrix transposes them. The scale of each channel, and what centring
// left out, rest * dbias, are added to dweight's fp32 sums by finish_dweight.
//
// ViT-B/16, B 256: 59.2 GFLOP each. dweight: 36 tiles in 3 splits (108 multiprocessors), 7.1 MB of
// fp32 parts; least bytes 116 MB, 58 us at 2 TB/s, 27 us at 4.3 TB/s.
// Grid: tiles (and splits) of 256 threads, one to a multiprocessor; 64 KB of shared memory and, for
// dweight, 512 bytes. Not measured yet. Launch settings: patch_embed_plan.h.
#include "patch_embed/patch_embed_sm80.cuh"

namespace vitkernels::patch_embed {
namespace {

using namespace sm80;

template <DType TYPE>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dweight_kernel(Args a, Padded columns, Source source, float* partial, int steps_per_split) {
  check_launch_bounds<kThreads>();
  VK_SWIZZLED_SHARED(char, stages);
  auto* places = reinterpret_cast<int*>(stages + 4 * kTileBytes);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int across = (columns.columns() + kTile - 1) / kTile;
  const int tiles = (a.D + kTile - 1) / kTile * across;
  const int split = static_cast<int>(blockIdx.x) / tiles,
            tile = static_cast<int>(blockIdx.x) % tiles;
  const int d0 = tile / across * kTile, k0 = tile % across * kTile;
  const int rows = a.rows(), first = split * steps_per_split * kDepth;
  const int steps = (min(rows, first + steps_per_split * kDepth) - first + kDepth - 1) / kDepth;
  const int line = thread % kDepth, first_unit = thread / kDepth;  // and four units further

  if (thread < kTile) {
    const int i = k0 + thread, segment = i / columns.length, at = i - segment * columns.length;
    const bool inside = i < columns.columns() && at < columns.used;
    places[thread] =
        inside ? static_cast<int>(pixel_place(a, a.images, segment * columns.used + at)) : -1;
  }
  float centres[2];
#pragma unroll
  for (int j = 0; j < 2; ++j)
    centres[j] = channel_centre(a, min((k0 + 16 * (first_unit + 4 * j)) / columns.length, a.C - 1));
  __syncthreads();

  Unit units[2] = {};
  const auto begin = [&](int i) {
    const int row = first + i * kDepth;
    begin_copy<Major::kMN>(operand_a(stages, i), a.dtokens, row, rows, d0, a.D,
                           [&](int m) { return gradient_place(a, m); });
    commit_copies();
    const bool inside = row + line < rows;
    const int64_t patch = inside ? patch_place(a, a.images, row + line) : 0;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      units[j] = inside ? fetch<TYPE>(a.images, source, patch, places + 16 * (first_unit + 4 * j),
                                      centres[j])
                        : Unit{};
  };
  const auto put = [&](int i) {
    char* to = operand_b(stages, i);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int chunk = 2 * (first_unit + 4 * j);
      put_unit<TYPE>(chunk_at<Major::kMN>(to, line, chunk),
                     chunk_at<Major::kMN>(to, line, chunk + 1), units[j], a.images.bytes,
                     centres[j]);
    }
  };

  Sums sums = {};
  begin(0);
  put(0);
  for (int i = 0; i < steps; ++i) {
    wait_copies<0>();
    __syncthreads();  // this stage is there, and nobody reads the other
    if (i + 1 < steps) begin(i + 1);
    multiply<TYPE, Major::kMN, Major::kMN>(sums, operand_a(stages, i), operand_b(stages, i), warp,
                                           lane, kDepth / 16);
    if (i + 1 < steps) put(i + 1);
  }
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = d0 + warp_row(warp) + 16 * m + fragment_c_row(lane, 2 * half);
        const int k = k0 + warp_column(warp) + 8 * n + fragment_c_column(lane, 0);
        if (d >= a.D || k >= columns.columns()) continue;
        float* to = partial + (static_cast<int64_t>(split) * a.D + d) * columns.columns() + k;
        *reinterpret_cast<float2*>(to) =
            make_float2(sums.c[m][n].v[2 * half], sums.c[m][n].v[2 * half + 1]);
      }
}

template <DType TYPE>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dimages_kernel(Args a, Padded columns, const void* weight) {
  check_launch_bounds<kThreads>();
  VK_SWIZZLED_SHARED(char, stages);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int across = (columns.columns() + kTile - 1) / kTile;
  const int row0 = static_cast<int>(blockIdx.x) / across * kTile;
  const int k0 = static_cast<int>(blockIdx.x) % across * kTile;
  const int steps = (a.D + kDepth - 1) / kDepth;
  const auto begin = [&](int i) {
    begin_copy<Major::kK>(operand_a(stages, i), a.dtokens, row0, a.rows(), i * kDepth, a.D,
                          [&](int m) { return gradient_place(a, m); });
    begin_copy<Major::kMN>(operand_b(stages, i), weight, i * kDepth, a.D, k0, columns.columns(),
                           [&](int d) { return static_cast<int64_t>(d) * columns.columns(); });
    commit_copies();
  };
  Sums sums = {};
  begin(0);
  for (int i = 0; i < steps; ++i) {
    wait_copies<0>();
    __syncthreads();  // this stage is there, and nobody reads the other
    if (i + 1 < steps) begin(i + 1);
    multiply<TYPE, Major::kK, Major::kMN>(sums, operand_a(stages, i), operand_b(stages, i), warp,
                                          lane, kDepth / 16);
  }
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = k0 + warp_column(warp) + 8 * n + fragment_c_column(lane, i);
      const int segment = k / columns.length, at = k - segment * columns.length;
      if (k >= columns.columns() || at >= columns.used) continue;
      const int pixel = segment * columns.used + at;
      const int64_t place = pixel_place(a, a.dimages, pixel);
      const float scale = channel_scale(a, pixel / a.pixels());
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + warp_row(warp) + 16 * m + fragment_c_row(lane, 2 * half);
          if (row < a.rows())
            store_scalar(a.dimages.data, a.dimages.dtype, patch_place(a, a.dimages, row) + place,
                         sums.c[m][n].v[2 * half + i] * scale);
        }
    }
}

template <DType TYPE>
void launch(const Device& device, const Tensor& like, const Args& a, const float* dbias) {
  if (a.dimages.data != nullptr) {
    const Padded columns = padded(a, 16);
    const Prepared prepared = prepare(device, like, a, columns);
    const int64_t tiles = divide_up(a.rows(), kTile) * divide_up(columns.columns(), kTile);
    device.launch(dimages_kernel<TYPE>, dim3(static_cast<unsigned>(tiles)), dim3(kThreads),
                  static_cast<size_t>(shared_bytes(0)), a, columns, prepared.weight);
  }
  if (a.dweight.data == nullptr) return;
  const Padded columns = padded(a.C, a.pixels(), true, 16);
  const int64_t tiles = divide_up(a.D, kTile) * divide_up(columns.columns(), kTile);
  const Split s = split(tiles, divide_up(a.rows(), kDepth), device.multiprocessors() * kBlocks);
  Tensor partial = empty_like_shape(
      like, {static_cast<int64_t>(s.splits) * a.D * columns.columns()}, ScalarType::Float);
  auto* parts = static_cast<float*>(partial.mutable_data_ptr());
  device.launch(dweight_kernel<TYPE>, dim3(static_cast<unsigned>(tiles * s.splits)), dim3(kThreads),
                static_cast<size_t>(shared_bytes(kTile)), a, columns, source_of(a), parts, s.steps);
  finish_dweight(device, a, parts, s.splits, dbias);
}

}  // namespace

Refusal sm80_refuses_backward(const Args& a) {
  const Refusal why = refuses_operands(a, padded(a.C, a.pixels(), true, 16));
  if (!why.empty()) return why;
  if (!on_line(a.dtokens) || a.dtokens_batch % 8 != 0 || a.dtokens_row % 8 != 0)
    return "rows of dtokens must lie on 16-byte lines";
  return "";
}

void products_sm80(const Device& device, const Tensor& like, const Args& a, const float* dbias) {
  if (a.dtype == DType::kBF16)
    launch<DType::kBF16>(device, like, a, dbias);
  else
    launch<DType::kF16>(device, like, a, dbias);
}

}  // namespace vitkernels::patch_embed
