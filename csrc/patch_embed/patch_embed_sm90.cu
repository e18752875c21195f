// Forward of patch_embed on Hopper's tensor cores (wgmma, TMA): bf16 and fp16 products from uint8
// or float images in any layout; D a multiple of 8, patches to 4096 elements.
//
//   tokens[m, d] = sum over channels of scale * (sum_k operand[m, k] W[d, k]) + b'[d] + pos[n, d]
//
// A block stays and goes through tiles of 128 patches x WIDTH columns, in stages of 64 of K:
//   warpgroups 0, 1   64 patches each: wgmma of 64 x WIDTH, the stage before released while the
//                     next is multiplied; behind each channel the fp32 sums are rescaled, so that
//                     no weight is rounded twice
//   warpgroup 2       gathers: a thread has one patch (neighbours read neighbouring pixels); asks
//                     for pixels of two stages later in L2, reads, centres, rounds and stores those
//                     of this one to swizzled shared memory (a warp's stores have no bank
//                     conflict); one thread loads the weight's box by TMA
// Blocks come in pairs (clusters), which have the same columns of neighbouring rows of tiles: each
// loads half of the weight's box for both, 24 KB of a stage from L2 instead of 40.
// Each channel is padded to whole stages (14 x 14: 3 * 256; without statistics 640), 4 x 4 to a
// fourfold. The sums leave through 2.25 KB a warp, 16 bytes a lane. Tiles of the same patches
// follow each other, so that their pixels stay in L2. The prefix tokens are written by the
// gathering warps, once they have no tile left.
//
// ViT-B/16, B 256, uint8: 59.2 GFLOP, 75 us at 790 TFLOP/s; least bytes 38.5 MB of pixels, 77 MB of
// tokens, 1.2 MB of weight, 27 us at 4.3 TB/s. A stage is 1024 cycles of products; its pixels are
// 8192 bytes from L2 and 3.5 instructions each, 230 cycles of the four schedulers; the weight is
// 16 KB from L2, and 16 from the other block. 1176 tiles on 132 multiprocessors: 8.9 of 9 rounds.
// Grid: a block for each multiprocessor, of 384 threads; 213 KB of shared memory at that shape. Not
// measured yet. Launch settings: patch_embed_plan.h.
#include "patch_embed/patch_embed_sm90.cuh"

namespace vitkernels::patch_embed {
namespace {

using namespace sm90;

// Tiles of a block: of each item, one.
struct Tiles {
  int across;
  int64_t items;  // of all blocks, or pairs

