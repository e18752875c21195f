// Backward of attention on Hopper's tensor cores (wgmma, TMA) for any number of queries and keys:
// bf16 and fp16, head dims to 128 that are multiples of 8, every bias, padding mask, dropout; the
// gradient of a bias: attention_sm90_long_dbias.cu. Two passes of one kernel and what they need of
// each row:
//
//   stats_kernel         lse in units of log2 and rowsum(dO O) of each query
//   gradient_kernel<0>   64 queries a warpgroup, tiles of keys: S = Q K^T, dP = dO V^T,
//                        dS = P (dP - rowsum), dQ += dS K
//   gradient_kernel<1>   64 keys a warpgroup, tiles of queries: S^T = K Q^T, dP^T = V dO^T,
//                        dV += P^T dO, dK += dS^T Q
//
// Everything of size N x N stays in registers, where P and dS are the A operand of the products
// that follow. Sums have one order and no two threads write one element: the same bits each time.
// One pass would compute 5 products instead of 7, but add dQ up in fp32 in global memory in an
// order that blocks wait for: B 64, H 12, N 577, D 64: 5 reads and writes of 113 MB.
//
// A block stays and goes through items of 128 rows of a head. Warpgroups 0 and 1 multiply; a tile's
// last two products run while the next tile's first two are begun, exponentials beside dP. One lane
// of warp 8 loads: the rows of each warpgroup once an item, tiles of the other side through a ring.
//
// That shape: 164 GFLOP are asked for, 282 computed with both passes and padding (rows and columns
// to 640) = 357 us at 790 TFLOP/s: at best 459 useful TFLOP/s. Exponentials, twice: 2 x 69 us.
// Least bytes 8 tensors of 57 MB = 105 us at 4.3 TB/s.
//
// Rows past whole tiles are no tails as in the forward, for want of registers: with 216 for a
// thread that multiplies ptxas runs products by query one after another (by key 226 are needed),
// and of the 72 that would leave a tail's threads they need 80 or more.
//
// Grid: a block for each multiprocessor, 384 threads; 240 registers a thread that multiplies. Not
// measured yet. Launch settings: attention_plan_sm90_long.h.
#include "attention/attention_sm90_long_backward.cuh"

namespace vitkernels::attention {
namespace {

using namespace sm90_long;

constexpr int kStatsThreads = 128, kStatsLanes = 16;  // of a row, 8 elements each

__global__ void __launch_bounds__(kStatsThreads)
    stats_kernel(const Args a, int rows, RowStats* stats) {
  check_launch_bounds<kStatsThreads>();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kStatsThreads + threadIdx.x;
  const int64_t at = thread / kStatsLanes, index = divide(at, rows);
  const int row = static_cast<int>(at - index * rows), lane = lane_index() % kStatsLanes;
  const bool exists = index < static_cast<int64_t>(a.B) * a.H, inside = exists && row < a.Nq;
  float sum[1] = {0.0f};
  if (inside && lane * 8 < a.D) {
    const Head head = head_at(a, static_cast<int>(index));
    const auto load = [&](const HeadView& view, float (&v)[8]) {
      const uint4 x =
          load_streaming_16(static_cast<const uint16_t*>(view.data) + head.b * view.batch +
                            head.h * view.head + row * view.row + lane * 8);
      to_floats(Raw8{{x.x, x.y, x.z, x.w}}, a.dtype, v);
    };
    float out[8], dout[8];
    load(a.out, out), load(a.dout, dout);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[0] = fmaf(out[i], dout[i], sum[0]);
  }
  sum_over_lanes(sum, kStatsLanes);
  if (!exists || lane != 0) return;
  const float lse = inside ? a.lse[index * a.Nq + row] : INFINITY;
  stats[at] = {lse == -INFINITY ? 0.0f : lse * kLog2e, sum[0]};
}

// The block's shared memory: the groups' rows (K and V by key, else Q and dO), then stages of
// tiles of the other side, barriers.
template <int WIDTH, int COLUMNS>
struct Shared {
  static constexpr int kNearBytes = tile_bytes(kTile, WIDTH),
                       kFarBytes = tile_bytes(COLUMNS, WIDTH);
  char *rows, *stages;
  MBarrier* barriers;
  int count;

