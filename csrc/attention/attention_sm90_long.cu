// Forward of attention on Hopper's tensor cores (wgmma, TMA) for any number of queries and keys:
// bf16 and fp16, head dims to 128 that are multiples of 8, every bias, padding mask, dropout.
//
// A block stays and goes through items of 128 query rows of a head. Warps have roles:
//   0..3, 4..7  a warpgroup each, 64 query rows: S = Q K^T of a tile of keys in registers, a
//               running maximum, P in 16 bits from registers times V. S of a tile and P V of the
//               tile before are under way together; the two groups take turns to begin them, so
//               that the exponentials of one run beside the products of the other
//   8           one lane loads: K and V through a ring each, the next item's behind this one's
//   9..11       up to 16 rows past whole tiles (577 = 9 * 64 + 1) in tails of 8, by mma.sync: a
//               third of each tile's keys a warp, beside an item that has a tile for either group,
//               from the K and V that are there (attention_sm90_long_tail.cuh); heads to 80
//               columns, with bias, masks or dropout to 64: wider ones leave too few registers
// Tiles of keys are of 152 or 176, whichever computes fewer columns in vain (577 = 4 * 152 - 31,
// 1370 = 8 * 176 - 38), so that only the last has a mask and no tile is a sliver.
//
// Least bytes: Q, K, V once, O once. B 64, H 12, N 577, D 64: 227 MB, 53 us at 4.3 TB/s; products
// 65 GFLOP = 83 us at 790 TFLOP/s, 87 us with padding (95% of columns). Exponentials: 256 M of 16 a
// clock and multiprocessor = 69 us, which the turns overlap. N 1370: 97% of columns and rows.
// A tile of 64 rows and 608 keys is 2500 clocks of the four tensor cores and 2430 of exponentials;
// a tail 304 products of 16 x 8 x 16, 700 clocks of three (at 60% of wgmma's rate), and 400 of
// exponentials. So 577 has 9 tiles and a tail instead of 10 tiles: 6% fewer clocks; 1025 has 8
// items instead of 9, of which the last would be one row for one group.
// One item at a time would pay 1 to 2 us of start for each 6 us of work, hence blocks that stay:
// 3840 items of the first shape are 29.1 rounds of 132.
//
// Grid: a block for each multiprocessor, 384 threads; 200 or 240 registers a thread that
// multiplies. Not measured yet. Launch settings: attention_plan_sm90_long.h.
#include "attention/attention_sm90_long_tail.cuh"

namespace vitkernels::attention {
namespace {

using namespace sm90_long;

// Named barriers: whose turn it is, kTurn + group; the tails' warps.
enum Barrier { kTurn = 1, kMerge = kTurn + kGroups };

// What every role knows of the block's shared memory: the groups' queries, keys, values, barriers,
// what the tails' warps hand over.
template <int WIDTH, int KEYS>
struct Shared {
  static constexpr int kRows = stage_rows(KEYS), kQueryBytes = tile_bytes(kTile, WIDTH),
                       kStageBytes = tile_bytes(kRows, WIDTH);
  char *queries, *keys, *values;
  MBarrier* barriers;

