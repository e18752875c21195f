// Which instruction set the CPU kernels use, decided once per process.
//
// Kernel files are compiled once per level, with VK_ISA set to the level's name; each exports one
// table accessor, VK_ISA_TABLE(<op>). The launcher picks a table with VK_PICK_TABLE(<op>).
#pragma once

namespace vitkernels {

enum class CpuIsa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The highest level that this build contains and this CPU runs, lowered by VITKERNELS_CPU_ISA.
CpuIsa cpu_isa();
const char* cpu_isa_name(CpuIsa isa);

}  // namespace vitkernels

#define VK_CONCAT_(a, b) a##_##b
#define VK_CONCAT(a, b) VK_CONCAT_(a, b)
#define VK_ISA_TABLE(op) VK_CONCAT(op##_table, VK_ISA)

#if defined(__x86_64__)
#define VK_DECLARE_TABLES(Table, op)  \
  const Table& op##_table_portable(); \
  const Table& op##_table_avx2();     \
  const Table& op##_table_avx512();   \
  const Table& op##_table_avx512bf16();
#define VK_PICK_TABLE(op)                                                                 \
  (::vitkernels::cpu_isa() == ::vitkernels::CpuIsa::kAvx512Bf16 ? op##_table_avx512bf16() \
   : ::vitkernels::cpu_isa() == ::vitkernels::CpuIsa::kAvx512   ? op##_table_avx512()     \
   : ::vitkernels::cpu_isa() == ::vitkernels::CpuIsa::kAvx2     ? op##_table_avx2()       \
                                                                : op##_table_portable())
#else
#define VK_DECLARE_TABLES(Table, op) const Table& op##_table_portable();
#define VK_PICK_TABLE(op) (op##_table_portable())
#endif
