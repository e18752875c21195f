// Forward of patch_embed on sm_80 tensor cores (mma.sync, ldmatrix, cp.async): bf16 and fp16
// products from uint8 or float images in any layout; D a multiple of 8, patches to 4096 elements.
//
//   tokens[m, d] = sum over channels of scale * (sum_k operand[m, k] W[d, k]) + b'[d] + pos[n, d]
//
// A block of eight warps has 128 patches x 128 columns, 64 of K at a time and two stages. Pixels
// come to registers while the stage before is multiplied, are centred and rounded there, and go to
// swizzled shared memory; the weight comes by cp.async. The fp32 sums are rescaled between
// channels, so that no weight is rounded twice. K is padded within the weight (14 x 14: 3 * 208,
// without statistics 592). The sums leave through shared memory, 16 bytes a lane.
// Blocks behind the tiles write the prefix tokens.
//
// ViT-B/16, B 256, uint8: 59.2 GFLOP, 190 us at 312 TFLOP/s (A100); least bytes 38.5 MB of pixels,
// 77 MB of tokens, 1.2 MB of weight, 58 us at 2 TB/s. Each pixel is read D / 128 times, from L2.
// Grid: tiles and up to 1024 blocks more, of 256 threads, one to a multiprocessor; 64 KB of shared
// memory and 4 bytes for each column. Not measured yet. Launch settings: patch_embed_plan.h.
#include "patch_embed/patch_embed_sm80.cuh"

namespace vitkernels::patch_embed {
namespace {

using namespace sm80;

template <DType TYPE>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(Args a, Padded columns, Source source, const void* weight, const float* bias,
                   int64_t tiles) {
  check_launch_bounds<kThreads>();
  VK_SWIZZLED_SHARED(char, stages);
  auto* places = reinterpret_cast<int*>(stages + 4 * kTileBytes);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  if (blockIdx.x >= tiles) {
    write_prefix(a, (blockIdx.x - tiles) * kThreads + thread, (gridDim.x - tiles) * kThreads);
    return;
  }
  const int across = (a.D + kTile - 1) / kTile;  // neighbouring blocks share their pixels
  const int row0 = static_cast<int>(blockIdx.x) / across * kTile;
  const int column0 = static_cast<int>(blockIdx.x) % across * kTile;
  const int line = thread % kTile, first_unit = thread / kTile * 2;
  const int64_t patch = patch_place(a, a.images, min(row0 + line, a.rows() - 1));
  const int total = columns.segments * columns.tiles();
  write_places(a, columns, places);
  __syncthreads();

  Unit units[2] = {};
  const auto steps_of = [&](int i) { return min(4, columns.steps() - i % columns.tiles() * 4); };
  const auto begin = [&](int i) {  // the weight on its way, the pixels in registers
    const int segment = i / columns.tiles();
    const int from = segment * columns.length + i % columns.tiles() * kDepth;
    begin_copy<Major::kK>(operand_b(stages, i), weight, column0, a.D, from, columns.columns(),
                          [&](int d) { return static_cast<int64_t>(d) * columns.columns(); });
    commit_copies();
    const float centre = channel_centre(a, segment);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (first_unit + j < steps_of(i))
        units[j] =
            fetch<TYPE>(a.images, source, patch, places + from + 16 * (first_unit + j), centre);
  };
  const auto put = [&](int i) {
    const float centre = channel_centre(a, i / columns.tiles());
    char* tile = operand_a(stages, i);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (first_unit + j < steps_of(i))
        put_unit<TYPE>(chunk_at<Major::kK>(tile, line, 2 * (first_unit + j)),
                       chunk_at<Major::kK>(tile, line, 2 * (first_unit + j) + 1), units[j],
                       a.images.bytes, centre);
  };

  Sums sums = {};
  float scale = channel_scale(a, 0);
  begin(0);
  put(0);
  for (int i = 0; i < total; ++i) {
    wait_copies<0>();
    __syncthreads();  // this stage is there, and nobody reads the other
    if (i + 1 < total) begin(i + 1);
    if (i > 0 && i % columns.tiles() == 0) {
      const float before = scale;
      scale = channel_scale(a, i / columns.tiles());
      const float by = before / scale;
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int v = 0; v < 4; ++v) sums.c[m][n].v[v] *= by;
    }
    multiply<TYPE, Major::kK, Major::kK>(sums, operand_a(stages, i), operand_b(stages, i), warp,
                                         lane, steps_of(i));
    if (i + 1 < total) put(i + 1);
  }
  __syncthreads();  // the stages become the way out
  auto* room = reinterpret_cast<float*>(stages + warp * sm90::kWayOutBytes);
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const OutRows rows = out_rows(a, row0 + warp_row(warp) + 16 * m, lane);
    write_tokens(a, bias, room, rows, column0 + warp_column(warp), lane, scale,
                 [&](int j, int i) { return sums.c[m][j].v[i]; });
  }
}

template <DType TYPE>
void launch(const Device& device, const Args& a, const Prepared& prepared) {
  const Padded columns = padded(a, 16);
  const int64_t tiles = divide_up(a.rows(), kTile) * divide_up(a.D, kTile);
  const int64_t prefix = divide_up(static_cast<int64_t>(a.B) * a.P * a.D, 16 * kThreads);
  device.launch(forward_kernel<TYPE>,
                dim3(static_cast<unsigned>(tiles + std::min<int64_t>(prefix, 1024))),
                dim3(kThreads), static_cast<size_t>(shared_bytes(columns.columns())), a, columns,
                source_of(a), prepared.weight, prepared.bias, tiles);
}

}  // namespace

Refusal sm80_refuses_forward(const Args& a) { return refuses_operands(a, padded(a, 16)); }

void forward_sm80(const Device& device, const Tensor& like, const Args& a) {
  const Prepared prepared = prepare(device, like, a, padded(a, 16));
  if (a.dtype == DType::kBF16)
    launch<DType::kBF16>(device, a, prepared);
  else
    launch<DType::kF16>(device, a, prepared);
}

}  // namespace vitkernels::patch_embed