  VK_DEVICE Shared(char* memory, int stage_count)
      : rows(memory),
        stages(memory + 2 * kGroups * kNearBytes),
        barriers(reinterpret_cast<MBarrier*>(stages + 2 * stage_count * kFarBytes)),
        count(stage_count) {}
  VK_DEVICE Tile near(int group, int which) const {
    return tile_at<WIDTH>(rows + (2 * group + which) * kNearBytes, kTile);
  }
  VK_DEVICE Tile far(int slot, int which) const {
    return tile_at<WIDTH>(stages + (2 * slot + which) * kFarBytes, COLUMNS);
  }
  VK_DEVICE MBarrier* near_full(int group) const { return barriers + group; }
  VK_DEVICE MBarrier* near_empty(int group) const { return barriers + kGroups + group; }
  VK_DEVICE Ring ring() const {
    MBarrier* const first = barriers + 2 * kGroups;
    return {first, first + kMostTiles, count};
  }
};

VK_DEVICE int first_row(const BackwardPlan& p, int item, int group) {
  return (item % p.items * kGroups + group) * kTile;
}

template <int WIDTH, int COLUMNS>
VK_DEVICE void load_items(const Shared<WIDTH, COLUMNS>& shared, const Maps& near, const Maps& far,
                          const Args& a, const BackwardPlan& p, int rows) {
  Ring ring = shared.ring();
  int near_phase[kGroups] = {};
  const int items = a.B * a.H * p.items, step = static_cast<int>(gridDim.x);
  for (int item = static_cast<int>(blockIdx.x); item < items; item += step) {
    const Head head = head_at(a, item / p.items);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int row = first_row(p, item, group);
      if (row >= rows) continue;
      MBarrier* const full = shared.near_full(group);
      mbarrier_wait(shared.near_empty(group), near_phase[group] ^ 1);
      mbarrier_arrive_expect(full, 2 * kTile * 2 * WIDTH);
      load_rows<WIDTH>(shared.near(group, 0), near, 0, full, row, head);
      load_rows<WIDTH>(shared.near(group, 1), near, 1, full, row, head);
      near_phase[group] ^= 1;
    }
    for (int tile = 0; tile < p.tiles; ++tile) {
      MBarrier* const full = ring.full + ring.slot();
      mbarrier_wait(ring.empty + ring.slot(), ring.phase() ^ 1);
      mbarrier_arrive_expect(full, 2 * COLUMNS * 2 * WIDTH);
      load_rows<WIDTH>(shared.far(ring.slot(), 0), far, 0, full, tile * COLUMNS, head);
      load_rows<WIDTH>(shared.far(ring.slot(), 1), far, 1, full, tile * COLUMNS, head);
      ring.advance();
    }
  }
}

// Lane 0 speaks for its warp, which has waited.
VK_DEVICE void release(MBarrier* empty) {
  if (lane_index() == 0) mbarrier_arrive(empty);
}

// One warpgroup's item: dQ of 64 queries, or dK and dV of 64 keys.
template <DType TYPE, int WIDTH, int COLUMNS, bool BY_KEY>
VK_DEVICE void multiply_item(const Shared<WIDTH, COLUMNS>& shared, Ring& ring, const Args& a,
                             const BackwardPlan& p, const RowStats* stats_of_all, int item,
                             int group) {
  const int index = item / p.items, lane = lane_index();
  const Head head = head_at(a, index);
  const int row = first_row(p, item, group) + warp_index() % 4 * 16 + lane / 4;
  const RowStats* const of_head = stats_of_all + static_cast<int64_t>(index) * p.stats_rows;
  Stats<BY_KEY> stats{};
  if constexpr (!BY_KEY) stats.rows[0] = of_head[row], stats.rows[1] = of_head[row + 8];

  Sums<WIDTH> sums, values;  // dQ or dK; dV
  FragmentA ds[COLUMNS / 16], weights[BY_KEY ? COLUMNS / 16 : 1];
  MBarrier* before = nullptr;  // of the stage that the products under way read
#pragma unroll 1
  for (int tile = 0; tile < p.tiles; ++tile) {
    const Tile first = shared.far(ring.slot(), 0), second = shared.far(ring.slot(), 1);
    const Places<BY_KEY> at = {row, tile * COLUMNS + lane % 4 * 2};
    if constexpr (BY_KEY) stats.of_column = of_head + at.column;
    float s[COLUMNS / 2], dp[COLUMNS / 2];
    mbarrier_wait(ring.full + ring.slot(), ring.phase());
    begin_scores<TYPE, WIDTH>(s, shared.near(group, 0), 0, first, 0);
    begin_scores<TYPE, WIDTH>(dp, shared.near(group, 1), 0, second, 0);
    wgmma_wait<1>(s);
    if (before != nullptr) release(before);
    probabilities<BY_KEY>(s, a, head, p.general, at, stats);
    wgmma_wait<0>(dp);
    pin_registers(s);
    pin_all(ds);
    if constexpr (BY_KEY) pin_all(weights);
    if (tile == p.tiles - 1) release(shared.near_empty(group));
    differentiate<BY_KEY>(dp, s, a, head, p.general, at, stats);
    to_operand<TYPE>(ds, dp);
    if constexpr (BY_KEY) {
      to_operand<TYPE>(weights, s);
      begin_values<TYPE>(values, weights, second, 0, COLUMNS, tile > 0);
    }
    begin_values<TYPE>(sums, ds, first, 0, COLUMNS, tile > 0);
    before = ring.empty + ring.slot();
    ring.advance();
  }
  finish_values(sums);
  pin_all(ds);
  if constexpr (BY_KEY) {
    finish_values(values);
    pin_all(weights);
  }
  release(before);
  store_gradient<TYPE>(sums, a.scale, BY_KEY ? a.dk : a.dq, a, head, row, BY_KEY ? a.Nk : a.Nq);
  if constexpr (BY_KEY) store_gradient<TYPE>(values, 1.0f, a.dv, a, head, row, a.Nk);
}

template <DType TYPE, int WIDTH, int COLUMNS, bool BY_KEY>
__global__ void __launch_bounds__(kLongThreads, 1)
    gradient_kernel(const __grid_constant__ Maps near, const __grid_constant__ Maps far,
                    const Args a, const BackwardPlan p, const RowStats* stats) {
  check_launch_bounds<kLongThreads>();
  VK_SWIZZLED_SHARED(char, memory);
  const Shared<WIDTH, COLUMNS> shared(memory, p.stages);
  Ring ring = shared.ring();
  const int warp = warp_index(), rows = BY_KEY ? a.Nk : a.Nq;
  if (threadIdx.x == 0) {
    for (int group = 0; group < kGroups; ++group)
      mbarrier_init(shared.near_full(group), 1), mbarrier_init(shared.near_empty(group), 4);
    for (int i = 0; i < p.stages; ++i)  // readers: warps
      mbarrier_init(ring.full + i, 1), mbarrier_init(ring.empty + i, 4 * kGroups);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (warp >= 4 * kGroups) {
    give_up_registers<kLoaderRegisters>();
    if (warp == 4 * kGroups && lane_index() == 0) load_items(shared, near, far, a, p, rows);
    return;
  }
  take_registers<kConsumerRegisters>();
  const int group = warp / 4, items = a.B * a.H * p.items, step = static_cast<int>(gridDim.x);
  int near_phase = 0;
  for (int item = static_cast<int>(blockIdx.x); item < items; item += step) {
    if (first_row(p, item, group) < rows) {
      mbarrier_wait(shared.near_full(group), near_phase);
      near_phase ^= 1;
      multiply_item<TYPE, WIDTH, COLUMNS, BY_KEY>(shared, ring, a, p, stats, item, group);
      continue;
    }
    for (int tile = 0; tile < p.tiles; ++tile) {  // no rows: every phase is seen all the same
      mbarrier_wait(ring.full + ring.slot(), ring.phase());
      release(ring.empty + ring.slot());
      ring.advance();
    }
  }
}

// ---- Host

template <DType TYPE, int WIDTH, bool BY_KEY>
void launch_pass(const Device& device, const Args& a, const RowStats* stats) {
  constexpr int kFirst = Parts<WIDTH>::kFirst, kRest = Parts<WIDTH>::kRest;
  constexpr int kColumns = backward_columns(WIDTH, BY_KEY);
  BackwardPlan p = backward_plan(a.B, a.H, a.Nq, a.Nk, a.D, BY_KEY, device.multiprocessors());
  p.general = a.bias.data != nullptr || a.padding != nullptr || a.dropout.seed != nullptr;
  Maps by_query{}, by_key{};
  const HeadView* const views[2][2] = {{&a.q, &a.dout}, {&a.k, &a.v}};
  for (int side = 0; side < 2; ++side)
    for (int i = 0; i < 2; ++i) {
      Maps& maps = side == 0 ? by_query : by_key;
      const int N = side == 0 ? a.Nq : a.Nk, rows = (side == 1) == BY_KEY ? kTile : kColumns;
      maps.first[i] = map_of(*views[side][i], a, N, rows, kFirst);
      if constexpr (kRest > 0) maps.rest[i] = map_of(*views[side][i], a, N, rows, kRest);
    }
  device.launch(gradient_kernel<TYPE, WIDTH, kColumns, BY_KEY>,
                dim3(static_cast<unsigned>(p.blocks)), dim3(kLongThreads),
                static_cast<size_t>(p.shared_bytes), BY_KEY ? by_key : by_query,
                BY_KEY ? by_query : by_key, a, p, stats);
}

template <DType TYPE, int WIDTH>
void launch(const Device& device, const Args& a, const RowStats* stats) {
  if (a.dq.data != nullptr) launch_pass<TYPE, WIDTH, false>(device, a, stats);
  if (a.dk.data != nullptr || a.dv.data != nullptr)
    launch_pass<TYPE, WIDTH, true>(device, a, stats);
}

template <DType TYPE>
void launch(const Device& device, const Args& a, const RowStats* stats) {
  switch (long_width(a.D)) {
    case 64:
      return launch<TYPE, 64>(device, a, stats);
    case 80:
      return launch<TYPE, 80>(device, a, stats);
    case 96:
      return launch<TYPE, 96>(device, a, stats);
    default:
      return launch<TYPE, 128>(device, a, stats);
  }
}

}  // namespace

Refusal sm90_long_refuses_backward(const Args& a) {
  const Refusal forward = sm90_long_refuses_forward(a);
  if (!forward.empty()) return forward;
  if (a.dbias != nullptr) {
    if (a.dbias_rows != a.Nq || a.dbias_columns != a.Nk)
      return "it has no dbias of one row or column for all";
    if (bias_items(int64_t{a.dbias_batch} * a.dbias_heads, a.Nq, a.Nk) > INT32_MAX / 2)
      return "it takes up to 2^30 tiles of dbias";
  }
  if (static_cast<int64_t>(a.B) * a.H * tiles_of(a.Nk, kGroups * kTile) > INT32_MAX / 2)
    return "it takes up to 2^30 tiles of 128 keys";
  if (!tma_takes(a.dout, a, a.Nq) || !tma_takes(a.out, a, a.Nq))
    return "rows of dout and out must begin on 16-byte lines, each on its own";
  return "";
}

void backward_sm90_long(const Device& device, const Tensor& like, const Args& a) {
  const int rows = stats_rows(a.Nq, long_width(a.D));
  const int64_t count = static_cast<int64_t>(a.B) * a.H * rows;
  Tensor scratch = empty_like_shape(like, {count, 2}, ScalarType::Float);
  auto* stats = static_cast<RowStats*>(scratch.mutable_data_ptr());
  const int64_t blocks = (count * kStatsLanes + kStatsThreads - 1) / kStatsThreads;
  device.launch(stats_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kStatsThreads), 0, a, rows,
                stats);
  if (a.dtype == DType::kBF16)
    launch<DType::kBF16>(device, a, stats);
  else
    launch<DType::kF16>(device, a, stats);
  if (a.dbias != nullptr) dbias_sm90_long(device, a, stats);
}

}  // namespace vitkernels::attention
