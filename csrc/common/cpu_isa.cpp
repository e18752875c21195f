#include "common/cpu_isa.h"

#include <cstdlib>
#include <cstring>

namespace vitkernels {
namespace {

CpuIsa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return CpuIsa::kAvx512Bf16;
  if (avx512) return CpuIsa::kAvx512;
  if (avx2) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kPortable;
}

CpuIsa resolve() {
  const CpuIsa highest = detect();
  const char* wanted = std::getenv("VITKERNELS_CPU_ISA");
  if (wanted == nullptr) return highest;
  for (int level = 0; level <= static_cast<int>(highest); ++level) {
    const CpuIsa isa = static_cast<CpuIsa>(level);
    if (std::strcmp(wanted, cpu_isa_name(isa)) == 0) return isa;
  }
  return highest;  // unknown (vitkernels._native warns) or above this CPU (`info` shows the level)
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = resolve();
  return isa;
}

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx512Bf16:
      return "avx512bf16";
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace vitkernels
