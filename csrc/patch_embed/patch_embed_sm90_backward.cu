// Backward products of patch_embed on Hopper's tensor cores (wgmma, TMA): bf16 and fp16.
//
//   dweight  part[d, k] = sum_m g[m, d] operand[m, k]     splits of the rows m, added in order
//   dimages  dx[m, k]   = scale * sum_d g[m, d] W[d, k]   each pixel belongs to one patch
//
// with g the patches' dtokens, the operands of the forward, and W as it was rounded there. Rows m
// go by groups of 64: some neighbours of each of some images (patch_embed_plan.h), so that TMA
// brings g past the prefix tokens and never across the end of an image; N = 196: 4 patches of 16
// images.
//
// Both multiply 128 or 256 x 128 of the result in stages of 64 of the sum's index:
//   warpgroups 0, 1   half of the lines each, wgmma of 64 x 128, the stage before released while
//                     the next is multiplied
//   warpgroup 2       fills the stages. dweight: a thread has half of the columns of one row; it
//                     reads, centres, rounds and stores pixels, and asks for those of two stages
//                     later in L2; one thread loads g. dimages: one thread loads g and W.
// Where a patch has an even number of tiles, blocks come in pairs (clusters) of two neighbouring
// ones: each loads half of g for both, 24 KB of a stage from L2 instead of 40 (dimages: 32 of 48).
// Operands whose sum's index is outermost (both of dweight, W) are read transposed by wgmma. The
// scale of each channel, and what centring left out, rest * dbias, are added to dweight's fp32 sums
// by finish_dweight. A block of dimages stays and goes through tiles, those of the same rows one
// after another; its sums leave through 2.25 KB a warp, 16 or 32 bytes a lane where a patch's lines
// are multiples of 8 pixels.
//
// ViT-B/16, B 256: 59.2 GFLOP each, 75 us at 790 TFLOP/s. dweight: a stage is 1024 cycles of
// products; g is 32 KB of it, pixels 8 KB (uint8) and 3.5 instructions each, 230 cycles of the four
// schedulers. 18 tiles in 7 splits, 126 of 132 multiprocessors busy; 17 MB of fp32 parts stay in
// L2. Least bytes 116 MB, 27 us at 4.3 TB/s. dimages: 1176 tiles, 8.9 of 9 rounds; what a warp
// writes is not overlapped with its products, about a tenth of a tile. Grid: tiles and splits, or a
// block for each multiprocessor, of 384 threads; 193 and 211 KB of shared memory. Not measured yet.
// Launch settings: patch_embed_plan.h.
#include "patch_embed/patch_embed_sm90.cuh"

