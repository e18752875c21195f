#include "window_attention/window_attention_cuda.h"

namespace vitkernels::window_attention {

void forward_simt(const Device&, const Tensor&, const Args&) {
  VK_CHECK(false, "window_attention", "path simt is not written yet");
}
void backward_simt(const Device&, const Tensor&, const Args&) {
  VK_CHECK(false, "window_attention", "path simt is not written yet");
}

}  // namespace vitkernels::window_attention
