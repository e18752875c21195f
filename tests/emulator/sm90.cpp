// The kernels of tile_sm90.cuh for tests/test_emulator_{sm90,tma}.py, each with a C function that
// launches it and returns null or the error.
#include "exports.h"
#include "tile_sm90.cuh"

using namespace vitkernels;

namespace {

// A matrix (rows, columns) in parts of `width` bytes, as Tile::load takes them.
TensorMap part_map(const void* data, DType type, int rows, int columns, int pitch, int box_rows,
                   Swizzle swizzle) {
  const int width = swizzle == Swizzle::kNone ? 16 : static_cast<int>(swizzle);
  return make_tensor_map(data, type, {2, {columns, rows}, {1, pitch}, {width / 2, box_rows}},
                         swizzle);
}

template <DType TYPE, int N, Swizzle SWIZZLE, Major A_MAJOR, Major B_MAJOR, Source A,
          Bug BUG = Bug::kNone>
const char* product(const uint16_t* a, const uint16_t* b, float* c, int rows, int columns) {
  const auto map = [](const uint16_t* data, Major major, int mn, int box) {
    return major == Major::kK ? part_map(data, TYPE, mn, 64, 64, box, SWIZZLE)
                              : part_map(data, TYPE, 64, mn, (mn + 7) / 8 * 8, 64, SWIZZLE);
  };
  const size_t bytes = Tile<SWIZZLE, A_MAJOR>::bytes(64) + Tile<SWIZZLE, B_MAJOR>::bytes(N) + 8;
  return launch(product_kernel<TYPE, N, SWIZZLE, A_MAJOR, B_MAJOR, A, BUG>, 1, 128, bytes,
                map(a, A_MAJOR, rows, 64), map(b, B_MAJOR, columns, N), a, c, rows, columns);
}

using Product = const char* (*)(const uint16_t*, const uint16_t*, float*, int, int);
constexpr auto kB = DType::kBF16, kF = DType::kF16;
constexpr auto k0 = Swizzle::kNone, k32 = Swizzle::k32, k64 = Swizzle::k64, k128 = Swizzle::k128;
constexpr auto kK = Major::kK, kMN = Major::kMN;
constexpr auto kTma = Source::kTma, kStores = Source::kStores, kRegisters = Source::kRegisters;

// In the order of PRODUCTS in the test.
constexpr Product kProducts[] = {
    product<kB, 64, k128, kK, kK, kTma>,        product<kF, 64, k128, kK, kK, kTma>,
    product<kB, 64, k64, kK, kK, kTma>,         product<kB, 64, k32, kK, kK, kTma>,
    product<kB, 64, k0, kK, kK, kTma>,          product<kB, 64, k128, kMN, kMN, kTma>,
    product<kF, 64, k64, kMN, kMN, kTma>,       product<kB, 64, k32, kK, kMN, kTma>,
    product<kB, 64, k0, kMN, kMN, kTma>,        product<kB, 8, k128, kK, kK, kTma>,
    product<kB, 136, k64, kK, kMN, kRegisters>, product<kF, 256, k128, kK, kK, kRegisters>,
    product<kB, 64, k128, kK, kK, kStores>,     product<kB, 24, k32, kMN, kK, kTma>,
    product<kB, 200, k0, kK, kMN, kRegisters>,
};

template <Bug BUG, Source A = kTma>
constexpr Product kWith = product<kB, 64, k128, kK, kK, A, BUG>;

Product product_with(Bug bug) {
  switch (bug) {
    case Bug::kBarrier:
      return kWith<Bug::kBarrier, kStores>;
    case Bug::kLoadWait:
      return kWith<Bug::kLoadWait>;
    case Bug::kProxyFence:
      return kWith<Bug::kProxyFence, kStores>;
    case Bug::kEarlyFence:
      return kWith<Bug::kEarlyFence, kStores>;
    case Bug::kProductFence:
      return kWith<Bug::kProductFence>;
    case Bug::kProductWait:
      return kWith<Bug::kProductWait>;
    case Bug::kSwizzle:
      return kWith<Bug::kSwizzle>;
    case Bug::kInitFence:
      return kWith<Bug::kInitFence>;
    default:
      return kWith<Bug::kStoreTail>;
  }
}

template <Bug BUG>
const char* pipeline(const uint16_t* a, const uint16_t* b, float* c, int depth) {
  return launch(pipeline_kernel<BUG>, 1, 256, 4 * 64 * 128,
                part_map(a, kB, 64, depth, depth, 64, k128),
                part_map(b, kB, 64, depth, depth, 64, k128), c, depth);
}

template <Bug BUG>
const char* store(const float* in, float* first, float* second) {
  const auto map = [](float* data) {
    return make_tensor_map(data, DType::kF32, {2, {32, 32}, {1, 32}, {32, 32}}, Swizzle::kNone);
  };
  return launch(store_kernel<BUG>, 1, 128, 4096, in, map(first), map(second));
}

// ---- Misuse that the emulator refuses: one warpgroup, or fewer threads, and a map of (64, 64)
// bf16

__global__ void misuse_kernel(int kind, const __grid_constant__ TensorMap map) {
  VK_SWIZZLED_SHARED(char, tile);
  VK_SHARED(MBarrier, barrier, [1]);
  const unsigned thread = threadIdx.x;
  float sums[32] = {};
  const WgmmaOperand operand = wgmma_operand<Swizzle::k128>(tile, 16, 1024);
  const auto multiply = [&](WgmmaOperand a) {
    wgmma_fence(sums);
    wgmma<kB>(sums, a, operand, true);
    wgmma_commit();
  };
  if (kind >= 20) {  // products
    if (kind == 20) multiply(advanced(operand, thread < 32 ? 32 : 0));
    if (kind == 21) multiply(operand), sums[3] = 1.0f;
    if (kind == 22) multiply(operand), tile[8192 - 1 - thread] = 1;
    if (kind == 23) multiply(wgmma_operand<Swizzle::k128>(tile + 8192, 16, 1024));
    if (kind == 24) multiply(wgmma_operand<Swizzle::k128>(tile + 128, 16, 1024));
    if (kind == 25) return multiply(operand);
    if (kind == 26 && thread < 96) multiply(operand);
    if (kind == 27) multiply(advanced(operand, thread == 5 ? 32 : 0));
    if (kind == 28) wgmma_fence();
    if (kind == 29) wgmma_operand<Swizzle::k128>(tile, 16, 1000);
    if (kind == 30 && thread < 64) give_up_registers<40>();
    if (kind == 31) wgmma_fence(sums), wgmma_wait<0>(sums), wgmma<kB>(sums, operand, operand, true);
    wgmma_wait<0>(sums);
    return;
  }
  if (kind != 0 && thread == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (kind == 0) mbarrier_wait(barrier, 0);
  if (thread != 0) return;
  if (kind == 1) mbarrier_init(barrier, 1);
  if (kind == 2) mbarrier_init(barrier + 1, 1);
  if (kind == 3) barrier->state = 0, mbarrier_arrive(barrier);
  if (kind == 4) mbarrier_wait(barrier, 0);
  if (kind == 5)
    while (!mbarrier_try_wait(barrier, 0)) {
    }
  if (kind == 6) mbarrier_arrive_expect(barrier, 100), mbarrier_arrive(barrier);
  if (kind == 7) mbarrier_arrive_expect(barrier, 1 << 20);
  if (kind == 8) tma_load(tile + 128, map, barrier, {0, 0});
  if (kind == 9) tma_load(tile + 1024, map, barrier, {0, 0});
  if (kind == 10) tma_load(tile, map, barrier, {0, 0, 0});
  if (kind == 11) mbarrier_arrive_expect(barrier, 8192), tma_load(tile, map, barrier, {0, 0});
  if (kind == 12) tma_load(tile, map, barrier, {0, 0}), mbarrier_invalidate(barrier);
  if (kind == 13) tma_store(map, tile, {0, 0});
  if (kind == 14) {
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, 0), mbarrier_wait(barrier, 1);
  }
  if (kind == 15) mbarrier_invalidate(barrier), mbarrier_arrive(barrier);
  if (kind == 16) {  // one byte less than comes
    mbarrier_arrive_expect(barrier, 8191), tma_load(tile, map, barrier, {0, 0});
    mbarrier_wait(barrier, 0);
  }
  if (kind == 17) {
    mbarrier_arrive_expect(barrier, 8192), tma_load(tile, map, barrier, {0, 0});
    tile[100] = 1;
    mbarrier_wait(barrier, 0);
  }
}

}  // namespace

