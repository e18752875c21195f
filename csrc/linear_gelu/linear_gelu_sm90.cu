// Products of linear_gelu on Hopper's tensor cores (wgmma, TMA): bf16 and fp16, both operands of
// the products' dtype, what TMA takes (unit strides along multiples of 8, 16-byte lines).
//
// A block stays and goes through tiles of 128 x 128 results. One warp brings 64 k of A and B at a
//   time by TMA into a ring of four stages; two warpgroups take the tiles in turn (ping-pong), 128
//   x 128 sums in 128 registers each: while one multiplies, the other adds the bias, takes GELU and
//   sends its results away, so that tensor cores wait for neither. One begins when the other has
//   seen all its stages: who waits for a stage's next phase must know that the one before is over.
// Blocks come in pairs (clusters), which have two tiles of the same columns, one below the other:
//   each brings its own A and half of B to both, so that a step of 64 k is 24 KB from L2, not 32:
//   48 bytes a cycle and multiprocessor beside 512 cycles of products, where 64 would be more than
//   L2 is said to give (estimated, not measured). A stage is empty when both blocks have multiplied
//   it. Where pairs would leave more than a sixteenth of the tiles empty, each block is alone.
// Results in the products' dtype go through the warpgroup's own shared memory, swizzled, and out by
//   TMA, which cuts them at M and N; partial sums and fp32 go straight to global memory.
// Tiles go down eight rows (pairs) of tiles before they go right: their A and what the machine has
//   of B stay in L2.
// Floor: 790 TFLOP/s measured on an H200: ViT-B's fc1 (50,432 x 768 x 3072, 238 GFLOP) 301 us. A
//   tile is 12 steps of 512 cycles; exact GELU and conversion of 16,384 results are about 40
//   instructions of 128 lanes at 4 a cycle each: 5,100 cycles beside 6,144 of products.
// Grid: a block for each multiprocessor, 384 threads, 192 KB of shared memory. Not measured. Launch
// settings: linear_gelu_plan.h.
#include <algorithm>

#include "common/pair.cuh"
#include "common/wgmma.cuh"
#include "linear_gelu/linear_gelu_activation.cuh"
#include "linear_gelu/linear_gelu_cuda.h"
#include "linear_gelu/linear_gelu_plan.h"

namespace vitkernels::linear_gelu {
namespace {

constexpr int kRows = kSm90Tile.m, kColumns = kSm90Tile.n, kStep = kSm90Tile.k;
constexpr int kStages = kSm90Stages, kGroups = 2, kGroupThreads = 128;
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kPanel = 64 * 128;  // bytes of 64 rows of 128: a TMA box, half of an operand's stage
constexpr int kOperandBytes = 2 * kPanel;
constexpr int kTileGroup = 8;  // tiles down before one goes right
static_assert(sm90_stage_bytes() == 2 * kOperandBytes && kRows == 128 && kColumns == 128);

struct Maps {
  TensorMap a, b, h, y;
};

// What is done: item i of all pieces of K, a tile of each block of a cluster, below each other.
struct Work {
  int cluster;               // blocks
  int rows, columns, items;  // tiles of M, as many times as a cluster has, and N; all
  VK_DEVICE void find(int item, int rank, int* row, int* column, int* piece) const {
    const int of_piece = rows * columns;
    *piece = item / of_piece;
    const int tile = item % of_piece;
    const int group = tile / (kTileGroup * columns), inside = tile % (kTileGroup * columns);
    const int height =
        rows - group * kTileGroup < kTileGroup ? rows - group * kTileGroup : kTileGroup;
    *row = (group * kTileGroup + inside % height) * cluster + rank;
    *column = inside / height;
  }
  VK_DEVICE int steps_of(const ProductArgs& a, int piece) const {
    const int64_t left = a.K - piece * a.k_per_split;
    const int64_t k = left < a.k_per_split ? left : a.k_per_split;
    return static_cast<int>((k + kStep - 1) / kStep);
  }
};

// After `full`, a stage is there to read; after `empty`, to load into. At step i of all of the
// block's steps.
struct Ring {
  char* stages;
  MBarrier *full, *empty;
  int i = 0;

