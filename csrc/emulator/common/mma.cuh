// The emulator's twin of csrc/common/mma.cuh.
//
// References: [P] PTX ISA, section or instruction named.
#pragma once

#include "common/dtype.h"
#include "common/fragment.cuh"
#include "common/platform.cuh"

namespace vitkernels {

namespace emulator {

template <DType TYPE>
float half_of(uint32_t pair, int which) {
  const uint32_t bits = pair >> which * 16 & 0xffff;
  return TYPE == DType::kBF16 ? bits_to_float(bits << 16) : from_f16(bits);
}

// The manual leaves the order of the sum and its inner rounding open. Here: one fp32 addition after
// another, in k's order, each rounded to nearest. (The products of 16-bit numbers are exact in
// fp32, so a fused multiply-add gives the same.)
template <DType TYPE>
struct Mma {
  FragmentC* c;
  const FragmentA* a;
  const FragmentB* b;

  static void finish(void* const* records) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* mine = static_cast<const Mma*>(records[lane]);
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          a[fragment_a_row(lane, i)][fragment_a_k(lane, i) + half] =
              half_of<TYPE>(mine->a->r[i], half);
        for (int i = 0; i < 2; ++i)
          b[fragment_b_k(lane, i) + half][fragment_b_column(lane)] =
              half_of<TYPE>(mine->b->r[i], half);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        float& sum = static_cast<const Mma*>(records[lane])->c->v[i];
        for (int k = 0; k < 16; ++k)
          sum += a[fragment_c_row(lane, i)][k] * b[k][fragment_c_column(lane, i)];
      }
  }
};

template <int N, bool TRANSPOSED>
struct LoadMatrices {
  const void* row;
  uint32_t* r;

  static void finish(void* const* records) {
    for (int i = 0; i < N; ++i) {
      uint16_t matrix[8][8];
      for (int j = 0; j < 8; ++j)
        std::memcpy(matrix[j], static_cast<const LoadMatrices*>(records[8 * i + j])->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int major = lane / 4, minor = lane % 4 * 2;
        const uint32_t low = TRANSPOSED ? matrix[minor][major] : matrix[major][minor];
        const uint32_t high = TRANSPOSED ? matrix[minor + 1][major] : matrix[major][minor + 1];
        static_cast<const LoadMatrices*>(records[lane])->r[i] = low | high << 16;
      }
    }
  }

  static void run(const char* what, uint32_t (&r)[N], const void* row, Place place) {
    static_assert(N == 1 || N == 2 || N == 4, "1, 2 or 4 matrices");
    if (lane() < 8 * N) shared_offset(what, row, 16, 16, place);
    LoadMatrices record{row, r};
    meet_whole_warp(what, &record, &finish, place);
  }
};

struct TransposeMatrix {
  uint32_t given, received;

  static void finish(void* const* records) {
    const auto at = [&](int row, int column) {
      const auto* of = static_cast<const TransposeMatrix*>(records[row * 4 + column / 2]);
      return of->given >> column % 2 * 16 & 0xffff;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane % 4 * 2, column = lane / 4;
      static_cast<TransposeMatrix*>(records[lane])->received = at(row, column) | at(row + 1, column)
                                                                                     << 16;
    }
  }
};

}  // namespace emulator

// [P: mma, "mma.m16n8k16"]
template <DType TYPE>
void mma_m16n8k16(FragmentC& c, const FragmentA& a, const FragmentB& b,
                  VkPlace place = VkPlace::here()) {
  static_assert(TYPE == DType::kBF16 || TYPE == DType::kF16, "16-bit operands");
  emulator::Mma<TYPE> record{&c, &a, &b};
  emulator::meet_whole_warp("mma_m16n8k16", &record, &record.finish, place);
}

// [P: ldmatrix]
template <int N>
void load_matrices(uint32_t (&r)[N], const void* row, VkPlace place = VkPlace::here()) {
  emulator::LoadMatrices<N, false>::run("load_matrices", r, row, place);
}
template <int N>
void load_matrices_transposed(uint32_t (&r)[N], const void* row, VkPlace place = VkPlace::here()) {
  emulator::LoadMatrices<N, true>::run("load_matrices_transposed", r, row, place);
}

// [P: movmatrix]
inline uint32_t transpose_matrix(uint32_t pair, VkPlace place = VkPlace::here()) {
  emulator::TransposeMatrix record{pair, 0};
  emulator::meet_whole_warp("transpose_matrix", &record, &record.finish, place);
  return record.received;
}

}  // namespace vitkernels
