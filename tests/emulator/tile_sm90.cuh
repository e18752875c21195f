// Kernels on the sm_90a primitives of csrc/common/, for tests/test_emulator_{sm90,tma}.py: run by
// the emulator, compiled by nvcc. A Bug takes one necessary thing away.
#pragma once

#include "common/tma.cuh"
#include "common/wgmma.cuh"

namespace vitkernels {

enum class Bug {
  kNone,
  kBarrier,       // after mbarrier_init, or before a thread reads what others wrote
  kLoadWait,      // for TMA
  kProxyFence,    // after ordinary stores
  kProductFence,  // wgmma_fence
  kProductWait,
  kSwizzle,
  kStoreWait,
  kEmptyWait,  // of the producer for the consumers
  kInitFence,
  kStoreTail,
  kEarlyFence,  // fence_proxy_async before the stores, not after
};

// Where A is when it is multiplied, and who brought it there.
enum class Source { kTma, kStores, kRegisters };

// A tile of 64 k in shared memory, as TMA leaves it: parts as wide as the swizzle (16 bytes without
// one), each `rows` rows of that width; with Major::kMN the rows are k's.
template <Swizzle SWIZZLE, Major MAJOR>
struct Tile {
  static constexpr int kWidth = SWIZZLE == Swizzle::kNone ? 16 : static_cast<int>(SWIZZLE);
  static constexpr int kColumns = kWidth / 2;

  // mn: rows of A or columns of B that the parts hold together.
  static constexpr int parts(int mn) {
    return MAJOR == Major::kK ? 64 / kColumns : (mn + kColumns - 1) / kColumns;
  }
  static constexpr int part_bytes(int mn) { return (MAJOR == Major::kK ? mn : 64) * kWidth; }
  static constexpr int bytes(int mn) { return parts(mn) * part_bytes(mn); }

  static VK_DEVICE void load(char* tile, const TensorMap& map, MBarrier* barrier, int mn, int k) {
    for (int part = 0; part < parts(mn); ++part) {
      if (MAJOR == Major::kK)
        tma_load(tile + part * part_bytes(mn), map, barrier, {k + part * kColumns, 0});
      else
        tma_load(tile + part * part_bytes(mn), map, barrier, {part * kColumns, k});
    }
  }

  // k from 16 * step on, of rows that begin at row 0.
  static VK_DEVICE WgmmaOperand operand(const char* tile, int mn, int step) {
    if (MAJOR == Major::kMN)  // 8 k's are 8 * kWidth bytes
      return SWIZZLE == Swizzle::kNone
                 ? wgmma_operand<SWIZZLE>(tile + step * 256, 128, part_bytes(mn))
                 : wgmma_operand<SWIZZLE>(tile + step * 16 * kWidth, part_bytes(mn), 8 * kWidth);
    if (SWIZZLE == Swizzle::kNone)
      return wgmma_operand<SWIZZLE>(tile + 2 * step * part_bytes(mn), part_bytes(mn), 128);
    const int part = step * 32 / kWidth;
    return advanced(wgmma_operand<SWIZZLE>(tile + part * part_bytes(mn), 16, 8 * kWidth),
                    step * 32 % kWidth);
  }
};

VK_DEVICE void store_accumulators(float* c, const float* sums, int n, int rows, int columns) {
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4,
            lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < n / 2; ++i) {
    const int row = warp * 16 + fragment_c_row(lane, i % 4);
    const int column = i / 4 * 8 + fragment_c_column(lane, i % 4);
    if (row < rows && column < columns) c[row * columns + column] = sums[i];
  }
}