  VK_DEVICE int slot() const { return i % kStages; }
  VK_DEVICE int phase() const { return i / kStages % 2; }
  VK_DEVICE char* a() const { return stages + slot() * 2 * kOperandBytes; }
  VK_DEVICE char* b() const { return a() + kOperandBytes; }
};

// 128 rows from `row` on and 64 k from `k` on of A, as two boxes or one.
template <Major MAJOR>
VK_DEVICE void load_a(char* stage, const TensorMap& map, MBarrier* full, int row, int k) {
  if constexpr (MAJOR == Major::kK) {
    tma_load(stage, map, full, {k, row});
  } else {
    tma_load(stage, map, full, {row, k});
    tma_load(stage + kPanel, map, full, {row + 64, k});
  }
}
// The same of B as two boxes: both, or one for each block of the pair.
template <Major MAJOR>
VK_DEVICE void load_b(char* stage, const TensorMap& map, MBarrier* full, int column, int k,
                      const Pair& pair) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!pair.loads(half)) continue;
    const int first = MAJOR == Major::kK ? k : column + 64 * half,
              second = MAJOR == Major::kK ? column + 64 * half : k;
    tma_load_multicast(stage + half * kPanel, map, full, {first, second}, pair.all());
  }
}

// 16 k from 16 * step on: 64 rows of A, 128 columns of B. Rows past the first 64 are a panel on:
// with kK that is their place, with kMN the leading distance.
template <Major MAJOR>
VK_DEVICE WgmmaOperand operand(const char* stage, int step) {
  if constexpr (MAJOR == Major::kK)
    return advanced(wgmma_operand<Swizzle::k128>(stage, 16, 1024), 32 * step);
  else
    return wgmma_operand<Swizzle::k128>(stage + step * 16 * 128, kPanel, 1024);
}

// The results of a warpgroup in its own shared memory: two panels of 64 columns, rows of 128 bytes.
template <DType TYPE>
VK_DEVICE void stage_results(char* results, const float (&c)[kColumns / 2], int half) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp % 4;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int v = 0; v < 4; v += 2) {
      const int row = half * 64 + warp * 16 + fragment_c_row(lane, v);
      const int column = j * 8 + fragment_c_column(lane, v);
      const auto offset =
          static_cast<uint32_t>(column / 64 * kRows * 128 + row * 128 + column % 64 * 2);
      *reinterpret_cast<uint32_t*>(results + swizzled(Swizzle::k128, offset)) =
          pack<TYPE>(c[4 * j + v], c[4 * j + v + 1]);
    }
}

// In fp32: four lanes fill a sector.
VK_DEVICE void store_directly(const ProductArgs& a, const Out& out, const float (&c)[kColumns / 2],
                              int64_t first_row, int first_column, int piece) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp % 4;
#pragma unroll 1
  for (int upper = 0; upper < 2; ++upper) {
    const int64_t row = first_row + warp * 16 + fragment_c_row(lane, 2 * upper);
    if (row >= a.M) continue;
    const int column = first_column + fragment_c_column(lane, 0);
    float* const at = static_cast<float*>(out.data) + (piece * a.M + row) * out.stride + column;
    const int left = a.N - column;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      if (8 * j < left) at[8 * j] = upper ? c[4 * j + 2] : c[4 * j];
      if (8 * j + 1 < left) at[8 * j + 1] = upper ? c[4 * j + 3] : c[4 * j + 1];
    }
  }
}

