// The emulator's twin of csrc/common/dependent_launch.cuh: the grid before runs when threads of the
// dependent one wait for it and nobody else can go on, the latest moment that the hardware may
// choose.
//
// References: [P] PTX ISA, instruction named.
#pragma once

#include "common/platform.cuh"
#include "emulator/dependent_launch.h"

namespace vitkernels {

// [P: griddepcontrol.launch_dependents]
inline void let_next_grid_begin() {}

// [P: griddepcontrol.wait]
inline void wait_for_grid_before(VkPlace place = VkPlace::here()) {
  emulator::wait_for_leading_grid(place);
}

}  // namespace vitkernels