// c = a b^T with a (rows <= 64, 64) and b (columns <= N, 64) of TYPE, kMN: (64, rows), (64,
// columns); c (rows, columns) fp32. One warpgroup, one tile.
template <DType TYPE, int N, Swizzle SWIZZLE, Major A_MAJOR, Major B_MAJOR, Source A, Bug BUG>
__global__ void __launch_bounds__(128)
    product_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                   const uint16_t* a, float* c, int rows, int columns) {
  check_launch_bounds<128>();
  using TileA = Tile<SWIZZLE, A_MAJOR>;
  using TileB = Tile<SWIZZLE, B_MAJOR>;
  VK_SWIZZLED_SHARED(char, a_tile);
  char* b_tile = a_tile + TileA::bytes(64);
  auto* loaded = reinterpret_cast<MBarrier*>(b_tile + TileB::bytes(N));
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;

  if (thread == 0) {
    mbarrier_init(loaded, 1);
    if (BUG != Bug::kInitFence) mbarrier_fence_init();
    mbarrier_arrive_expect(loaded, (A == Source::kTma ? TileA::bytes(64) : 0) + TileB::bytes(N));
    if (A == Source::kTma) TileA::load(a_tile, a_map, loaded, 64, 0);
    TileB::load(b_tile, b_map, loaded, N, 0);
  }
  if (A == Source::kStores) {
    if (BUG == Bug::kEarlyFence) fence_proxy_async();
    for (int i = thread; i < 64 * 32; i += 128) {  // two elements each, kK only
      const int row = i / 32, pair = i % 32, part = pair * 2 / TileA::kColumns;
      const auto offset = static_cast<uint32_t>(part * TileA::part_bytes(64) + row * TileA::kWidth +
                                                pair * 4 % TileA::kWidth);
      *reinterpret_cast<uint32_t*>(a_tile + swizzled(SWIZZLE, offset)) =
          row < rows ? reinterpret_cast<const uint32_t*>(a)[i] : 0;
    }
    if (BUG != Bug::kProxyFence && BUG != Bug::kEarlyFence) fence_proxy_async();
  }
  if (BUG != Bug::kBarrier) __syncthreads();
  if (BUG != Bug::kLoadWait) mbarrier_wait(loaded, 0);

  float sums[N / 2];
  FragmentA fragments[4];
  if (A == Source::kRegisters) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp * 16 + fragment_a_row(lane, i), k = step * 16 + fragment_a_k(lane, i);
        fragments[step].r[i] =
            row < rows ? *reinterpret_cast<const uint32_t*>(a + row * 64 + k) : 0;
      }
      pin_registers(fragments[step]);
    }
  }
  constexpr Swizzle kRead = BUG == Bug::kSwizzle ? Swizzle::k64 : SWIZZLE;
  if (BUG != Bug::kProductFence) wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const WgmmaOperand b = Tile<kRead, B_MAJOR>::operand(b_tile, N, step);
    if constexpr (A == Source::kRegisters)
      wgmma<TYPE, B_MAJOR>(sums, fragments[step], b, step > 0);
    else
      wgmma<TYPE, A_MAJOR, B_MAJOR>(sums, TileA::operand(a_tile, 64, step), b, step > 0);
  }
  wgmma_commit();
  if (BUG != Bug::kProductWait) wgmma_wait<0>(sums);
  store_accumulators(c, sums, N, BUG == Bug::kStoreTail ? 64 : rows, columns);
  if (BUG == Bug::kProductWait) wgmma_wait<0>(sums);
  if (BUG == Bug::kLoadWait) mbarrier_wait(loaded, 0);
}

// wgmma as the PTX manual has it: A (64 x 16) from registers, a lane's side by side, or from bytes
// in shared memory with these strides; B (N x 16) is there after it, eight k after eight, without
// swizzle. Shows each thread's accumulators.
template <int N, Swizzle SWIZZLE, Major A_MAJOR>
__global__ void __launch_bounds__(128)
    raw_product_kernel(const uint32_t* a_registers, const char* a, int a_bytes, int leading,
                       int stride, const char* b, float* sums_out) {
  check_launch_bounds<128>();
  VK_SWIZZLED_SHARED(char, tile);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < a_bytes; i += 128) tile[i] = a[i];
  for (int i = thread; i < N * 32; i += 128) tile[a_bytes + i] = b[i];
  fence_proxy_async();
  __syncthreads();
  float sums[N / 2];
  FragmentA fragment = {};
  if (a_registers != nullptr)
    for (int i = 0; i < 4; ++i) fragment.r[i] = a_registers[thread * 4 + i];
  const WgmmaOperand operand = wgmma_operand<Swizzle::kNone>(tile + a_bytes, N * 16, 128);
  pin_registers(fragment);
  wgmma_fence();
  if (a_registers != nullptr)
    wgmma<DType::kBF16>(sums, fragment, operand, false);
  else
    wgmma<DType::kBF16, A_MAJOR>(sums, wgmma_operand<SWIZZLE>(tile, leading, stride), operand,
                                 false);
  wgmma_commit();
  wgmma_wait<0>(sums);
  for (int i = 0; i < N / 2; ++i) sums_out[thread * (N / 2) + i] = sums[i];
}