template <DType TYPE, Major A_MAJOR, Major B_MAJOR>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ Maps maps, const __grid_constant__ ProductArgs a,
                   Work work) {
  check_launch_bounds<kThreads>();
  VK_SWIZZLED_SHARED(char, memory);
  char* const all_results = memory + kStages * 2 * kOperandBytes;
  auto* const barriers = reinterpret_cast<MBarrier*>(all_results + kGroups * sm90_result_bytes());
  Ring ring = {memory, barriers, barriers + kStages};
  const int thread = static_cast<int>(threadIdx.x), group = thread / kGroupThreads;
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i)
      mbarrier_init(ring.full + i, 1),
          mbarrier_init(ring.empty + i, 4 * work.cluster);  // a warpgroup's warps
    mbarrier_fence_init();
  }
  cluster_sync();
  const Pair pair = {work.cluster, cluster_rank()};
  const int first_item = static_cast<int>(blockIdx.x) / work.cluster,
            items_apart = static_cast<int>(gridDim.x) / work.cluster;

  int row, column, piece;
  if (group == kGroups) {  // the producer
    give_up_registers<56>();
    if (thread % kGroupThreads != 0) return;
    for (int item = first_item; item < work.items; item += items_apart) {
      work.find(item, pair.rank, &row, &column, &piece);
      const int steps = work.steps_of(a, piece);
      const int first_k = static_cast<int>(piece * a.k_per_split);
      for (int step = 0; step < steps; ++step, ++ring.i) {
        if (ring.i >= kStages) mbarrier_wait(ring.empty + ring.slot(), ring.phase() ^ 1);
        MBarrier* const full = ring.full + ring.slot();
        mbarrier_arrive_expect(full, 2 * kOperandBytes);
        const int k = first_k + step * kStep;
        load_a<A_MAJOR>(ring.a(), maps.a, full, row * kRows, k);
        load_b<B_MAJOR>(ring.b(), maps.b, full, column * kColumns, k, pair);
      }
    }
    return;
  }

  take_registers<224>();
  char* const results = all_results + group * sm90_result_bytes();
  const int lane = thread % kWarp;
  const bool first = thread % kGroupThreads == 0;
  bool sent = false;  // whether a store may still read `results`
  int turn = 0;
  for (int item = first_item; item < work.items; item += items_apart, turn ^= 1) {
    work.find(item, pair.rank, &row, &column, &piece);
    const int steps = work.steps_of(a, piece);
    if (turn != group) {  // the other's tile
      ring.i += steps;
      continue;
    }
    if (item != first_item) barrier_sync(3 + group, kGroups * kGroupThreads);
    float c[2][kColumns / 2];
    for (int step = 0; step < steps; ++step, ++ring.i) {
      mbarrier_wait(ring.full + ring.slot(), ring.phase());
      pin_registers(c[0]);
      wgmma_fence(c[1]);
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        const WgmmaOperand b = operand<B_MAJOR>(ring.b(), k);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          wgmma<TYPE, A_MAJOR, B_MAJOR>(c[half], operand<A_MAJOR>(ring.a() + half * kPanel, k), b,
                                        step > 0 || k > 0);
      }
      wgmma_commit();
      if (step > 0) {  // the products of the step before have read their stage
        wgmma_wait<1>();
        pair.release(ring.empty + (ring.i - 1) % kStages);
      }
    }
    if (item + items_apart < work.items)  // the other's turn
      barrier_arrive(3 + (group ^ 1), kGroups * kGroupThreads);
    wgmma_wait<0>(c[0]);
    pin_registers(c[1]);
    pair.release(ring.empty + (ring.i - 1) % kStages);

    const int first_column = column * kColumns;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const float bias = bias_at(a, first_column + 8 * j + fragment_c_column(lane, v));
        c[0][4 * j + v] += bias, c[0][4 * j + v + 2] += bias;
        c[1][4 * j + v] += bias, c[1][4 * j + v + 2] += bias;
      }
    const auto write = [&](const Out& out, const TensorMap& map) {
      if (out.dtype != TYPE) {
        store_directly(a, out, c[0], static_cast<int64_t>(row) * kRows, first_column, piece);
        store_directly(a, out, c[1], static_cast<int64_t>(row) * kRows + 64, first_column, piece);
        return;
      }
      if (sent) {
        if (first) wait_stores_read<0>();
        barrier_sync(1 + group, kGroupThreads);
      }
      stage_results<TYPE>(results, c[0], 0);
      stage_results<TYPE>(results, c[1], 1);
      fence_proxy_async();
      barrier_sync(1 + group, kGroupThreads);
      if (first) {
        tma_store(map, results, {first_column, row * kRows});
        if (first_column + 64 < a.N)
          tma_store(map, results + kRows * 128, {first_column + 64, row * kRows});
        commit_stores();
      }
      sent = true;
    };
    if (a.h.data != nullptr) write(a.h, maps.h);
    if (a.y.data != nullptr) {
      activate(c[0], a.activation);
      activate(c[1], a.activation);
      write(a.y, maps.y);
    }
  }
  if (first && sent) wait_stores<0>();
  cluster_sync();  // the other block may still release stages here
}

