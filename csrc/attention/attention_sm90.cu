// Forward of attention on Hopper's tensor cores (wgmma, TMA): bf16 and fp16, up to 272 queries and
// keys, head dims to 128 that are multiples of 8, float bias (dims to 80); no mask, no dropout.
//
// A block stays and goes through heads. Q, K and V of a head come whole into shared memory,
// straight from the strided views; while one head is computed, the next are under way into the
// other stages of two rings, (Q, K) and V. Warps have roles; with three groups (two: 4 less each):
//   0..11       warpgroups, 64 query rows at a time, whichever tile is next: S = Q K^T in registers
//               (to 200 keys, or 272 with narrow heads, in one softmax of two products; else piece
//               by piece with a running maximum), P in 16 bits from registers times V
//   12          one lane loads
//   14, 15      16 query rows by mma.sync when so many or fewer are left over (197 = 3 * 64 + 5):
//               each warp all scores, and half of the columns of the result
// With a bias that samples share, a block has heads of one index only, and their bias stays in
// shared memory, if it fits; any other is read where it is needed.
//
// Least bytes: Q, K, V once, O once. B 256, H 12, N 197, D 64: 310 MB, 72.6 us at 4.3 TB/s;
// products 38.6 us (93% of them useful), exponentials 31 us, which warpgroups overlap.
//
// Grid: a block for each multiprocessor, of 512 threads (two groups: 384); 213 KB of shared memory
// at that shape. Not measured yet. Launch settings: attention_plan_sm90.h.
#include "attention/attention_sm90.cuh"

namespace vitkernels::attention {
namespace {

using namespace sm90;

// What every role knows of the block's shared memory.
struct Shared {
  char *pairs, *values;
  int query_rows, key_rows;

  template <int WIDTH>
  VK_DEVICE Tile query(int slot) const {
    const int pair = tile_bytes(query_rows, WIDTH) + tile_bytes(key_rows, WIDTH);
    return tile_at<WIDTH>(pairs + slot * pair, query_rows);
  }
  template <int WIDTH>
  VK_DEVICE Tile key(int slot) const {
    const int query_bytes = tile_bytes(query_rows, WIDTH);
    const int pair = query_bytes + tile_bytes(key_rows, WIDTH);
    return tile_at<WIDTH>(pairs + slot * pair + query_bytes, key_rows);
  }
  template <int WIDTH>
  VK_DEVICE Tile value(int slot) const {
    return tile_at<WIDTH>(values + slot * tile_bytes(key_rows, WIDTH), key_rows);
  }
};

// One lane's work. V comes later than its pair by as many heads as there are more stages of pairs:
// else a load that waits for a stage of V would keep a free stage of pairs waiting.
template <int WIDTH>
VK_DEVICE void load_heads(const Shared& shared, Ring pairs, Ring values, const Maps& maps,
                          const Args& a) {
  const int heads = a.B * a.H, step = static_cast<int>(gridDim.x);
  const int lag = (pairs.stages - values.stages) * step;
  for (int i = static_cast<int>(blockIdx.x); i < heads + lag; i += step) {
    if (i < heads) {
      const auto [b, h] = head_at(a, i);
      MBarrier* full = pairs.full + pairs.slot();
      mbarrier_wait(pairs.empty + pairs.slot(), pairs.phase() ^ 1);
      mbarrier_arrive_expect(full, (shared.query_rows + shared.key_rows) * 2 * WIDTH);
      load_tile<WIDTH>(shared.query<WIDTH>(pairs.slot()), maps, 0, full, shared.query_rows, h, b);
      load_tile<WIDTH>(shared.key<WIDTH>(pairs.slot()), maps, 1, full, shared.key_rows, h, b);
      pairs.advance();
    }
    if (i - lag >= static_cast<int>(blockIdx.x)) {
      const auto [b, h] = head_at(a, i - lag);
      MBarrier* full = values.full + values.slot();
      mbarrier_wait(values.empty + values.slot(), values.phase() ^ 1);
      mbarrier_arrive_expect(full, shared.key_rows * 2 * WIDTH);
      load_tile<WIDTH>(shared.value<WIDTH>(values.slot()), maps, 2, full, shared.key_rows, h, b);
      values.advance();
    }
  }
}

// Where a warpgroup is, and what it reads.
struct Work {
  const Shared& shared;
  const Ring &pairs, &values;
  const Args& a;
  int head;
  const char* bias;
  int tile;  // its 64 query rows