// c (64, 64) = a b^T with a and b (64, depth), depth a multiple of 64: a warpgroup loads, another
// multiplies, two buffers between them, `full` and `empty` barriers for each.
template <Bug BUG = Bug::kNone>
__global__ void __launch_bounds__(256, 1)
    pipeline_kernel(const __grid_constant__ TensorMap a_map,
                    const __grid_constant__ TensorMap b_map, float* c, int depth) {
  check_launch_bounds<256>();
  using TileK = Tile<Swizzle::k128, Major::kK>;
  constexpr int kStage = 2 * TileK::bytes(64);
  VK_SWIZZLED_SHARED(char, stages);
  VK_SHARED(MBarrier, full, [2]);
  VK_SHARED(MBarrier, empty, [2]);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int stage = 0; stage < 2; ++stage)
      mbarrier_init(&full[stage], 1), mbarrier_init(&empty[stage], 128);
    mbarrier_fence_init();
  }
  __syncthreads();

  if (thread >= 128) {  // the producer
    give_up_registers<24>();
    if (thread == 128) {
      for (int i = 0; i < depth / 64; ++i) {
        const int stage = i % 2, round = i / 2;
        if (BUG != Bug::kEmptyWait)  // the first round finds the buffers empty
          while (!mbarrier_try_wait(&empty[stage], (round + 1) % 2)) {
          }
        mbarrier_arrive_expect(&full[stage], kStage);
        TileK::load(stages + stage * kStage, a_map, &full[stage], 64, i * 64);
        TileK::load(stages + stage * kStage + kStage / 2, b_map, &full[stage], 64, i * 64);
      }
    }
    return;
  }
  take_registers<240>();
  float sums[32];
  for (int i = 0; i < depth / 64; ++i) {
    const int stage = i % 2, round = i / 2;
    if (BUG != Bug::kLoadWait) mbarrier_wait(&full[stage], round % 2);
    wgmma_fence(sums);
#pragma unroll
    for (int step = 0; step < 4; ++step)
      wgmma<DType::kBF16>(sums, TileK::operand(stages + stage * kStage, 64, step),
                          TileK::operand(stages + stage * kStage + kStage / 2, 64, step),
                          i > 0 || step > 0);
    wgmma_commit();
    if (BUG != Bug::kProductWait) wgmma_wait<0>(sums);
    mbarrier_arrive(&empty[stage]);
  }
  if (BUG == Bug::kProductWait) wgmma_wait<0>(sums);
  store_accumulators(c, sums, 64, 64, 64);
}

// Loads a box at `from`, shows how it lies in shared memory, and stores it at `to`. The coordinates
// are the first RANK of the five.
struct Coordinates {
  int at[5];
};
template <int RANK>
__global__ void copy_tensor_kernel(const __grid_constant__ TensorMap from_map,
                                   const __grid_constant__ TensorMap to_map, Coordinates from,
                                   Coordinates to, int bytes, char* seen) {
  VK_SWIZZLED_SHARED(char, box);
  VK_SHARED(MBarrier, loaded, [1]);
  int source[RANK], target[RANK];
  for (int i = 0; i < RANK; ++i) source[i] = from.at[i], target[i] = to.at[i];
  if (threadIdx.x == 0) {
    mbarrier_init(loaded, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(loaded, bytes);
    tma_load(box, from_map, loaded, source);
  }
  __syncthreads();
  mbarrier_wait(loaded, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += static_cast<int>(blockDim.x))
    seen[i] = box[i];
  if (threadIdx.x == 0) {
    tma_store(to_map, box, target);
    commit_stores();
    wait_stores<0>();
    mbarrier_invalidate(loaded);
  }
}

// Doubles (32, 32) floats: ordinary stores to shared memory, then one box from there; then adds 1,
// from the same buffer, and stores that to `second`.
template <Bug BUG = Bug::kNone>
__global__ void __launch_bounds__(128)
    store_kernel(const float* in, const __grid_constant__ TensorMap first,
                 const __grid_constant__ TensorMap second) {
  check_launch_bounds<128>();
  VK_SWIZZLED_SHARED(float, box);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 1024; i += 128) box[i] = 2.0f * in[i];
  if (BUG != Bug::kProxyFence) fence_proxy_async();
  if (BUG != Bug::kBarrier) __syncthreads();
  if (thread == 0) {
    tma_store(first, box, {0, 0});
    commit_stores();
    if (BUG != Bug::kStoreWait) wait_stores_read<0>();
  }
  __syncthreads();
  for (int i = thread; i < 1024; i += 128) box[i] = 2.0f * in[i] + 1.0f;
  fence_proxy_async();
  __syncthreads();
  if (thread == 0) {
    tma_store(second, box, {0, 0});
    commit_stores();
    wait_stores<0>();
  }
}

}  // namespace vitkernels
