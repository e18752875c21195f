// Gradient of a bias of full rows and columns for attention's backward of many tokens on Hopper's
// tensor cores (wgmma, TMA): dbias = dS, added over the batch items and heads that share the bias.
//
// A block stays and goes through items: 128 queries x 96 keys of one matrix of dbias. Warpgroups 0
// and 1 have 64 queries each and go through the (batch item, head) pairs that add to the matrix:
// S = Q K^T, dP = dO V^T, dS = P (dP - rowsum(dO O)), added up in registers in that order, stored
// once. No scratch memory, and the same bits on any number of multiprocessors. One lane of warp 8
// loads the rows of the next pair while this one's are multiplied.
//
// B 64, H 12, N 577, D 64, bias (1, H, N, N): 65 GFLOP asked for, 84 with padding = 107 us at
// 790 TFLOP/s, besides the two passes of attention_sm90_long_backward.cu. Each pair of a part
// brings 57 KB for 3.1 MFLOP, 1.5 GB in all, from L2: about 0.3 ms at 5 TB/s, which bounds it.
// Least bytes: 4 tensors of 57 MB and dbias.
//
// Grid: a block for each multiprocessor, 384 threads. Not measured yet. Launch settings:
// attention_plan_sm90_long.h.
#include "attention/attention_sm90_long_backward.cuh"

namespace vitkernels::attention {
namespace {

using namespace sm90_long;

// The block's shared memory: stages of one pair's rows (Q and dO of each group, K, V), barriers.
template <int WIDTH>
struct Shared {
  static constexpr int kNearBytes = tile_bytes(kTile, WIDTH),
                       kFarBytes = tile_bytes(kBiasColumns, WIDTH),
                       kStageBytes = 2 * kGroups * kNearBytes + 2 * kFarBytes;
  char* stages;
  int count;

  VK_DEVICE Tile near(int slot, int group, int which) const {
    return tile_at<WIDTH>(stages + slot * kStageBytes + (2 * group + which) * kNearBytes, kTile);
  }
  VK_DEVICE Tile far(int slot, int which) const {
    return tile_at<WIDTH>(
        stages + slot * kStageBytes + 2 * kGroups * kNearBytes + which * kFarBytes, kBiasColumns);
  }
  VK_DEVICE Ring ring() const {
    auto* const first = reinterpret_cast<MBarrier*>(stages + count * kStageBytes);
    return {first, first + kMostTiles, count};
  }
};

// What an item is: a part of a matrix, and the pairs that add to it.
struct Item {
  int matrix, query, key;  // the first of each
  int b, h, heads, pairs;  // the first pair; heads of each batch item; pairs in all

