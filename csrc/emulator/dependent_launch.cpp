#include "emulator/dependent_launch.h"

#include <stdexcept>
#include <utility>

namespace vitkernels::emulator {

void LeadingGrid::run() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (done_) return;
  run_();
  release(&order_);
  done_ = true;
}

bool Dependence::advance() {
  if (waiting.empty()) return false;
  running = nullptr;  // the other grid has threads of its own
  leading->run();
  for (Fiber* fiber : std::exchange(waiting, {})) wake(*fiber);
  return true;
}

void wait_for_leading_grid(Place place) {
  const Unwatched emulator;
  Dependence& block = dependence();
  if (block.leading == nullptr) return;
  block.waiting.push_back(running);
  sleep("wait_for_grid_before", "", place);
  acquire(block.leading->order());
}

void run_dependent(LeadingGrid& leading, const Shape& shape,
                   const std::function<void()>& thread_body) {
  run(shape, thread_body, &leading);
  if (!leading.done())
    throw std::runtime_error(
        "emulated kernel: a dependent launch ended without waiting for the grid before it");
}

}  // namespace vitkernels::emulator
