// Products of a warpgroup: each warp computes its 16 of the 64 rows when it waits.
#pragma once

#include "common/dtype.h"
#include "common/fragment.cuh"
#include "common/wgmma_descriptor.h"
#include "emulator/async_proxy.h"

namespace vitkernels::emulator {

struct WgmmaRequest {  // of one lane
  DType type;
  int n;
  const FragmentA* a_registers;  // null: A is in shared memory
  WgmmaOperand a;
  Major a_major;
  WgmmaOperand b;
  Major b_major;
  bool accumulate;
  float* c;  // n / 2 of them
};

void wgmma_fence(Place place);
void wgmma(const WgmmaRequest& request, Place place);
void wgmma_commit(Place place);
void wgmma_wait(int newest_left_pending, Place place);
void set_registers(const char* what, int count, Place place);

}  // namespace vitkernels::emulator