  VK_DEVICE Shared(char* memory, int stages)
      : queries(memory),
        keys(memory + kGroups * kQueryBytes),
        values(keys + stages * kStageBytes),
        barriers(reinterpret_cast<MBarrier*>(values + stages * kStageBytes)) {}
  VK_DEVICE Tile query(int group) const {
    return tile_at<WIDTH>(queries + group * kQueryBytes, kTile);
  }
  VK_DEVICE Tile key(int slot) const { return tile_at<WIDTH>(keys + slot * kStageBytes, kRows); }
  VK_DEVICE Tile value(int slot) const {
    return tile_at<WIDTH>(values + slot * kStageBytes, kRows);
  }
  VK_DEVICE MBarrier* query_full(int group) const { return barriers + group; }
  VK_DEVICE MBarrier* query_empty(int group) const { return barriers + kGroups + group; }
  VK_DEVICE Ring key_ring(int stages) const {
    MBarrier* const first = barriers + 2 * kGroups;
    return {first, first + kMostTiles, stages};
  }
  VK_DEVICE Ring value_ring(int stages) const {
    MBarrier* const first = barriers + 2 * kGroups + 2 * kMostTiles;
    return {first, first + kMostTiles, stages};
  }
  VK_DEVICE float4* handed(int share) const {  // by that warp, not the first
    char* const behind = reinterpret_cast<char*>(barriers) + kLongBarrierBytes;
    return reinterpret_cast<float4*>(behind + (share - 1) * handed_bytes(WIDTH));
  }
};

VK_DEVICE int first_row(const ForwardPlan& p, int item, int group) {
  return (item % p.items * kGroups + group) * kTile;
}

// One lane's work, in the order in which it is needed.
template <int WIDTH, int KEYS>
VK_DEVICE void load_items(const Shared<WIDTH, KEYS>& shared, const Maps& maps, const Args& a,
                          const ForwardPlan& p) {
  Ring keys = shared.key_ring(p.stages), values = shared.value_ring(p.stages);
  int query_phase[kGroups] = {};
  const int items = a.B * a.H * p.items;
  for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
    const Head head = head_at(a, item / p.items);
    for (int tile = 0; tile <= p.tiles; ++tile) {
      if (tile < p.tiles) {
        MBarrier* const full = keys.full + keys.slot();
        mbarrier_wait(keys.empty + keys.slot(), keys.phase() ^ 1);
        mbarrier_arrive_expect(full, KEYS * 2 * WIDTH);
        load_rows<WIDTH>(shared.key(keys.slot()), maps, 1, full, tile * KEYS, head);
        keys.advance();
      }
      if (tile == 0) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          const int row = first_row(p, item, group);
          if (row >= p.rows) continue;
          mbarrier_wait(shared.query_empty(group), query_phase[group] ^ 1);
          mbarrier_arrive_expect(shared.query_full(group), kTile * 2 * WIDTH);
          load_rows<WIDTH>(shared.query(group), maps, 0, shared.query_full(group), row, head);
          query_phase[group] ^= 1;
        }
        continue;
      }
      MBarrier* const full = values.full + values.slot();
      mbarrier_wait(values.empty + values.slot(), values.phase() ^ 1);
      mbarrier_arrive_expect(full, stage_rows(KEYS) * 2 * WIDTH);
      load_rows<WIDTH>(shared.value(values.slot()), maps, 2, full, (tile - 1) * KEYS, head);
      values.advance();
    }
  }
}

// Lane 0 speaks for its warp, which has waited.
VK_DEVICE void release(MBarrier* empty) {
  if (lane_index() == 0) mbarrier_arrive(empty);
}

VK_DEVICE Places<false> places(int row, int key) { return {row, key + lane_index() % 4 * 2}; }

// From products to scores in units of log2, if not that are to be multiplied by what is returned;
// -inf where there is no key. Raises `top` to the thread's largest.
template <bool GENERAL, int C>
VK_DEVICE float finish_tile(float (&s)[C], float (&top)[2], const Args& a, int index, int row,
                            int key) {
  if constexpr (!GENERAL) {
    return finish_scores<BiasPlace::kNone>(s, top, a, index, nullptr, 0, 0, row, key);
  } else {
    const float by = a.scale * kLog2e;
    if (has_float_bias(a))
      scale_scores<BiasPlace::kGlobal>(s, a, index, nullptr, by, 0, 0, row, key);
    else
      scale_scores<BiasPlace::kNone>(s, a, index, nullptr, by, 0, 0, row, key);
    hide_scores(s, a, head_at(a, index), places(row, key));
    if (a.Nk - key < 2 * C) mask_columns<0>(s, a.Nk - key);
#pragma unroll
    for (int i = 0; i < C; ++i) top[i % 4 / 2] = fmaxf(top[i % 4 / 2], s[i]);
    return 1.0f;
  }
}

