// Tensor-core products of a warp, and the loads that feed them (sm_80). The emulator's twin is
// csrc/emulator/common/mma.cuh.
//
// References: [P] PTX ISA, section or instruction named.
#pragma once

#include "common/dtype.h"
#include "common/fragment.cuh"
#include "common/platform.cuh"

namespace vitkernels {

// c += a b with exact products and fp32 sums in an order the hardware chooses [P: mma,
// "mma.m16n8k16"]. All lanes of the warp.
template <DType TYPE>
VK_DEVICE void mma_m16n8k16(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  static_assert(TYPE == DType::kBF16 || TYPE == DType::kF16, "16-bit operands");
  if constexpr (TYPE == DType::kBF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
}

// ---- N = 1, 2 or 4 matrices of 8 rows of 8 16-bit elements from shared memory [P: ldmatrix].
// Lane 8 * i + j gives the address of row j of matrix i, on a 16-byte line; the addresses of lanes
// from 8 * N on are not used. Lane l receives in r[i] the elements 2 * (l % 4) and the next of row
// l / 4 of matrix i; transposed, of its column l / 4. All lanes of the warp.

template <int N>
VK_DEVICE void load_matrices(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "1, 2 or 4 matrices");
  const uint32_t from = shared_address(row);
  if constexpr (N == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(from)
                 : "memory");
  else if constexpr (N == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

template <int N>
VK_DEVICE void load_matrices_transposed(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "1, 2 or 4 matrices");
  const uint32_t from = shared_address(row);
  if constexpr (N == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(from)
                 : "memory");
  else if constexpr (N == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

// The transpose of a matrix of 8 x 8 16-bit elements that the warp has in registers, a word a lane:
// lane l gives the elements 2 * (l % 4) and the next of row l / 4, and receives those of column
// l / 4 [P: movmatrix]. All lanes of the warp.
VK_DEVICE uint32_t transpose_matrix(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

}  // namespace vitkernels
