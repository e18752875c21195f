// The kernels of tile_sm80.cuh for tests/test_emulator_sm80.py, each with a C function that
// launches it and returns null or the error.
#include "exports.h"
#include "tile_sm80.cuh"

using namespace vitkernels;

namespace {

constexpr DType kHalves[] = {DType::kBF16, DType::kF16};

template <DType TYPE, bool SWIZZLED>
const char* product(int bug, const uint16_t* a, const uint16_t* b, float* c, int rows, int columns,
                    int depth) {
  const auto run = [&](auto kernel) {
    return launch(kernel, 1, 128, 2 * 64 * (SWIZZLED ? 128 : 144), a, b, c, rows, columns, depth);
  };
  switch (static_cast<Bug>(bug)) {
    case Bug::kBarrier:
      return run(product_kernel<TYPE, SWIZZLED, Bug::kBarrier>);
    case Bug::kFirstWait:
      return run(product_kernel<TYPE, SWIZZLED, Bug::kFirstWait>);
    case Bug::kLastWait:
      return run(product_kernel<TYPE, SWIZZLED, Bug::kLastWait>);
    case Bug::kSwizzle:
      return run(product_kernel<TYPE, SWIZZLED, Bug::kSwizzle>);
    case Bug::kLoadTail:
      return run(product_kernel<TYPE, SWIZZLED, Bug::kLoadTail>);
    case Bug::kStoreTail:
      return run(product_kernel<TYPE, SWIZZLED, Bug::kStoreTail>);
    default:
      return run(product_kernel<TYPE, SWIZZLED>);
  }
}

template <int N>
const char* load(bool transposed, const uint16_t* in, uint32_t* out) {
  return launch(transposed ? load_matrices_kernel<N, true> : load_matrices_kernel<N, false>, 1, 32,
                0, in, out);
}

template <int BYTES>
const char* copy(bool bug, const char* from, const int* source_bytes, char* to) {
  return launch(bug ? copy_async_kernel<BYTES, Bug::kLastWait> : copy_async_kernel<BYTES>, 1, 32, 0,
                from, source_bytes, to);
}

// ---- Misuse that the emulator refuses

__global__ void early_exit_mma_kernel() {
  if (threadIdx.x == 5) return;
  FragmentC c = {};
  mma_m16n8k16<DType::kBF16>(c, FragmentA{}, FragmentB{});
}

__global__ void misplaced_kernel(int kind, const char* global) {
  VK_SHARED(char, shared, [64]);
  char local[32] = {};
  uint32_t r[1];
  if (kind == 0) load_matrices(r, local);
  if (kind == 1) load_matrices(r, shared + 8);
  if (kind == 2) copy_async<16>(shared + 8, global);
  if (kind == 3) copy_async<8>(shared, global + 4);
  if (kind == 4) copy_async<16>(local, global);
  if (kind == 5) copy_async<4>(shared, global, 5);
  if (kind == 6) copy_async<16>(shared + 56, global);
  if (kind == 7) copy_async<16>(shared, global), commit_copies();
  if (kind == 8) barrier_sync(0, 32);
  if (kind == 9) barrier_sync(1, 48);
  if (kind == 10) barrier_sync(3, 64);
  if (kind == 11) barrier_sync(3, threadIdx.x == 0 ? 64 : 32);
}

}  // namespace

EXPORT mma(int type, const uint32_t* a, const uint32_t* b, float* c) {
  return launch(type == 0 ? mma_kernel<kHalves[0]> : mma_kernel<kHalves[1]>, 1, 32, 0, a, b, c);
}
EXPORT ldmatrix(int n, int transposed, const uint16_t* in, uint32_t* out) {
  return n == 1   ? load<1>(transposed != 0, in, out)
         : n == 2 ? load<2>(transposed != 0, in, out)
                  : load<4>(transposed != 0, in, out);
}
EXPORT movmatrix(const uint32_t* in, uint32_t* out) {
  return launch(transpose_matrix_kernel, 1, 32, 0, in, out);
}
EXPORT product(int type, int swizzled, int bug, const uint16_t* a, const uint16_t* b, float* c,
               int rows, int columns, int depth) {
  if (type == 0)
    return (swizzled != 0 ? product<kHalves[0], true>
                          : product<kHalves[0], false>)(bug, a, b, c, rows, columns, depth);
  return (swizzled != 0 ? product<kHalves[1], true>
                        : product<kHalves[1], false>)(bug, a, b, c, rows, columns, depth);
}
EXPORT copies(int bytes, int bug, const char* from, const int* source_bytes, char* to) {
  return bytes == 4   ? copy<4>(bug != 0, from, source_bytes, to)
         : bytes == 8 ? copy<8>(bug != 0, from, source_bytes, to)
                      : copy<16>(bug != 0, from, source_bytes, to);
}
EXPORT pairs(int bug, int rounds, int* out) {
  return launch(bug == 0   ? pairs_kernel<Bug::kNone>
                : bug == 1 ? pairs_kernel<Bug::kBarrier>
                           : pairs_kernel<Bug::kLastWait>,
                1, 128, 0, rounds, out);
}
EXPORT swizzle_offsets(int bytes, int n, uint32_t* out) {
  for (int i = 0; i < n; ++i) out[i] = swizzled(static_cast<Swizzle>(bytes), 16u * i);
  return nullptr;
}
EXPORT early_exit_mma(int threads) { return launch(early_exit_mma_kernel, 1, threads, 0); }
EXPORT misplaced(int kind, const char* global) {
  return launch(misplaced_kernel, 1, 32, 0, kind, global);
}
