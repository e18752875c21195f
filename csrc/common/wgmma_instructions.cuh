// The PTX of wgmma for every N, for wgmma.cuh: an asm statement names each of its registers, so
// each N has its own [P: wgmma.mma_async].
#pragma once

#include "common/dtype.h"
#include "common/fragment.cuh"
#include "common/platform.cuh"

namespace vitkernels {

// c (64 x N) = a b + (accumulate ? c : 0): from_shared with A in shared memory, from_registers with
// A in registers; operands in shared memory by their descriptors.
template <int N>
struct WgmmaInstruction;

// The accumulators' names in the text, and the accumulators themselves.
#define VK_NAMES_8 "%0, %1, %2, %3"
#define VK_NAMES_16 VK_NAMES_8 ", %4, %5, %6, %7"
#define VK_NAMES_24 VK_NAMES_16 ", %8, %9, %10, %11"
#define VK_NAMES_32 VK_NAMES_24 ", %12, %13, %14, %15"
#define VK_NAMES_40 VK_NAMES_32 ", %16, %17, %18, %19"
#define VK_NAMES_48 VK_NAMES_40 ", %20, %21, %22, %23"
#define VK_NAMES_56 VK_NAMES_48 ", %24, %25, %26, %27"
#define VK_NAMES_64 VK_NAMES_56 ", %28, %29, %30, %31"
#define VK_NAMES_72 VK_NAMES_64 ", %32, %33, %34, %35"
#define VK_NAMES_80 VK_NAMES_72 ", %36, %37, %38, %39"
#define VK_NAMES_88 VK_NAMES_80 ", %40, %41, %42, %43"
#define VK_NAMES_96 VK_NAMES_88 ", %44, %45, %46, %47"
#define VK_NAMES_104 VK_NAMES_96 ", %48, %49, %50, %51"
#define VK_NAMES_112 VK_NAMES_104 ", %52, %53, %54, %55"
#define VK_NAMES_120 VK_NAMES_112 ", %56, %57, %58, %59"
#define VK_NAMES_128 VK_NAMES_120 ", %60, %61, %62, %63"
#define VK_NAMES_136 VK_NAMES_128 ", %64, %65, %66, %67"
#define VK_NAMES_144 VK_NAMES_136 ", %68, %69, %70, %71"
#define VK_NAMES_152 VK_NAMES_144 ", %72, %73, %74, %75"
#define VK_NAMES_160 VK_NAMES_152 ", %76, %77, %78, %79"
#define VK_NAMES_168 VK_NAMES_160 ", %80, %81, %82, %83"
#define VK_NAMES_176 VK_NAMES_168 ", %84, %85, %86, %87"
#define VK_NAMES_184 VK_NAMES_176 ", %88, %89, %90, %91"
#define VK_NAMES_192 VK_NAMES_184 ", %92, %93, %94, %95"
#define VK_NAMES_200 VK_NAMES_192 ", %96, %97, %98, %99"
#define VK_NAMES_208 VK_NAMES_200 ", %100, %101, %102, %103"
#define VK_NAMES_216 VK_NAMES_208 ", %104, %105, %106, %107"
#define VK_NAMES_224 VK_NAMES_216 ", %108, %109, %110, %111"
#define VK_NAMES_232 VK_NAMES_224 ", %112, %113, %114, %115"
#define VK_NAMES_240 VK_NAMES_232 ", %116, %117, %118, %119"
#define VK_NAMES_248 VK_NAMES_240 ", %120, %121, %122, %123"
#define VK_NAMES_256 VK_NAMES_248 ", %124, %125, %126, %127"

#define VK_FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define VK_REGISTERS_8 VK_FOUR(0)
#define VK_REGISTERS_16 VK_REGISTERS_8, VK_FOUR(4)
#define VK_REGISTERS_24 VK_REGISTERS_16, VK_FOUR(8)
#define VK_REGISTERS_32 VK_REGISTERS_24, VK_FOUR(12)
#define VK_REGISTERS_40 VK_REGISTERS_32, VK_FOUR(16)
#define VK_REGISTERS_48 VK_REGISTERS_40, VK_FOUR(20)
#define VK_REGISTERS_56 VK_REGISTERS_48, VK_FOUR(24)
#define VK_REGISTERS_64 VK_REGISTERS_56, VK_FOUR(28)
#define VK_REGISTERS_72 VK_REGISTERS_64, VK_FOUR(32)
#define VK_REGISTERS_80 VK_REGISTERS_72, VK_FOUR(36)
#define VK_REGISTERS_88 VK_REGISTERS_80, VK_FOUR(40)
#define VK_REGISTERS_96 VK_REGISTERS_88, VK_FOUR(44)
#define VK_REGISTERS_104 VK_REGISTERS_96, VK_FOUR(48)
#define VK_REGISTERS_112 VK_REGISTERS_104, VK_FOUR(52)
#define VK_REGISTERS_120 VK_REGISTERS_112, VK_FOUR(56)
#define VK_REGISTERS_128 VK_REGISTERS_120, VK_FOUR(60)
#define VK_REGISTERS_136 VK_REGISTERS_128, VK_FOUR(64)
#define VK_REGISTERS_144 VK_REGISTERS_136, VK_FOUR(68)
#define VK_REGISTERS_152 VK_REGISTERS_144, VK_FOUR(72)
#define VK_REGISTERS_160 VK_REGISTERS_152, VK_FOUR(76)
#define VK_REGISTERS_168 VK_REGISTERS_160, VK_FOUR(80)
#define VK_REGISTERS_176 VK_REGISTERS_168, VK_FOUR(84)
#define VK_REGISTERS_184 VK_REGISTERS_176, VK_FOUR(88)
#define VK_REGISTERS_192 VK_REGISTERS_184, VK_FOUR(92)
#define VK_REGISTERS_200 VK_REGISTERS_192, VK_FOUR(96)
#define VK_REGISTERS_208 VK_REGISTERS_200, VK_FOUR(100)
#define VK_REGISTERS_216 VK_REGISTERS_208, VK_FOUR(104)
#define VK_REGISTERS_224 VK_REGISTERS_216, VK_FOUR(108)
#define VK_REGISTERS_232 VK_REGISTERS_224, VK_FOUR(112)
#define VK_REGISTERS_240 VK_REGISTERS_232, VK_FOUR(116)
#define VK_REGISTERS_248 VK_REGISTERS_240, VK_FOUR(120)
#define VK_REGISTERS_256 VK_REGISTERS_248, VK_FOUR(124)

#define VK_FROM_SHARED(N, TYPE, I0, I1, I2, I3, I4)                                             \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #I2                                           \
               ", 0; "                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                  \
               " "                                                                              \
               "{" VK_NAMES_##N "}, %" #I0 ", %" #I1 ", p, 1, 1, %" #I3 ", %" #I4 "; }"         \
               : VK_REGISTERS_##N                                                               \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(A_MAJOR == Major::kMN), \
                 "n"(B_MAJOR == Major::kMN)                                                     \
               : "memory")

