// Programmatic dependent launch: two grids, of which the second may begin before the first has
// ended.
#pragma once

#include <functional>
#include <mutex>
#include <vector>

#include "emulator/emulator.h"

namespace vitkernels::emulator {

// The first grid of the two. It runs once, when a block of the second has come so far that all its
// threads that can go on wait for it.
class LeadingGrid {
 public:
  explicit LeadingGrid(std::function<void()> run) : run_(std::move(run)) {}

  void run();
  bool done() const { return done_; }
  void* order() { return &order_; }  // for ThreadSanitizer: its end, and who waits for that

 private:
  std::function<void()> run_;
  std::mutex mutex_;
  bool done_ = false;
  uint64_t order_ = 0;
};

// What a block of the second grid keeps of it.
struct Dependence {
  LeadingGrid* leading = nullptr;
  std::vector<Fiber*> waiting;

  // When no thread can go on: lets the first grid run and wakes those that wait. False: nobody
  // does.
  bool advance();
};

// Of the running thread's block.
Dependence& dependence();

// Returns at once where the grid was launched alone.
void wait_for_leading_grid(Place place);

// Runs both. An error if the second ends without having waited for the first.
void run_dependent(LeadingGrid& leading, const Shape& shape,
                   const std::function<void()>& thread_body);

}  // namespace vitkernels::emulator