namespace vitkernels::patch_embed {
namespace {

using namespace sm90;

// ---- Stages: `PANELS` boxes of 64 x 64 of A, two of B

template <int PANELS>
struct Stages {
  static constexpr int kGradientBytes = PANELS * kPanelBytes, kOtherBytes = 2 * kPanelBytes;
  char* memory;
  VK_DEVICE char* gradient(int slot) const {
    return memory + slot * (kGradientBytes + kOtherBytes);
  }
  VK_DEVICE char* other(int slot) const { return gradient(slot) + kGradientBytes; }
  VK_DEVICE char* end() const { return gradient(kStages); }
};

// The first patch and image of a group, and of a line of it.
struct Place {
  int image, patch;
};
VK_DEVICE Place first_of(const Groups& groups, int group) {
  const int image = group / groups.across;
  return {image * groups.images, (group - image * groups.across) * groups.patches};
}
VK_DEVICE Place line_of(const Groups& groups, const Place& first, int line) {
  const int image = line / groups.patches;
  return {first.image + image, first.patch + line - image * groups.patches};
}
VK_DEVICE bool exists(const Args& a, const Place& p) { return p.image < a.B && p.patch < a.N; }

// 64 lines of A from a panel on, 16 of the sum's index from 16 * step on.
template <Major MAJOR>
VK_DEVICE WgmmaOperand operand(const char* panel, int step) {
  if constexpr (MAJOR == Major::kK)
    return advanced(wgmma_operand<Swizzle::k128>(panel, 16, 8 * 128), 32 * step);
  else
    return wgmma_operand<Swizzle::k128>(panel + step * 16 * 128, kPanelBytes, 8 * 128);
}

// sums = A B of so many stages: HALVES times 64 lines of each warpgroup.
template <DType TYPE, Major A_MAJOR, int HALVES>
VK_DEVICE void multiply(float (&sums)[HALVES][kTileColumns / 2], const Stages<2 * HALVES>& stages,
                        Ring& ring, int count) {
  const int group = static_cast<int>(threadIdx.x) / 128;
  int last = 0;  // the stage whose products may be under way
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    ring.wait_full();
#pragma unroll
    for (int half = 0; half < HALVES; ++half) pin_registers(sums[half]);
    wgmma_fence();
    const char* const a = stages.gradient(ring.slot) + group * HALVES * kPanelBytes;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      const WgmmaOperand b = operand<Major::kMN>(stages.other(ring.slot), step);
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
        wgmma<TYPE, A_MAJOR, Major::kMN>(sums[half], operand<A_MAJOR>(a + half * kPanelBytes, step),
                                         b, i > 0 || step > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0) ring.pair.release(ring.empty + last);
    last = ring.slot;
    ring.advance();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int half = 0; half < HALVES; ++half) pin_registers(sums[half]);
  ring.pair.release(ring.empty + last);
}

// ---- dweight

// The 128 columns of a tile, 16 at a time: a thread has every second unit of one line.
template <DType TYPE, int HALVES>
VK_DEVICE void gather(const Stages<2 * HALVES>& stages, Ring ring, const TensorMap& map,
                      const Args& a, const Padded& columns, Source source, const Groups& groups,
                      const int* places, int d0, int k0, int first, int count) {
  constexpr int kUnits = 4;
  const int thread = static_cast<int>(threadIdx.x) - kConsumers;
  const int line = thread % kGroup, first_unit = thread / kGroup;
  const int pixel_bytes = a.images.bytes ? 1 : static_cast<int>(size_of(a.images.dtype));
  float centres[kUnits];
#pragma unroll
  for (int j = 0; j < kUnits; ++j)
    centres[j] = channel_centre(a, min((k0 + 16 * (first_unit + 2 * j)) / columns.length, a.C - 1));
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const Place begin = first_of(groups, first + i), mine = line_of(groups, begin, line);
    const bool there = exists(a, mine);
    const int64_t patch = there ? patch_place(a, a.images, mine.image, mine.patch) : 0;
    Unit units[kUnits];
#pragma unroll
    for (int j = 0; j < kUnits; ++j)
      units[j] = there ? fetch<TYPE>(a.images, source, patch, places + 16 * (first_unit + 2 * j),
                                     centres[j])
                       : Unit{};
    const Place later = line_of(groups, first_of(groups, first + i + 2), line);
    if (i + 2 < count && exists(a, later)) {
      const int64_t ahead = patch_place(a, a.images, later.image, later.patch);
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        const int place = places[16 * (first_unit + 2 * j)];
        if (place >= 0)
          prefetch_l2(static_cast<const char*>(a.images.data) + (ahead + place) * pixel_bytes);
      }
    }
    MBarrier* const full = ring.full + ring.slot;
    ring.wait_empty();
    if (thread == 0) {
      mbarrier_arrive_expect(full, stages.kGradientBytes);
#pragma unroll
      for (int panel = 0; panel < 2 * HALVES; ++panel)
        if (ring.pair.loads(panel / HALVES))
          tma_load_multicast(stages.gradient(ring.slot) + panel * kPanelBytes, map, full,
                             {d0 + 64 * panel, begin.patch, begin.image}, ring.pair.all());
    }
    char* const pixels = stages.other(ring.slot);
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      const int chunk = 2 * (first_unit + 2 * j);
      put_unit<TYPE>(chunk_of(pixels, kGroup, line, chunk),
                     chunk_of(pixels, kGroup, line, chunk + 1), units[j], a.images.bytes,
                     centres[j]);
    }
    fence_proxy_async();
    __syncwarp();
    if (thread % kWarp == 0) mbarrier_arrive(full);
    ring.advance();
  }
}