  VK_DEVICE Item(const Args& a, const BiasPlan& p, int index) {
    const int part = index % (p.items * p.tiles);
    matrix = index / (p.items * p.tiles);
    query = part / p.tiles * kGroups * kTile;
    key = part % p.tiles * kBiasColumns;
    b = matrix / a.dbias_heads, h = matrix % a.dbias_heads;
    heads = a.dbias_heads == 1 ? a.H : 1;
    pairs = (a.dbias_batch == 1 ? a.B : 1) * heads;
  }
  VK_DEVICE Head pair(int i) const { return {b + i / heads, h + i % heads}; }
};

template <int WIDTH>
VK_DEVICE void load_items(const Shared<WIDTH>& shared, const Maps& near, const Maps& far,
                          const Args& a, const BiasPlan& p) {
  Ring ring = shared.ring();
  for (int i = static_cast<int>(blockIdx.x); i < p.all; i += static_cast<int>(gridDim.x)) {
    const Item item(a, p, i);
    const int groups = item.query + kTile < a.Nq ? 2 : 1;
    for (int pair = 0; pair < item.pairs; ++pair) {
      const Head head = item.pair(pair);
      MBarrier* const full = ring.full + ring.slot();
      mbarrier_wait(ring.empty + ring.slot(), ring.phase() ^ 1);
      mbarrier_arrive_expect(full, (2 * groups * kTile + 2 * kBiasColumns) * 2 * WIDTH);
      for (int which = 0; which < 2; ++which) {
        for (int group = 0; group < groups; ++group)
          load_rows<WIDTH>(shared.near(ring.slot(), group, which), near, which, full,
                           item.query + group * kTile, head);
        load_rows<WIDTH>(shared.far(ring.slot(), which), far, which, full, item.key, head);
      }
      ring.advance();
    }
  }
}

template <DType TYPE, int WIDTH>
__global__ void __launch_bounds__(kLongThreads, 1)
    bias_kernel(const __grid_constant__ Maps near, const __grid_constant__ Maps far, const Args a,
                const BiasPlan p, const RowStats* stats_of_all) {
  check_launch_bounds<kLongThreads>();
  VK_SWIZZLED_SHARED(char, memory);
  const Shared<WIDTH> shared = {memory, p.stages};
  Ring ring = shared.ring();
  const int warp = warp_index(), lane = lane_index();
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i)  // readers: warps
      mbarrier_init(ring.full + i, 1), mbarrier_init(ring.empty + i, 4 * kGroups);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (warp >= 4 * kGroups) {
    give_up_registers<kLoaderRegisters>();
    if (warp == 4 * kGroups && lane == 0) load_items(shared, near, far, a, p);
    return;
  }
  take_registers<kConsumerRegisters>();
  const int group = warp / 4;
  for (int i = static_cast<int>(blockIdx.x); i < p.all; i += static_cast<int>(gridDim.x)) {
    const Item item(a, p, i);
    const int first = item.query + group * kTile;
    const Places<false> at = {first + warp % 4 * 16 + lane / 4, item.key + lane % 4 * 2};
    float sums[kBiasColumns / 2] = {};
#pragma unroll 1
    for (int pair = 0; pair < item.pairs; ++pair) {
      mbarrier_wait(ring.full + ring.slot(), ring.phase());
      if (first < a.Nq) {
        const Head head = item.pair(pair);
        const RowStats* const rows =
            stats_of_all + (static_cast<int64_t>(head.b) * a.H + head.h) * p.stats_rows + at.row;
        const Stats<false> stats = {{rows[0], rows[8]}, nullptr};
        float s[kBiasColumns / 2], dp[kBiasColumns / 2];
        begin_scores<TYPE, WIDTH>(s, shared.near(ring.slot(), group, 0), 0,
                                  shared.far(ring.slot(), 0), 0);
        begin_scores<TYPE, WIDTH>(dp, shared.near(ring.slot(), group, 1), 0,
                                  shared.far(ring.slot(), 1), 0);
        wgmma_wait<1>(s);
        probabilities<false>(s, a, head, true, at, stats);
        wgmma_wait<0>(dp);
        differentiate<false>(dp, s, a, head, true, at, stats);
#pragma unroll
        for (int n = 0; n < kBiasColumns / 2; ++n) sums[n] += dp[n];
      }
      if (lane == 0) mbarrier_arrive(ring.empty + ring.slot());  // for the warp, which has waited
      ring.advance();
    }
#pragma unroll
    for (int n = 0; n < kBiasColumns / 2; ++n) {
      const Place place = at(n);
      if (place.query < a.Nq && place.key < a.Nk)
        store_scalar(a.dbias, a.bias.dtype,
                     (static_cast<int64_t>(item.matrix) * a.Nq + place.query) * a.Nk + place.key,
                     sums[n]);
    }
  }
}

// ---- Host

template <DType TYPE, int WIDTH>
void launch(const Device& device, const Args& a, const BiasPlan& p, const RowStats* stats) {
  constexpr int kFirst = Parts<WIDTH>::kFirst, kRest = Parts<WIDTH>::kRest;
  Maps near{}, far{};
  const HeadView* const views[2][2] = {{&a.q, &a.dout}, {&a.k, &a.v}};
  for (int i = 0; i < 2; ++i) {
    near.first[i] = map_of(*views[0][i], a, a.Nq, kTile, kFirst);
    far.first[i] = map_of(*views[1][i], a, a.Nk, kBiasColumns, kFirst);
    if constexpr (kRest > 0) {
      near.rest[i] = map_of(*views[0][i], a, a.Nq, kTile, kRest);
      far.rest[i] = map_of(*views[1][i], a, a.Nk, kBiasColumns, kRest);
    }
  }
  device.launch(bias_kernel<TYPE, WIDTH>, dim3(static_cast<unsigned>(p.blocks)), dim3(kLongThreads),
                static_cast<size_t>(p.shared_bytes), near, far, a, p, stats);
}

template <DType TYPE>
void launch(const Device& device, const Args& a, const BiasPlan& p, const RowStats* stats) {
  switch (long_width(a.D)) {
    case 64:
      return launch<TYPE, 64>(device, a, p, stats);
    case 80:
      return launch<TYPE, 80>(device, a, p, stats);
    case 96:
      return launch<TYPE, 96>(device, a, p, stats);
    default:
      return launch<TYPE, 128>(device, a, p, stats);
  }
}

}  // namespace

void dbias_sm90_long(const Device& device, const Args& a, const RowStats* stats) {
  const BiasPlan p =
      bias_plan(int64_t{a.dbias_batch} * a.dbias_heads, a.Nq, a.Nk, a.D, device.multiprocessors());
  if (a.dtype == DType::kBF16)
    launch<DType::kBF16>(device, a, p, stats);
  else
    launch<DType::kF16>(device, a, p, stats);
}

}  // namespace vitkernels::attention