  VK_DEVICE int block() const { return tile * 4 + warp_index() % 4; }    // of 16 rows: the warp's
  VK_DEVICE int row() const { return block() * 16 + lane_index() / 4; }  // the thread's first
  VK_DEVICE void release_pair() const {
    if (lane_index() == 0) mbarrier_arrive(pairs.empty + pairs.slot());
  }
};

// All keys in one softmax. Their products are of FIRST and, if more than one is needed, of SECOND
// columns: exponentials of the second overlap with the first's P V. last: the pair is not needed
// after.
template <DType TYPE, int WIDTH, int COLUMNS, BiasPlace BIAS, int FIRST, int SECOND>
VK_DEVICE void multiply_keys(Sums<WIDTH>& o, Softmax& rows, const Work& w, bool last) {
  const Tile q = w.shared.query<WIDTH>(w.pairs.slot()), k = w.shared.key<WIDTH>(w.pairs.slot());
  constexpr bool kTwo = SECOND > 0, kOverlap = COLUMNS <= 200;
  float s0[FIRST / 2], s1[kTwo ? SECOND / 2 : 4];
  begin_scores<TYPE, WIDTH>(s0, q, w.tile * kTile, k, 0);
  if constexpr (kTwo) begin_scores<TYPE, WIDTH>(s1, q, w.tile * kTile, k, FIRST);
  wgmma_wait<0>(s0);
  if constexpr (kTwo) pin_registers(s1);
  if (last) w.release_pair();

  float top[2] = {-INFINITY, -INFINITY}, low[2], rescale[2];
  const float by =
      finish_scores<BIAS>(s0, top, w.a, w.head, w.bias, COLUMNS, w.block(), w.row(), 0);
  if constexpr (kTwo)
    finish_scores<BIAS>(s1, top, w.a, w.head, w.bias, COLUMNS, w.block(), w.row(), FIRST);
  raise(rows, top, by, low, rescale);
  FragmentA p0[FIRST / 16], p1[kTwo ? (SECOND + 15) / 16 : 1];
  exponentiate<TYPE>(p0, s0, rows, by, low);
  if constexpr (kTwo && !kOverlap) exponentiate<TYPE>(p1, s1, rows, by, low);
  mbarrier_wait(w.values.full + w.values.slot(), w.values.phase());
  const Tile v = w.shared.value<WIDTH>(w.values.slot());
  begin_values<TYPE>(o, p0, v, 0, w.shared.key_rows, false);
  if constexpr (kTwo && kOverlap) exponentiate<TYPE>(p1, s1, rows, by, low);
  if constexpr (kTwo) begin_values<TYPE>(o, p1, v, FIRST, w.shared.key_rows, true);
  finish_values(o);
  pin_all(p0);
  if constexpr (kTwo) pin_all(p1);
}

// KEYS keys from `key` on, with a running maximum: where one softmax needs too many registers.
template <DType TYPE, int WIDTH, int COLUMNS, BiasPlace BIAS, int KEYS>
VK_DEVICE void add_keys(Sums<WIDTH>& o, Softmax& rows, const Work& w, int key, bool last) {
  float s[KEYS / 2];
  begin_scores<TYPE, WIDTH>(s, w.shared.query<WIDTH>(w.pairs.slot()), w.tile * kTile,
                            w.shared.key<WIDTH>(w.pairs.slot()), key);
  wgmma_wait<0>(s);
  if (last) w.release_pair();
  float top[2] = {-INFINITY, -INFINITY}, low[2], rescale[2];
  const float by =
      finish_scores<BIAS>(s, top, w.a, w.head, w.bias, COLUMNS, w.block(), w.row(), key);
  raise(rows, top, by, low, rescale);
  FragmentA p[(KEYS + 15) / 16];
  exponentiate<TYPE>(p, s, rows, by, low);
  if (key == 0)
    mbarrier_wait(w.values.full + w.values.slot(), w.values.phase());
  else {
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o.at(j, i) *= rescale[i / 2];
  }
  begin_values<TYPE>(o, p, w.shared.value<WIDTH>(w.values.slot()), key, w.shared.key_rows, key > 0);
  finish_values(o);
  pin_all(p);
}

template <DType TYPE, int WIDTH, int COLUMNS, BiasPlace BIAS>
VK_DEVICE void multiply_tile(const Work& w, bool last) {
  Sums<WIDTH> o;
  Softmax rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  if constexpr (COLUMNS < 200) {
    multiply_keys<TYPE, WIDTH, COLUMNS, BIAS, COLUMNS, 0>(o, rows, w, last);
  } else if constexpr (COLUMNS == 200) {
    if constexpr (WIDTH <= 80) {
      multiply_keys<TYPE, WIDTH, COLUMNS, BIAS, 112, 88>(o, rows, w, last);
    } else {
      add_keys<TYPE, WIDTH, COLUMNS, BIAS, 80>(o, rows, w, 0, false);
      add_keys<TYPE, WIDTH, COLUMNS, BIAS, 64>(o, rows, w, 80, false);
      add_keys<TYPE, WIDTH, COLUMNS, BIAS, 56>(o, rows, w, 144, last);
    }
  } else if constexpr (WIDTH <= 64) {
    multiply_keys<TYPE, WIDTH, COLUMNS, BIAS, 144, 128>(o, rows, w, last);
  } else if constexpr (WIDTH <= 80 && BIAS == BiasPlace::kNone) {
    add_keys<TYPE, WIDTH, COLUMNS, BIAS, 144>(o, rows, w, 0, false);
    add_keys<TYPE, WIDTH, COLUMNS, BIAS, 128>(o, rows, w, 144, last);
  } else if constexpr (WIDTH <= 96) {
    add_keys<TYPE, WIDTH, COLUMNS, BIAS, 96>(o, rows, w, 0, false);
    add_keys<TYPE, WIDTH, COLUMNS, BIAS, 96>(o, rows, w, 96, false);
    add_keys<TYPE, WIDTH, COLUMNS, BIAS, 80>(o, rows, w, 192, last);
  } else {
#pragma unroll 1
    for (int key = 0; key < 256; key += 64)
      add_keys<TYPE, WIDTH, COLUMNS, BIAS, 64>(o, rows, w, key, false);
    add_keys<TYPE, WIDTH, COLUMNS, BIAS, 16>(o, rows, w, 256, last);
  }
  store_rows<TYPE, 0, WIDTH / 8>(w.a, w.head, rows, w.row(),
                                 [&](int j, int i) { return o.at(j, i); });
}

// 16 query rows from `query` on, by one warp: 32 keys at a time, with a running maximum. Each of
// the two warps computes all scores, and HALF of the columns of the result.
template <DType TYPE, int WIDTH, int COLUMNS, BiasPlace BIAS, int HALF>
VK_DEVICE void multiply_tail(const Tile& q, const Tile& k, const Tile& v, const Args& a, int head,
                             const char* bias, int query, int key_rows) {
  constexpr int kParts = 2;  // of 16 keys
  constexpr int kSteps = WIDTH / 16, kFirst = HALF * ((kSteps + 1) / 2);
  constexpr int kMine = HALF == 0 ? (kSteps + 1) / 2 : kSteps - kFirst;  // steps of 16 columns
  const int lane = lane_index(), row = query + lane / 4;
  FragmentC o[2 * kMine] = {};
  Softmax rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
#pragma unroll 1
  for (int key = 0; key < a.Nk; key += 16 * kParts) {
    FragmentC products[2 * kParts] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      FragmentA fa;
      load_matrices(fa.r, chunk_at<WIDTH>(q, query + lane % 16, step, lane / 16));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {  // matrices: 8 keys (k low, k high), then 8 more
        const int first = key + part * 16;
        if (first >= key_rows) continue;
        uint32_t r[4];
        load_matrices(r, chunk_at<WIDTH>(k, first + lane / 16 * 8 + lane % 8, step, lane / 8 % 2));
        mma_m16n8k16<TYPE>(products[2 * part], fa, FragmentB{{r[0], r[1]}});
        mma_m16n8k16<TYPE>(products[2 * part + 1], fa, FragmentB{{r[2], r[3]}});
      }
    }
    float s[8 * kParts], top[2] = {-INFINITY, -INFINITY}, low[2], rescale[2];
#pragma unroll
    for (int i = 0; i < 8 * kParts; ++i) s[i] = products[i / 4].v[i % 4];
    const float by = finish_scores<BIAS>(s, top, a, head, bias, COLUMNS, query / 16, row, key);
    raise(rows, top, by, low, rescale);
    FragmentA p[kParts];
    exponentiate<TYPE>(p, s, rows, by, low);
#pragma unroll
    for (int j = 0; j < 2 * kMine; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[j].v[i] *= rescale[i / 2];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first = key + part * 16;
      if (first >= key_rows) continue;
#pragma unroll
      for (int n = 0; n < kMine; ++n) {  // matrices: 8 columns (keys low, high), then 8 more
        uint32_t r[4];
        load_matrices_transposed(
            r, chunk_at<WIDTH>(v, first + lane / 8 % 2 * 8 + lane % 8, kFirst + n, lane / 16));
        mma_m16n8k16<TYPE>(o[2 * n], p[part], FragmentB{{r[0], r[1]}});
        mma_m16n8k16<TYPE>(o[2 * n + 1], p[part], FragmentB{{r[2], r[3]}});
      }
    }
  }
  store_rows<TYPE, 2 * kFirst, 2 * kMine>(a, head, rows, row,
                                          [&](int j, int i) { return o[j].v[i]; });
}

// The work of one of the tail's two warps.
template <DType TYPE, int WIDTH, int COLUMNS, BiasPlace BIAS, int HALF>
VK_DEVICE void multiply_tails(const Shared& shared, Ring pairs, Ring values, const Args& a,
                              const char* bias, int query) {
  const int heads = a.B * a.H, step = static_cast<int>(gridDim.x);
  for (int i = static_cast<int>(blockIdx.x); i < heads; i += step) {
    mbarrier_wait(pairs.full + pairs.slot(), pairs.phase());
    mbarrier_wait(values.full + values.slot(), values.phase());
    multiply_tail<TYPE, WIDTH, COLUMNS, BIAS, HALF>(
        shared.query<WIDTH>(pairs.slot()), shared.key<WIDTH>(pairs.slot()),
        shared.value<WIDTH>(values.slot()), a, i, bias, query, shared.key_rows);
    __syncwarp();
    if (lane_index() == 0) {
      mbarrier_arrive(pairs.empty + pairs.slot());
      mbarrier_arrive(values.empty + values.slot());
    }
    pairs.advance();
    values.advance();
  }
}

// The bias of head h as fragments (bias_fragment), zeros where there is none.
VK_DEVICE void gather_bias(char* to, const Args& a, const Plan& p, int h) {
  const int blocks = p.columns / 8, count = p.query_rows / 16 * blocks * kWarp;
  for (int f = static_cast<int>(threadIdx.x); f < count; f += p.threads) {
    const int lane = f % kWarp, j = f / kWarp % blocks, block = f / kWarp / blocks;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = block * 16 + fragment_c_row(lane, i);
      const int column = 8 * j + fragment_c_column(lane, i);
      const bool inside = query < a.Nq && column < a.Nk;
      const int64_t at = h * a.bias.head + query * a.bias.row + column * a.bias.column;
      if (a.bias.dtype == DType::kF32)
        reinterpret_cast<float*>(to)[4 * f + i] =
            inside ? static_cast<const float*>(a.bias.data)[at] : 0.0f;
      else
        reinterpret_cast<uint16_t*>(to)[4 * f + i] =
            inside ? static_cast<const uint16_t*>(a.bias.data)[at] : uint16_t{0};
    }
  }
}