template <DType TYPE, int HALVES>
__global__ void __launch_bounds__(kThreads, 1)
    dweight_kernel(const __grid_constant__ TensorMap map, Args a, Padded columns, Source source,
                   Groups groups, float* partial, int groups_per_split, int pair_blocks) {
  check_launch_bounds<kThreads>();
  VK_SWIZZLED_SHARED(char, memory);
  const Stages<2 * HALVES> stages = {memory};
  auto* const places = reinterpret_cast<int*>(stages.end());
  auto* const barriers = reinterpret_cast<MBarrier*>(places + kTileColumns);
  Ring ring = {barriers, barriers + kStages, {pair_blocks, cluster_rank()}};
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int across = (columns.columns() + kTileColumns - 1) / kTileColumns;
  const int tiles = (a.D + 128 * HALVES - 1) / (128 * HALVES) * across;
  const int split = static_cast<int>(blockIdx.x) / tiles,
            tile = static_cast<int>(blockIdx.x) % tiles;
  const int d0 = tile / across * 128 * HALVES, k0 = tile % across * kTileColumns;
  const int first = split * groups_per_split, count = min(groups.count - first, groups_per_split);
  if (thread < kTileColumns) {
    const int i = k0 + thread, segment = i / columns.length, at = i - segment * columns.length;
    const bool inside = i < columns.columns() && at < columns.used;
    places[thread] =
        inside ? static_cast<int>(pixel_place(a, a.images, segment * columns.used + at)) : -1;
  }
  // Full: the pixels, by a lane of each of four warps, and the gradients' bytes.
  ring.begin(1 + kGatherers / kWarp);
  if (thread >= kConsumers) {
    give_up_registers<kGathererRegisters>();
    gather<TYPE, HALVES>(stages, ring, map, a, columns, source, groups, places, d0, k0, first,
                         count);
    return;
  }
  take_registers<kConsumerRegisters>();
  float sums[HALVES][kTileColumns / 2];
  multiply<TYPE, Major::kMN>(sums, stages, ring, count);
#pragma unroll
  for (int half = 0; half < HALVES; ++half)
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int d =
          d0 + (warp / 4 * HALVES + half) * 64 + warp % 4 * 16 + fragment_c_row(lane, 2 * upper);
      if (d >= a.D) continue;
      float* const row = partial + (static_cast<int64_t>(split) * a.D + d) * columns.columns();
#pragma unroll
      for (int n = 0; n < kTileColumns / 8; ++n) {
        const int k = k0 + 8 * n + fragment_c_column(lane, 0);
        if (k < columns.columns())
          *reinterpret_cast<float2*>(row + k) =
              make_float2(sums[half][4 * n + 2 * upper], sums[half][4 * n + 2 * upper + 1]);
      }
    }
  cluster_sync();  // the other block may still release stages here
}

// ---- dimages