// One warpgroup's work.
template <DType TYPE, int WIDTH, int KEYS, bool GENERAL>
struct Consumer {
  using Memory = Shared<WIDTH, KEYS>;
  static constexpr int kSteps = Memory::kRows / 16;
  const Memory& shared;
  const Args& a;
  const ForwardPlan& p;
  int group;
  Ring keys, values;

  // The barriers count both groups: who waits, and who says that it is the other's turn.
  VK_DEVICE void wait_for_turn() const { barrier_sync(kTurn + group, 128 * kGroups); }
  VK_DEVICE void pass_turn() const { barrier_arrive(kTurn + (1 - group), 128 * kGroups); }

  VK_DEVICE void release_keys() {
    release(keys.empty + keys.slot());
    keys.advance();
  }
  VK_DEVICE void release_values() {
    release(values.empty + values.slot());
    values.advance();
  }
  VK_DEVICE void begin_sums(Sums<WIDTH>& o, FragmentA (&weights)[kSteps], bool accumulate) {
    begin_values<TYPE>(o, weights, shared.value(values.slot()), 0, Memory::kRows, accumulate);
  }

  // S of a tile and, but for the FIRST, P V of the tile before.
  template <bool FIRST>
  VK_DEVICE void multiply_tile(Sums<WIDTH>& o, FragmentA (&weights)[kSteps], Softmax& rows,
                               int index, int row, int tile) {
    float s[KEYS / 2];
    mbarrier_wait(keys.full + keys.slot(), keys.phase());
    if (!FIRST) mbarrier_wait(values.full + values.slot(), values.phase());
    wait_for_turn();
    begin_scores<TYPE, WIDTH>(s, shared.query(group), 0, shared.key(keys.slot()), 0);
    if constexpr (!FIRST) begin_sums(o, weights, tile > 1);
    pass_turn();
    wgmma_wait<FIRST ? 0 : 1>(s);
    if (tile == p.tiles - 1) release(shared.query_empty(group));
    release_keys();

    float top[2] = {-INFINITY, -INFINITY}, low[2], rescale[2];
    const float by = finish_tile<GENERAL>(s, top, a, index, row, tile * KEYS);
    raise(rows, top, by, low, rescale);
    exponentiate_here(s, rows, by, low);
    if constexpr (GENERAL)
      if (a.dropout.seed != nullptr)
        drop_weights(s, a, head_at(a, index), places(row, tile * KEYS));
    if constexpr (!FIRST) {
      finish_values(o);
      pin_all(weights);
      pin_registers(s);  // nothing of to_operand before this
      release_values();
#pragma unroll
      for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) o.at(j, i) *= rescale[i / 2];
    }
    to_operand<TYPE>(weights, s);
  }

  VK_DEVICE void multiply_item(int item) {
    Sums<WIDTH> o;
    FragmentA weights[kSteps];
    Softmax rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    const int index = item / p.items;
    const int row = first_row(p, item, group) + warp_index() % 4 * 16 + lane_index() / 4;
    multiply_tile<true>(o, weights, rows, index, row, 0);
#pragma unroll 1
    for (int tile = 1; tile < p.tiles; ++tile)
      multiply_tile<false>(o, weights, rows, index, row, tile);
    mbarrier_wait(values.full + values.slot(), values.phase());
    begin_sums(o, weights, p.tiles > 1);
    finish_values(o);
    pin_all(weights);
    release_values();
    const float kept = GENERAL && a.dropout.seed != nullptr ? a.dropout.scale : 1.0f;
    store_rows<TYPE, 0, WIDTH / 8>(a, index, rows, row, [&](int j, int i) {
      return GENERAL ? o.at(j, i) * kept : o.at(j, i);
    });
  }

  // An item of which the group has no rows: every phase is seen and every turn passed all the same.
  VK_DEVICE void skip_item() {
    for (int tile = 0; tile < p.tiles; ++tile) {
      mbarrier_wait(keys.full + keys.slot(), keys.phase());
      wait_for_turn();
      pass_turn();
      release_keys();
      mbarrier_wait(values.full + values.slot(), values.phase());
      release_values();
    }
  }

  VK_DEVICE void run() {
    if (group == 1) pass_turn();
    int query_phase = 0;
    const int items = a.B * a.H * p.items, step = static_cast<int>(gridDim.x);
    for (int item = static_cast<int>(blockIdx.x); item < items; item += step) {
      if (first_row(p, item, group) >= p.rows) {
        skip_item();
        continue;
      }
      mbarrier_wait(shared.query_full(group), query_phase);
      query_phase ^= 1;
      multiply_item(item);
    }
    if (group == 0) wait_for_turn();  // the other's last word
  }
};