template <int WIDTH, int COLUMNS, BiasPlace BIAS>
constexpr int kGroups = consumer_groups(WIDTH, COLUMNS, BIAS);
template <int WIDTH, int COLUMNS, BiasPlace BIAS>
constexpr int kThreads = threads(kGroups<WIDTH, COLUMNS, BIAS>);

template <DType TYPE, int WIDTH, int COLUMNS, BiasPlace BIAS>
__global__ void __launch_bounds__(kThreads<WIDTH, COLUMNS, BIAS>, 1)
    forward_kernel(const __grid_constant__ Maps maps, Args a, Plan p) {
  check_launch_bounds<kThreads<WIDTH, COLUMNS, BIAS>>();
  constexpr int kConsumers = kGroups<WIDTH, COLUMNS, BIAS>;
  VK_SWIZZLED_SHARED(char, memory);
  const int warp = warp_index(), lane = lane_index();
  const int value = tile_bytes(p.key_rows, WIDTH);
  const int pair = tile_bytes(p.query_rows, WIDTH) + value;
  const Shared shared = {memory, memory + p.pair_stages * pair, p.query_rows, p.key_rows};
  char* bias = shared.values + p.value_stages * value;
  auto* barriers = reinterpret_cast<MBarrier*>(bias + p.bias_bytes);
  Ring pairs = {barriers, barriers + kMostStages, p.pair_stages};
  Ring values = {barriers + 2 * kMostStages, barriers + 3 * kMostStages, p.value_stages};

  if (threadIdx.x == 0) {
    const int readers = 4 * kConsumers + p.tail * kTailWarps;  // warps
    for (int i = 0; i < p.pair_stages; ++i)
      mbarrier_init(pairs.full + i, 1), mbarrier_init(pairs.empty + i, readers);
    for (int i = 0; i < p.value_stages; ++i)
      mbarrier_init(values.full + i, 1), mbarrier_init(values.empty + i, readers);
    mbarrier_fence_init();
  }
  if constexpr (BIAS == BiasPlace::kShared)
    gather_bias(bias, a, p, static_cast<int>(blockIdx.x % static_cast<unsigned>(a.H)));
  __syncthreads();

  if (warp < 4 * kConsumers) {
    take_registers<consumer_registers(kConsumers, WIDTH, COLUMNS)>();
    const int heads = a.B * a.H, step = static_cast<int>(gridDim.x);
    int tile = warp / 4, i = static_cast<int>(blockIdx.x);  // the warpgroup's next tile, of head i
    while (i < heads) {
      mbarrier_wait(pairs.full + pairs.slot(), pairs.phase());
      if (tile < p.tiles) {
        multiply_tile<TYPE, WIDTH, COLUMNS, BIAS>({shared, pairs, values, a, i, bias, tile},
                                                  tile + kConsumers >= p.tiles);
        tile += kConsumers;
      } else {  // another's head: seen all the same, so that no phase is missed
        mbarrier_wait(values.full + values.slot(), values.phase());
        if (lane == 0) mbarrier_arrive(pairs.empty + pairs.slot());
      }
      if (tile < p.tiles) continue;
      if (lane == 0) mbarrier_arrive(values.empty + values.slot());
      tile -= p.tiles;
      i += step;
      pairs.advance();
      values.advance();
    }
    return;
  }
  give_up_registers<other_registers(kConsumers, WIDTH, COLUMNS)>();
  if (warp == 4 * kConsumers) {
    if (lane == 0) load_heads<WIDTH>(shared, pairs, values, maps, a);
  } else if (p.tail && warp == 4 * kConsumers + 2) {
    multiply_tails<TYPE, WIDTH, COLUMNS, BIAS, 0>(shared, pairs, values, a, bias, p.tiles * kTile);
  } else if (p.tail && warp == 4 * kConsumers + 3) {
    multiply_tails<TYPE, WIDTH, COLUMNS, BIAS, 1>(shared, pairs, values, a, bias, p.tiles * kTile);
  }
}