EXPORT product(int index, const uint16_t* a, const uint16_t* b, float* c, int rows, int columns) {
  return kProducts[index](a, b, c, rows, columns);
}
EXPORT descriptor(int swizzle, uint32_t start, int leading, int stride, int later, uint64_t* bits) {
  const auto mode = static_cast<Swizzle>(swizzle);
  *bits = advanced(wgmma_descriptor(mode, start, leading, stride), later).bits;
  return nullptr;
}
EXPORT raw_product(int swizzle, int a_along_mn, const uint32_t* a_registers, const char* a,
                   int a_bytes, int leading, int stride, const char* b, float* sums) {
  const auto run = [&](auto kernel) {
    return launch(kernel, 1, 128, static_cast<size_t>(a_bytes) + 16 * 32, a_registers, a, a_bytes,
                  leading, stride, b, sums);
  };
  if (a_along_mn != 0)
    return swizzle == 0    ? run(raw_product_kernel<16, k0, kMN>)
           : swizzle == 32 ? run(raw_product_kernel<16, k32, kMN>)
           : swizzle == 64 ? run(raw_product_kernel<16, k64, kMN>)
                           : run(raw_product_kernel<16, k128, kMN>);
  return swizzle == 0    ? run(raw_product_kernel<16, k0, kK>)
         : swizzle == 32 ? run(raw_product_kernel<16, k32, kK>)
         : swizzle == 64 ? run(raw_product_kernel<16, k64, kK>)
                         : run(raw_product_kernel<16, k128, kK>);
}
EXPORT wrong_product(int bug, const uint16_t* a, const uint16_t* b, float* c, int rows,
                     int columns) {
  return product_with(static_cast<Bug>(bug))(a, b, c, rows, columns);
}
EXPORT pipeline(int bug, const uint16_t* a, const uint16_t* b, float* c, int depth) {
  return (bug == static_cast<int>(Bug::kLoadWait)      ? pipeline<Bug::kLoadWait>
          : bug == static_cast<int>(Bug::kProductWait) ? pipeline<Bug::kProductWait>
          : bug == static_cast<int>(Bug::kEmptyWait)   ? pipeline<Bug::kEmptyWait>
                                                       : pipeline<Bug::kNone>)(a, b, c, depth);
}
EXPORT store(int bug, const float* in, float* first, float* second) {
  return (bug == static_cast<int>(Bug::kProxyFence)  ? store<Bug::kProxyFence>
          : bug == static_cast<int>(Bug::kBarrier)   ? store<Bug::kBarrier>
          : bug == static_cast<int>(Bug::kStoreWait) ? store<Bug::kStoreWait>
                                                     : store<Bug::kNone>)(in, first, second);
}

