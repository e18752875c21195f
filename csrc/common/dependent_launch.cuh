// Programmatic dependent launch (sm_90): a grid that begins while the one before it ends. The
// emulator's twin is csrc/emulator/common/dependent_launch.cuh; the host's side is
// Device::launch_dependent.
//
// On older architectures a grid begins when the one before it has ended, and both are nothing.
//
// References: [P] PTX ISA, instruction named.
#pragma once

#include "common/platform.cuh"

namespace vitkernels {

// The next grid may begin once every block has called this or ended. It promises nothing of what
// this grid has written [P: griddepcontrol.launch_dependents].
VK_DEVICE void let_next_grid_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the grid before has ended and what it wrote can be read [P: griddepcontrol.wait].
VK_DEVICE void wait_for_grid_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace vitkernels