// ---- Host

Plan plan_of(const Args& a, int multiprocessors) {
  const bool own = a.B > 1 && a.bias.batch != 0;
  const int size = a.bias.data == nullptr ? 0 : static_cast<int>(size_of(a.bias.dtype));
  return plan(a.B, a.H, a.Nq, a.Nk, a.D, size, own, multiprocessors);
}

template <DType TYPE, int WIDTH, BiasPlace BIAS>
void launch(const Device& device, const Args& a, const Plan& p) {
  constexpr int kFirst = Parts<WIDTH>::kFirst, kRest = Parts<WIDTH>::kRest;
  Maps maps{};
  const HeadView* const views[3] = {&a.q, &a.k, &a.v};
  for (int i = 0; i < 3; ++i) {
    const int N = i == 0 ? a.Nq : a.Nk, rows = i == 0 ? p.query_rows : p.key_rows;
    maps.first[i] = map_of(*views[i], a, N, rows, kFirst);
    if constexpr (kRest > 0) maps.rest[i] = map_of(*views[i], a, N, rows, kRest);
  }
  auto kernel = forward_kernel<TYPE, WIDTH, 200, BIAS>;
  if (p.columns == kMostRows) kernel = forward_kernel<TYPE, WIDTH, kMostRows, BIAS>;
  if constexpr (score_columns(WIDTH, 64) == 64)
    if (p.columns == 64) kernel = forward_kernel<TYPE, WIDTH, 64, BIAS>;
  if constexpr (score_columns(WIDTH, 144) == 144)
    if (p.columns == 144) kernel = forward_kernel<TYPE, WIDTH, 144, BIAS>;
  device.launch(kernel, dim3(static_cast<unsigned>(p.blocks)),
                dim3(static_cast<unsigned>(p.threads)), static_cast<size_t>(p.shared_bytes), maps,
                a, p);
}

