// CPU window attention kernels of one instruction set (VK_ISA); window_attention_cpu.cpp calls them
// through the table at the end.
#include "window_attention/window_attention_cpu_backward.h"
#include "window_attention/window_attention_cpu_forward.h"

namespace vitkernels {
namespace {

template <template <class> class Pass>
int64_t scratch_bytes(const WindowAttentionArgs& a) {
  int64_t bytes = 0;
  VK_SWITCH_FLOAT(a.dtype, bytes = Pass<scalar_t>(a, nullptr).scratch_bytes());
  return bytes;
}

void forward(const WindowAttentionArgs& a, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_FLOAT(a.dtype, forward_items<scalar_t>(a, begin, end, scratch));
}

void backward(const WindowAttentionArgs& a, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_FLOAT(a.dtype, backward_items<scalar_t>(a, begin, end, scratch));
}

}  // namespace

const WindowAttentionTable& VK_ISA_TABLE(window_attention)() {
  static constexpr WindowAttentionTable table = {shared_floats,
                                                 prepare,
                                                 scratch_bytes<WindowForward>,
                                                 forward,
                                                 scratch_bytes<WindowBackward>,
                                                 backward,
                                                 partial_floats,
                                                 reduce};
  return table;
}

}  // namespace vitkernels