  VK_DEVICE int row(int64_t item, const Pair& pair) const {
    return (static_cast<int>(item / across) * pair.blocks + pair.rank) * kRows;
  }
  VK_DEVICE int column(int64_t item, int width) const {
    return static_cast<int>(item % across) * width;
  }
};

// What both roles know.
template <int WIDTH>
struct Shared {
  static constexpr int kWeightBytes = WIDTH * kDepth * 2;
  static constexpr int kStageBytes = kRowBytes + kWeightBytes;
  char* memory;
  VK_DEVICE char* pixels(int slot) const { return memory + slot * kStageBytes; }
  VK_DEVICE char* weight(int slot) const { return pixels(slot) + kRowBytes; }
  VK_DEVICE float* room(int warp) const {
    return reinterpret_cast<float*>(memory + kStages * kStageBytes + warp * kWayOutBytes);
  }
  VK_DEVICE int* places() const {
    return reinterpret_cast<int*>(memory + kStages * kStageBytes + kConsumerWarps * kWayOutBytes);
  }
};

// ---- The gathering warpgroup

template <DType TYPE, int WIDTH>
VK_DEVICE void gather(const Shared<WIDTH>& shared, Ring ring, const TensorMap& map, const Args& a,
                      const Padded& columns, Source source, const Tiles& tiles) {
  const int thread = static_cast<int>(threadIdx.x) - kConsumerWarps * kWarp;
  const int of_segment = columns.tiles(), total = columns.segments * of_segment;
  const int pixel_bytes = a.images.bytes ? 1 : static_cast<int>(size_of(a.images.dtype));
  for (int64_t item = blockIdx.x / ring.pair.blocks; item < tiles.items;
       item += gridDim.x / ring.pair.blocks) {
    const int row = tiles.row(item, ring.pair) + thread;
    const int64_t patch = patch_place(a, a.images, min(row, a.rows() - 1));
#pragma unroll 1
    for (int i = 0; i < total; ++i) {
      const int segment = i / of_segment, t = i - segment * of_segment;
      const int from = segment * columns.length + t * kDepth;
      const float centre = channel_centre(a, segment);
      const int* places = shared.places() + from;
      Unit units[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        units[j] = fetch<TYPE>(a.images, source, patch, places + 16 * j, centre);
      const int ahead = from + 2 * kDepth + thread % 4 * 16;  // a line of two stages later
      if (ahead < columns.columns() && shared.places()[ahead] >= 0)
        prefetch_l2(static_cast<const char*>(a.images.data) +
                    (patch + shared.places()[ahead]) * pixel_bytes);
      MBarrier* full = ring.full + ring.slot;
      ring.wait_empty();
      if (thread == 0) {
        mbarrier_arrive_expect(full, Shared<WIDTH>::kWeightBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (ring.pair.loads(half))
            tma_load_multicast(shared.weight(ring.slot) + half * Shared<WIDTH>::kWeightBytes / 2,
                               map, full, {from, tiles.column(item, WIDTH) + half * WIDTH / 2},
                               ring.pair.all());
      }
      char* pixels = shared.pixels(ring.slot);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        put_unit<TYPE>(chunk_of(pixels, kRows, thread, 2 * j),
                       chunk_of(pixels, kRows, thread, 2 * j + 1), units[j], a.images.bytes,
                       centre);
      fence_proxy_async();
      __syncwarp();
      if (thread % kWarp == 0) mbarrier_arrive(full);
      ring.advance();
    }
  }
}

// ---- The multiplying warpgroups

template <DType TYPE, int WIDTH>
VK_DEVICE void multiply(const Shared<WIDTH>& shared, Ring ring, const Args& a,
                        const Padded& columns, const float* bias, const Tiles& tiles) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const int group = warp / 4;
  const auto release = [&](int slot) { ring.pair.release(ring.empty + slot); };
  for (int64_t item = blockIdx.x / ring.pair.blocks; item < tiles.items;
       item += gridDim.x / ring.pair.blocks) {
    float sums[WIDTH / 2] = {};
    for (int segment = 0; segment < columns.segments; ++segment) {
      const auto begin = [&](int step) {
        const WgmmaOperand x =
            wgmma_operand<Swizzle::k128>(shared.pixels(ring.slot) + group * 64 * 128, 16, 8 * 128);
        const WgmmaOperand w = wgmma_operand<Swizzle::k128>(shared.weight(ring.slot), 16, 8 * 128);
        wgmma<TYPE>(sums, advanced(x, 32 * step), advanced(w, 32 * step), true);
      };
      int last = ring.slot;  // the stage whose products may be under way
      pin_registers(sums);
#pragma unroll 1
      for (int t = 0; t < columns.tiles(); ++t) {
        ring.wait_full();
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) begin(step);
        wgmma_commit();
        wgmma_wait<1>();
        if (t > 0) release(last);
        last = ring.slot;
        ring.advance();
      }
      wgmma_wait<0>(sums);
      release(last);
      // To the next channel's scale, and by the last one's to none.
      float by = channel_scale(a, segment);
      if (segment + 1 < columns.segments) by /= channel_scale(a, segment + 1);
#pragma unroll
      for (int i = 0; i < WIDTH / 2; ++i) sums[i] *= by;
      pin_registers(sums);
    }
    const int row0 = tiles.row(item, ring.pair) + warp * 16;
    const int column0 = tiles.column(item, WIDTH);
    const OutRows rows = out_rows(a, row0, lane);
#pragma unroll
    for (int j = 0; j < WIDTH / kWayOutColumns; ++j)
      write_tokens(a, bias, shared.room(warp), rows, column0 + j * kWayOutColumns, lane, 1.0f,
                   [&](int n, int i) { return sums[16 * j + 4 * n + i]; });
  }
}

template <DType TYPE, int WIDTH>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ TensorMap map, Args a, Padded columns, Source source,
                   const float* bias, Tiles tiles, int pair_blocks) {
  check_launch_bounds<kThreads>();
  VK_SWIZZLED_SHARED(char, memory);
  const Shared<WIDTH> shared = {memory};
  auto* barriers = reinterpret_cast<MBarrier*>(shared.places() + columns.columns());
  const Ring ring = {barriers, barriers + kStages, {pair_blocks, cluster_rank()}};
  write_places(a, columns, shared.places());
  // Full: the pixels, by a lane of each of four warps, and the weight's bytes.
  ring.begin(1 + kGatherers / kWarp);
  if (threadIdx.x < kConsumerWarps * kWarp) {
    take_registers<kConsumerRegisters>();
    multiply<TYPE, WIDTH>(shared, ring, a, columns, bias, tiles);
  } else {
    give_up_registers<kGathererRegisters>();
    gather<TYPE, WIDTH>(shared, ring, map, a, columns, source, tiles);
    write_prefix(a, static_cast<int64_t>(blockIdx.x) * kGatherers + threadIdx.x % kGatherers,
                 static_cast<int64_t>(gridDim.x) * kGatherers);
  }
  cluster_sync();  // the other block may still release stages here
}

template <DType TYPE, int WIDTH>
void launch(const Device& device, const Args& a, const Prepared& prepared, const Plan& p) {
  const Padded columns = padded(a, kDepth);
  const TensorLayout layout = {
      2, {columns.columns(), a.D}, {1, columns.columns()}, {kDepth, WIDTH / 2}};
  const TensorMap map = make_tensor_map(prepared.weight, TYPE, layout, Swizzle::k128);
  const Tiles tiles = {static_cast<int>(divide_up(a.D, WIDTH)), p.items};
  device.launch_cluster(forward_kernel<TYPE, WIDTH>, p.pair, dim3(static_cast<unsigned>(p.blocks)),
                        dim3(kThreads), static_cast<size_t>(p.shared_bytes), map, a, columns,
                        source_of(a), prepared.bias, tiles, p.pair);
}

template <DType TYPE>
void launch_width(const Device& device, const Args& a, const Prepared& prepared) {
  const Plan p = plan(a.rows(), a.D, padded(a, kDepth).columns(), device.multiprocessors());
  if (p.width == 256)
    launch<TYPE, 256>(device, a, prepared, p);
  else if (p.width == 192)
    launch<TYPE, 192>(device, a, prepared, p);
  else
    launch<TYPE, 128>(device, a, prepared, p);
}

}  // namespace

Refusal sm90_refuses_forward(const Args& a) { return refuses_operands(a, padded(a, kDepth)); }

void forward_sm90(const Device& device, const Tensor& like, const Args& a) {
  const Prepared prepared = prepare(device, like, a, padded(a, kDepth));
  if (a.dtype == DType::kBF16)
    launch_width<DType::kBF16>(device, a, prepared);
  else
    launch_width<DType::kF16>(device, a, prepared);
}

}  // namespace vitkernels::patch_embed