// 16 rows x 32 columns of a warp from `column` on, by way of its room. vectorized: eight columns
// from a multiple of eight on are neighbours of one line of a patch.
template <class Fragment>
VK_DEVICE void write_pixels(const Args& a, const Padded& columns, float* room,
                            const int64_t (&patches)[2], int column, int lane, bool vectorized,
                            Fragment fragment) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      room[fragment_c_row(lane, i) * kWayOutStride + 8 * j + fragment_c_column(lane, i)] =
          fragment(j, i);
  __syncwarp();
  const int mine = column + lane % 4 * 8;
  const int segment = mine / columns.length, at = mine - segment * columns.length;
  const int pixel = segment * columns.used + at;  // and seven more, where they are used
  const int used = segment < columns.segments ? columns.used - at : 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (patches[half] < 0 || used <= 0) continue;
    const float* from = room + (lane / 4 + 8 * half) * kWayOutStride + lane % 4 * 8;
    if (vectorized) {
      const float scale = channel_scale(a, pixel / a.pixels());
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = from[i] * scale;
      store<true>(element(a.dimages.data, patches[half] + pixel_place(a, a.dimages, pixel),
                          a.dimages.dtype),
                  a.dimages.dtype, Columns<true>(0, 0, 1, 8), v);
    } else {
#pragma unroll 1
      for (int i = 0; i < 8; ++i)
        if (i < used)
          store_scalar(a.dimages.data, a.dimages.dtype,
                       patches[half] + pixel_place(a, a.dimages, pixel + i),
                       from[i] * channel_scale(a, (pixel + i) / a.pixels()));
    }
  }
  __syncwarp();  // the room may be written again
}

template <DType TYPE>
__global__ void __launch_bounds__(kThreads, 1)
    dimages_kernel(const __grid_constant__ TensorMap gradient_map,
                   const __grid_constant__ TensorMap weight_map, Args a, Padded columns,
                   Groups groups, int tiles, bool vectorized, int pair_blocks) {
  check_launch_bounds<kThreads>();
  constexpr int kHalves = 2, kPanels = 2 * kHalves;
  VK_SWIZZLED_SHARED(char, memory);
  const Stages<kPanels> stages = {memory};
  auto* const barriers = reinterpret_cast<MBarrier*>(stages.end() + kConsumerWarps * kWayOutBytes);
  Ring ring = {barriers, barriers + kStages, {pair_blocks, cluster_rank()}};
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int across = (columns.columns() + kTileColumns - 1) / kTileColumns;
  const int steps = (a.D + kDepth - 1) / kDepth;
  ring.begin(1);
  if (thread >= kConsumers) {
    give_up_registers<kGathererRegisters>();
    if (thread != kConsumers) return;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
         tile += static_cast<int>(gridDim.x)) {
      const int group = tile / across * kPanels, k0 = tile % across * kTileColumns;
      for (int i = 0; i < steps; ++i) {
        MBarrier* const full = ring.full + ring.slot;
        ring.wait_empty();
        mbarrier_arrive_expect(full, stages.kGradientBytes + stages.kOtherBytes);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          if (!ring.pair.loads(panel / kHalves)) continue;
          const Place begin = first_of(groups, group + panel);  // none: beyond the images, zeros
          tma_load_multicast(stages.gradient(ring.slot) + panel * kPanelBytes, gradient_map, full,
                             {i * kDepth, begin.patch, begin.image}, ring.pair.all());
        }
#pragma unroll
        for (int panel = 0; panel < 2; ++panel)
          tma_load(stages.other(ring.slot) + panel * kPanelBytes, weight_map, full,
                   {k0 + 64 * panel, i * kDepth});
        ring.advance();
      }
    }
    return;
  }
  take_registers<kConsumerRegisters>();
  float* const room = reinterpret_cast<float*>(stages.end() + warp * kWayOutBytes);
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    float sums[kHalves][kTileColumns / 2];
    multiply<TYPE, Major::kK>(sums, stages, ring, steps);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const Place begin = first_of(groups, tile / across * kPanels + warp / 4 * kHalves + half);
      int64_t patches[2];
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const Place p = line_of(groups, begin, warp % 4 * 16 + lane / 4 + 8 * upper);
        patches[upper] = exists(a, p) ? patch_place(a, a.dimages, p.image, p.patch) : -1;
      }
#pragma unroll
      for (int j = 0; j < kTileColumns / kWayOutColumns; ++j)
        write_pixels(a, columns, room, patches, tile % across * kTileColumns + j * kWayOutColumns,
                     lane, vectorized,
                     [&](int n, int i) { return sums[half][16 * j + 4 * n + i]; });
    }
  }
  cluster_sync();  // the other block may still release stages here
}

