// Which of an operator's CUDA kernels serves a call. An operator has one plain kernel for any
// dtype, shape and alignment (simt) and faster ones that need an architecture and refuse some
// calls. The launcher takes the fastest that serves; tests and benchmarks force one by name.
#pragma once

#include <string>

#include "common/stable.h"

namespace vitkernels {

enum class CudaPath : int { kAuto, kSimt, kSm80, kSm90 };

// The path that vitkernels_force_cuda_path has set, else kAuto.
CudaPath forced_cuda_path();

// Why a path refuses a call, in a few words for its error; empty where it serves.
using Refusal = std::string;

// architecture: 10 * major + minor of the device. A forced path that cannot serve is an error,
// never replaced.
inline CudaPath choose_cuda_path(const char* op, int architecture, const Refusal& sm90,
                                 const Refusal& sm80) {
  const Refusal no_sm90 = architecture == 90 ? sm90 : "it needs compute capability 9.0";
  const Refusal no_sm80 = architecture >= 80 ? sm80 : "it needs compute capability 8.0";
  switch (forced_cuda_path()) {
    case CudaPath::kSm90:
      VK_CHECK(no_sm90.empty(), op, "path sm90 cannot serve this call: ", no_sm90);
      return CudaPath::kSm90;
    case CudaPath::kSm80:
      VK_CHECK(no_sm80.empty(), op, "path sm80 cannot serve this call: ", no_sm80);
      return CudaPath::kSm80;
    case CudaPath::kSimt:
      return CudaPath::kSimt;
    default:
      return no_sm90.empty()   ? CudaPath::kSm90
             : no_sm80.empty() ? CudaPath::kSm80
                               : CudaPath::kSimt;
  }
}

}  // namespace vitkernels

// Sets it for the process and returns the one before; another number only asks.
extern "C" __attribute__((visibility("default"))) int vitkernels_force_cuda_path(int path);