// One of the warps that compute the tails: a share of each tile's keys, for items that have one.
template <DType TYPE, int WIDTH, int KEYS, bool GENERAL>
struct TailWarp {
  using Rows = Tail<TYPE, WIDTH, GENERAL>;
  const Shared<WIDTH, KEYS>& shared;
  const Args& a;
  const ForwardPlan& p;
  int share;
  Ring keys, values;

  VK_DEVICE void add_tile(Rows& rows, int tile) const {
    const int start = tile * KEYS, end = min(start + KEYS, a.Nk);
    const Tile k = shared.key(keys.slot()), v = shared.value(values.slot());
#pragma unroll 1
    for (int at = share * Rows::kKeys; start + at < end; at += kTailShares * Rows::kKeys)
      rows.add_keys(k, v, at, start + at, end);
  }

  VK_DEVICE void merge(Rows& rows) const {
    barrier_sync(kMerge, kTailShares * kWarp);  // what was handed over before has been taken
    if (share > 0) rows.give(shared.handed(share));
    barrier_sync(kMerge, kTailShares * kWarp);
    if (share > 0) return;
    for (int other = 1; other < kTailShares; ++other) rows.take(shared.handed(other));
    rows.store();
  }

  VK_DEVICE void run() {
    const int items = a.B * a.H * p.items, whole = p.rows / (kGroups * kTile);
    for (int item = static_cast<int>(blockIdx.x); item < items;
         item += static_cast<int>(gridDim.x)) {
      const Division at(item, p.items);
      const int index = at.quotient, tail = tail_of(p.tails, whole, index, at.rest);
      Rows rows{a, index, p.rows + tail * kTailRows};
      if (tail != kNoTail) rows.load_queries();
      for (int tile = 0; tile < p.tiles; ++tile) {  // every phase is seen, with or without a tail
        mbarrier_wait(keys.full + keys.slot(), keys.phase());
        mbarrier_wait(values.full + values.slot(), values.phase());
        if (tail != kNoTail) add_tile(rows, tile);
        __syncwarp();
        release(keys.empty + keys.slot());
        release(values.empty + values.slot());
        keys.advance();
        values.advance();
      }
      if (tail != kNoTail) merge(rows);
    }
  }
};

