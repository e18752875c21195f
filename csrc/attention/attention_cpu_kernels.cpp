// CPU attention kernels of one instruction set (VK_ISA); attention_cpu.cpp calls them through the
// table at the end.
#include "attention/attention_cpu_backward.h"
#include "attention/attention_cpu_forward.h"

namespace vitkernels {
namespace {

template <template <class> class Scratch>
int64_t scratch_bytes(const AttentionArgs& a) {
  int64_t bytes = 0;
  VK_SWITCH_FLOAT(a.dtype, bytes = Scratch<typename UnitOf<scalar_t>::type>(a, nullptr).bytes);
  return bytes;
}

void forward(const AttentionArgs& a, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_FLOAT(a.dtype, forward_items<scalar_t>(a, begin, end, scratch));
}

void backward(const AttentionArgs& a, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_FLOAT(a.dtype, backward_items<scalar_t>(a, begin, end, scratch));
}

void reduce_dbias(const AttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t size = a.dbias_rows * a.dbias_columns;
  for (int64_t slice = begin; slice < end; ++slice)
    store_dbias(a, slice, a.dbias_partial + slice * a.chunks * size, a.chunks);
}

}  // namespace

const AttentionTable& VK_ISA_TABLE(attention)() {
  static constexpr AttentionTable table = {forward_blocks, scratch_bytes<ForwardScratch>,
                                           forward,        scratch_bytes<BackwardScratch>,
                                           backward,       reduce_dbias};
  return table;
}

}  // namespace vitkernels