// ---- Host

// Strides between rows that exist; any multiple of a line serves where there is one row.
TensorMap map_of_gradients(const Args& a, const Groups& groups) {
  const auto* first = static_cast<const char*>(a.dtokens) + 2 * a.P * a.dtokens_row;
  const int64_t row = a.N > 1 ? a.dtokens_row : a.D, batch = a.B > 1 ? a.dtokens_batch : a.D;
  return make_tensor_map(
      first, a.dtype,
      {3, {a.D, a.N, a.B}, {1, row, batch}, {kDepth, groups.patches, groups.images}},
      Swizzle::k128);
}

template <DType TYPE>
void launch_dimages(const Device& device, const Tensor& like, const Args& a, const Groups& groups) {
  const Padded columns = padded(a, 16);
  const DImagesPlan p = dimages_plan(groups, columns.columns(), device.multiprocessors());
  const Prepared prepared = prepare(device, like, a, columns);
  const TensorMap weight = make_tensor_map(
      prepared.weight, TYPE, {2, {columns.columns(), a.D}, {1, columns.columns()}, {64, kDepth}},
      Swizzle::k128);
  const bool vectorized = a.patch_w % 8 == 0 && on_line(a.dimages.data);
  device.launch_cluster(dimages_kernel<TYPE>, p.pair, dim3(static_cast<unsigned>(p.blocks)),
                        dim3(kThreads), static_cast<size_t>(p.shared_bytes),
                        map_of_gradients(a, groups), weight, a, columns, groups,
                        static_cast<int>(p.tiles), vectorized, p.pair);
}

template <DType TYPE>
void launch_dweight(const Device& device, const Tensor& like, const Args& a, const Groups& groups,
                    const float* dbias) {
  const Padded columns = padded(a.C, a.pixels(), true, 16);
  const DWeightPlan p = dweight_plan(groups, a.D, columns.columns(), device.multiprocessors());
  Tensor partial = empty_like_shape(
      like, {static_cast<int64_t>(p.split.splits) * a.D * columns.columns()}, ScalarType::Float);
  auto* parts = static_cast<float*>(partial.mutable_data_ptr());
  device.launch_cluster(p.features == 256 ? dweight_kernel<TYPE, 2> : dweight_kernel<TYPE, 1>,
                        p.pair, dim3(static_cast<unsigned>(p.tiles * p.split.splits)),
                        dim3(kThreads), static_cast<size_t>(p.shared_bytes),
                        map_of_gradients(a, groups), a, columns, source_of(a), groups, parts,
                        p.split.steps, p.pair);
  finish_dweight(device, a, parts, p.split.splits, dbias);
}

template <DType TYPE>
void launch(const Device& device, const Tensor& like, const Args& a, const float* dbias) {
  const Groups groups = sm90::groups(a.B, a.N);
  if (a.dimages.data != nullptr) launch_dimages<TYPE>(device, like, a, groups);
  if (a.dweight.data != nullptr) launch_dweight<TYPE>(device, like, a, groups, dbias);
}

}  // namespace

Refusal sm90_refuses_backward(const Args& a) {
  const Refusal why = sm80_refuses_backward(a);
  if (!why.empty()) return why;
  const auto serves = [](int64_t stride, int size) {
    return size == 1 || (stride > 0 && stride < int64_t{1} << 38);
  };
  if (!serves(a.dtokens_row, a.N) || !serves(a.dtokens_batch, a.B))
    return "rows of dtokens must lie apart, in order";
  return "";
}

void products_sm90(const Device& device, const Tensor& like, const Args& a, const float* dbias) {
  if (a.dtype == DType::kBF16)
    launch<DType::kBF16>(device, like, a, dbias);
  else
    launch<DType::kF16>(device, like, a, dbias);
}

}  // namespace vitkernels::patch_embed
