// Tiles of 16-bit tensor-core products as the lanes of a warp hold them [P: "Matrix Fragments for
// mma.m16n8k16 with floating point type"], for both builds. A register holds two neighbours, the
// lower index in the low half.
#pragma once

#include <cstdint>

#include "common/platform.cuh"

namespace vitkernels {

// Which index of an operand in shared memory runs fastest: k, or the row of A, column of B.
enum class Major { kK, kMN };

struct FragmentA {  // 16 rows x 16 k, two neighbours in k to a register
  uint32_t r[4];
};
struct FragmentB {  // 16 k x 8 columns, two neighbours in k to a register
  uint32_t r[2];
};
struct FragmentC {  // 16 rows x 8 columns
  float v[4];
};

// Of the first element in register i.
VK_DEVICE int fragment_a_row(int lane, int i) { return lane / 4 + i % 2 * 8; }
VK_DEVICE int fragment_a_k(int lane, int i) { return lane % 4 * 2 + i / 2 * 8; }
VK_DEVICE int fragment_b_k(int lane, int i) { return lane % 4 * 2 + i * 8; }
VK_DEVICE int fragment_b_column(int lane) { return lane / 4; }

// Of v[i]. wgmma's accumulators repeat this tile: v[i] of the j-th eight columns is c[4 * j + i].
VK_DEVICE int fragment_c_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
VK_DEVICE int fragment_c_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

}  // namespace vitkernels