// Copies a box of a tensor of `rank` dimensions with these sizes from coordinates `from` to
// coordinates `to` of another such tensor. DType 0 fp32, 1 bf16.
EXPORT copy_tensor(int rank, int dtype, int swizzle, const int64_t* sizes, const int64_t* strides,
                   const int* box, const int* from, const int* to, const void* source, void* target,
                   char* seen) {
  static std::string message;
  TensorLayout layout{rank, {}, {}, {}};
  Coordinates source_at{}, target_at{};
  int bytes = dtype == 0 ? 4 : 2;
  for (int i = 0; i < rank; ++i) {
    layout.sizes[i] = sizes[i], layout.strides[i] = strides[i], layout.box[i] = box[i];
    source_at.at[i] = from[i], target_at.at[i] = to[i];
    bytes *= box[i];
  }
  try {
    const auto mode = static_cast<Swizzle>(swizzle);
    const auto type = static_cast<DType>(dtype);
    const TensorMap in = make_tensor_map(source, type, layout, mode);
    const TensorMap out = make_tensor_map(target, type, layout, mode);
    const auto run = [&](auto kernel) {
      return launch(kernel, 1, 64, static_cast<size_t>(bytes), in, out, source_at, target_at, bytes,
                    seen);
    };
    return rank == 2   ? run(copy_tensor_kernel<2>)
           : rank == 3 ? run(copy_tensor_kernel<3>)
           : rank == 4 ? run(copy_tensor_kernel<4>)
                       : run(copy_tensor_kernel<5>);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

EXPORT misuse(int kind, int threads, const uint16_t* data) {
  const TensorMap map = part_map(data, kB, 64, 64, 64, 64, k128);
  return launch(misuse_kernel, 1, threads, 8704, kind, map);
}