// ---- Host

// `columns` elements side by side, `rows` of them; boxes of 64 columns.
TensorMap map_of(const void* data, DType dtype, int64_t stride, int64_t rows, int64_t columns,
                 int box_rows) {
  return make_tensor_map(data, dtype,
                         {2,
                          {static_cast<int>(columns), static_cast<int>(rows)},
                          {1, rows == 1 ? ceil_divide(columns, 8) * 8 : stride},
                          {64, box_rows}},
                         Swizzle::k128);
}

// Boxes of so many rows with kK, of 64 k with kMN.
TensorMap operand_map(const Matrix& m, Major major, int64_t size, int64_t K, int box_rows) {
  return major == Major::kK ? map_of(m.data, m.dtype, m.stride, size, K, box_rows)
                            : map_of(m.data, m.dtype, m.stride, K, size, 64);
}

bool fits(const Matrix& m, int64_t columns, int64_t rows, DType dtype) {
  return m.dtype == dtype && columns % 8 == 0 && columns <= INT32_MAX && rows <= INT32_MAX &&
         (rows == 1 || (m.stride % 8 == 0 && m.stride > 0 && m.stride < int64_t{1} << 38)) &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

// Results that leave by TMA.
bool leaves(const Out& out, int N, DType dtype) {
  return out.data == nullptr || out.dtype == DType::kF32 ||
         (out.dtype == dtype && N % 8 == 0 && out.stride % 8 == 0);
}

template <DType TYPE>
void launch(const Device& device, const ProductArgs& a) {
  Maps maps{};
  maps.a = operand_map(a.a, a.a_major, a.M, a.K, kRows);
  maps.b = operand_map(a.b, a.b_major, a.N, a.K, kColumns / 2);
  if (a.h.data != nullptr && a.h.dtype == TYPE)
    maps.h = map_of(a.h.data, TYPE, a.h.stride, a.M, a.N, kRows);
  if (a.y.data != nullptr && a.y.dtype == TYPE)
    maps.y = map_of(a.y.data, TYPE, a.y.stride, a.M, a.N, kRows);
  const Sm90Plan p = sm90_plan(a.M, a.N, a.splits, device.multiprocessors());
  const Work work = {p.cluster, p.rows, p.columns, p.items};
  auto kernel = product_kernel<TYPE, Major::kK, Major::kK>;
  if (a.b_major == Major::kMN)
    kernel = a.a_major == Major::kK ? product_kernel<TYPE, Major::kK, Major::kMN>
                                    : product_kernel<TYPE, Major::kMN, Major::kMN>;
  device.launch_cluster(kernel, p.cluster, dim3(static_cast<unsigned>(p.blocks)), dim3(kThreads),
                        sm90_shared_bytes(), maps, a, work);
}

}  // namespace

Refusal sm90_refuses(const ProductArgs& a) {
  if (a.dtype == DType::kF32) return "tensor cores would round fp32";
  const bool a_fits =
      a.a_major == Major::kK ? fits(a.a, a.K, a.M, a.dtype) : fits(a.a, a.M, a.K, a.dtype);
  const bool b_fits =
      a.b_major == Major::kK ? fits(a.b, a.K, a.N, a.dtype) : fits(a.b, a.N, a.K, a.dtype);
  if (!a_fits || !b_fits) return "it takes rows of a multiple of 8 elements on 16-byte lines";
  if (!leaves(a.h, a.N, a.dtype) || !leaves(a.y, a.N, a.dtype))
    return "it writes fp32, or the products' dtype in rows of a multiple of 8 elements";
  if (tiles(kSm90Tile, a.M, a.N) * kMostSplits > INT32_MAX) return "it takes fewer than 2^28 tiles";
  return "";
}

void product_sm90(const Device& device, const ProductArgs& a) {
  if (a.dtype == DType::kBF16)
    launch<DType::kBF16>(device, a);
  else
    launch<DType::kF16>(device, a);
}

}  // namespace vitkernels::linear_gelu
