// What the launcher and the per-ISA kernels of distillation_loss share.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace vitkernels {

struct DistillationArgs {
  RowsArg logits, distill, teacher;  // (B, K)
  RowsArg soft_targets;              // (B, K); data is null where `ids` are given
  const int64_t* ids;                // (B,)
  RowsArg dlogits, ddistill;         // (B, K) of the logits' dtype; data is null where not wanted
  int64_t K;
  bool hard;
  float label_smoothing, inverse_temperature;
  double class_weight, distill_weight;  // of a row's loss in the batch's
  float class_grad, distill_grad;       // what a row's kept gradients are multiplied by
  double* losses;                       // (B,), weighted
};

// Each function works on rows, or elements, [begin, end).
struct DistillationTable {
  int64_t (*scratch_bytes)(int64_t K);  // of each thread
  void (*forward)(const DistillationArgs&, void* scratch, int64_t begin, int64_t end);
  // out = in * factor, contiguous, of one dtype.
  void (*scale)(RowsArg in, RowsArg out, float factor, int64_t begin, int64_t end);
};

VK_DECLARE_TABLES(DistillationTable, distillation_loss)

}  // namespace vitkernels