template <DType TYPE, int WIDTH, int KEYS, bool GENERAL>
__global__ void __launch_bounds__(kLongThreads, 1)
    forward_kernel(const __grid_constant__ Maps maps, const Args a, const ForwardPlan p) {
  check_launch_bounds<kLongThreads>();
  VK_SWIZZLED_SHARED(char, memory);
  const Shared<WIDTH, KEYS> shared(memory, p.stages);
  const Ring keys = shared.key_ring(p.stages), values = shared.value_ring(p.stages);
  const int warp = warp_index();
  if (threadIdx.x == 0) {
    for (int group = 0; group < kGroups; ++group)
      mbarrier_init(shared.query_full(group), 1), mbarrier_init(shared.query_empty(group), 4);
    const int readers = 4 * kGroups + (p.tails > 0 ? kTailShares : 0);  // warps
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(keys.full + i, 1), mbarrier_init(keys.empty + i, readers);
      mbarrier_init(values.full + i, 1), mbarrier_init(values.empty + i, readers);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  if (warp < 4 * kGroups) {
    take_registers<forward_registers(WIDTH, GENERAL)>();
    Consumer<TYPE, WIDTH, KEYS, GENERAL>{shared, a, p, warp / 4, keys, values}.run();
    return;
  }
  give_up_registers<tail_registers(WIDTH, GENERAL)>();
  if (warp == 4 * kGroups) {
    if (lane_index() == 0) load_items(shared, maps, a, p);
  } else if constexpr (takes_tails(WIDTH, GENERAL)) {
    const int share = warp - 4 * kGroups - 1;
    if (p.tails > 0) TailWarp<TYPE, WIDTH, KEYS, GENERAL>{shared, a, p, share, keys, values}.run();
  }
}

// ---- Host

bool is_general(const Args& a) {
  return a.bias.data != nullptr || a.padding != nullptr || a.dropout.seed != nullptr;
}

template <DType TYPE, int WIDTH, int KEYS, bool GENERAL>
void launch(const Device& device, const Args& a, const ForwardPlan& p) {
  constexpr int kFirst = Parts<WIDTH>::kFirst, kRest = Parts<WIDTH>::kRest;
  Maps maps{};
  const HeadView* const views[3] = {&a.q, &a.k, &a.v};
  const int rows[3] = {kTile, KEYS, stage_rows(KEYS)};
  for (int i = 0; i < 3; ++i) {
    const int N = i == 0 ? a.Nq : a.Nk;
    maps.first[i] = map_of(*views[i], a, N, rows[i], kFirst);
    if constexpr (kRest > 0) maps.rest[i] = map_of(*views[i], a, N, rows[i], kRest);
  }
  device.launch(forward_kernel<TYPE, WIDTH, KEYS, GENERAL>, dim3(static_cast<unsigned>(p.blocks)),
                dim3(kLongThreads), static_cast<size_t>(p.shared_bytes), maps, a, p);
}

template <DType TYPE, int WIDTH>
void launch(const Device& device, const Args& a, const ForwardPlan& p) {
  if (is_general(a)) return launch<TYPE, WIDTH, kNarrow, true>(device, a, p);
  if constexpr (WIDTH == 64)
    if (p.keys == kWide) return launch<TYPE, WIDTH, kWide, false>(device, a, p);
  launch<TYPE, WIDTH, kNarrow, false>(device, a, p);
}

template <DType TYPE>
void launch(const Device& device, const Args& a) {
  const ForwardPlan p =
      forward_plan(a.B, a.H, a.Nq, a.Nk, a.D, is_general(a), device.multiprocessors());
  switch (p.width) {
    case 64:
      return launch<TYPE, 64>(device, a, p);
    case 80:
      return launch<TYPE, 80>(device, a, p);
    case 96:
      return launch<TYPE, 96>(device, a, p);
    default:
      return launch<TYPE, 128>(device, a, p);
  }
}

}  // namespace

Refusal sm90_long_refuses_forward(const Args& a) {
  if (a.dtype == DType::kF32) return "it takes bf16 and fp16";
  if (a.D % 8 != 0 || a.D > 128) return "it takes head dims to 128 that are multiples of 8";
  if (static_cast<int64_t>(a.B) * a.H * tiles_of(a.Nq, kGroups * kTile) > INT32_MAX / 2)
    return "it takes up to 2^30 tiles of 128 queries";
  if (a.Nq > INT32_MAX / 2 || a.Nk > INT32_MAX / 2) return "it takes up to 2^30 queries and keys";
  if (a.bias.data != nullptr && a.bias.dtype != DType::kBool && a.bias.column != 0 &&
      a.bias.column != 1)
    return "columns of the bias must be neighbours";
  if (!tma_takes(a.q, a, a.Nq) || !tma_takes(a.k, a, a.Nk) || !tma_takes(a.v, a, a.Nk))
    return "rows of q, k and v must begin on 16-byte lines, each on its own";
  return "";
}

void forward_sm90_long(const Device& device, const Tensor&, const Args& a) {
  if (a.dtype == DType::kBF16)
    launch<DType::kBF16>(device, a);
  else
    launch<DType::kF16>(device, a);
}

}  // namespace vitkernels::attention