#define VK_FROM_REGISTERS(N, TYPE, I0, I1, I2, I3, I4, I5, I6)                       \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #I5                                \
               ", 0; "                                                               \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE       \
               " "                                                                   \
               "{" VK_NAMES_##N "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 \
                                ", p, 1, 1, %" #I6 "; }"                             \
               : VK_REGISTERS_##N                                                    \
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "l"(b),         \
                 "r"(static_cast<int>(accumulate)), "n"(B_MAJOR == Major::kMN)       \
               : "memory")

// I0 and on: the numbers of the operands after N / 2 accumulators.
#define VK_WGMMA(N, I0, I1, I2, I3, I4, I5, I6)                                             \
  template <>                                                                               \
  struct WgmmaInstruction<N> {                                                              \
    template <DType TYPE, Major A_MAJOR, Major B_MAJOR>                                     \
    static VK_DEVICE void from_shared(float (&c)[N / 2], uint64_t a, uint64_t b,            \
                                      bool accumulate) {                                    \
      if constexpr (TYPE == DType::kBF16)                                                   \
        VK_FROM_SHARED(N, "bf16", I0, I1, I2, I3, I4);                                      \
      else                                                                                  \
        VK_FROM_SHARED(N, "f16", I0, I1, I2, I3, I4);                                       \
    }                                                                                       \
    template <DType TYPE, Major B_MAJOR>                                                    \
    static VK_DEVICE void from_registers(float (&c)[N / 2], const FragmentA& a, uint64_t b, \
                                         bool accumulate) {                                 \
      if constexpr (TYPE == DType::kBF16)                                                   \
        VK_FROM_REGISTERS(N, "bf16", I0, I1, I2, I3, I4, I5, I6);                           \
      else                                                                                  \
        VK_FROM_REGISTERS(N, "f16", I0, I1, I2, I3, I4, I5, I6);                            \
    }                                                                                       \
  };

VK_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
VK_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
VK_WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
VK_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
VK_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
VK_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
VK_WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
VK_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
VK_WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
VK_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
VK_WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
VK_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
VK_WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
VK_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
VK_WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
VK_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
VK_WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
VK_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
VK_WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
VK_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
VK_WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
VK_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
VK_WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
VK_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
VK_WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
VK_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
VK_WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
VK_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
VK_WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
VK_WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
VK_WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
VK_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

}  // namespace vitkernels