template <DType TYPE, int WIDTH>
void launch(const Device& device, const Args& a, const Plan& p) {
  if constexpr (WIDTH <= most_width(true)) {
    if (p.bias_place == BiasPlace::kShared)
      return launch<TYPE, WIDTH, BiasPlace::kShared>(device, a, p);
    if (p.bias_place == BiasPlace::kGlobal)
      return launch<TYPE, WIDTH, BiasPlace::kGlobal>(device, a, p);
  }
  launch<TYPE, WIDTH, BiasPlace::kNone>(device, a, p);
}

template <DType TYPE>
void launch(const Device& device, const Args& a) {
  const Plan p = plan_of(a, device.multiprocessors());
  switch (p.width) {
    case 32:
      return launch<TYPE, 32>(device, a, p);
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

Refusal sm90_refuses_forward(const Args& a) {
  if (a.dtype == DType::kF32) return "it takes bf16 and fp16";
  if (a.Nq > kMostRows || a.Nk > kMostRows) return "it takes up to 272 queries and keys";
  if (static_cast<int64_t>(a.B) * a.H > INT32_MAX / 2) return "it takes up to 2^30 heads";
  if (a.D % 8 != 0 || a.D > 128) return "it takes head dims to 128 that are multiples of 8";
  if (a.bias.data != nullptr && a.D > most_width(true))
    return "it takes a bias with head dims to 80";
  if (a.dropout.seed != nullptr) return "it has no dropout";
  if (a.padding != nullptr) return "it has no key padding mask";
  if (a.bias.data != nullptr && a.bias.dtype == DType::kBool) return "it has no bool bias";
  if (a.bias.data != nullptr && a.bias.column != 0 && a.bias.column != 1)
    return "columns of the bias must be neighbours";
  if (!tma_takes(a.q, a, a.Nq) || !tma_takes(a.k, a, a.Nk) || !tma_takes(a.v, a, a.Nk))
    return "rows of q, k and v must begin on 16-byte lines, each on its own";
  return "";
}

void forward_sm90(const Device& device, const Tensor&, const Args& a) {
  if (a.dtype == DType::kBF16)
    launch<DType::kBF16>(device, a);
  else
    launch<DType::kF16>(device, a);
}

}  // namespace vitkernels::attention
