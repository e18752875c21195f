// A block of a CUDA kernel on one CPU thread: every CUDA thread is a fiber, and whatever CUDA waits
// for (barriers, warp-wide operations) is a meeting that fibers block in. README.md says what is
// modelled.
//
// This header is the machinery: launching, meetings, shared memory. The twins of CUDA's own names
// and of the primitives in csrc/common/platform.cuh are in csrc/emulator/common/platform.cuh and
// are built on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulator/sanitizer.h"

namespace vitkernels::emulator {

struct Index3 {  // dim3 and uint3
  unsigned x = 1, y = 1, z = 1;
  constexpr Index3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// A line of kernel source, for messages: as a default argument, the line of the call.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Settings {
  uint64_t seed;  // VITKERNELS_EMULATOR_SEED; the order of fibers and blocks follows from it alone
  int threads;    // VITKERNELS_EMULATOR_THREADS: how many blocks run at a time
  int multiprocessors;  // VITKERNELS_EMULATOR_MULTIPROCESSORS: what a launcher is told
  int architecture;     // VITKERNELS_EMULATOR_ARCHITECTURE: the same, 10 * major + minor
  size_t shared_limit;  // VITKERNELS_EMULATOR_SHARED_LIMIT: bytes of shared memory a block may have
                        // (sm_90: 232448)
};
Settings& settings();

struct Block;
struct Cluster;
class LeadingGrid;
using Finish = void (*)(void* const* records);

// Copies that a thread has begun and not yet waited for, in the groups it committed them in. They
// are performed when the thread waits: the latest moment that the hardware may choose.
class PendingGroups {
 public:
  void add(std::function<void()> operation) { open_.push_back(std::move(operation)); }
  void commit() {
    committed_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t newest_left_pending) {
    for (; committed_.size() > newest_left_pending; committed_.pop_front())
      for (auto& operation : committed_.front()) operation();
  }
  bool none() const {
    for (const auto& group : committed_)
      if (!group.empty()) return false;
    return open_.empty();
  }

 private:
  std::vector<std::function<void()>> open_;
  std::deque<std::vector<std::function<void()>>> committed_;
};

// Registers of one thread that wgmma is working on: 0xFF where the kernel sees them.
struct Accumulators {
  float* registers;
  std::vector<float> values;
  int operations;  // not yet waited for
};

// One CUDA thread.
struct Fiber {
  enum State { kReady, kInWarpMeeting, kInBlockMeeting, kAsleep, kDone };
  Block* block;
  Index3 thread_index;
  int id;  // linear index in the block; warp = id / 32, lane = id % 32
  State state;
  const char* waits_for;  // the operation's name
  Place place;
  unsigned mask;  // of the warp meeting
  bool needs_whole_warp;
  Finish finish;
  void* record;            // this lane's operands and results, on its own stack while it waits
  int block_result;        // of the block meeting
  std::string detail;      // of a sleep, for the list of who waits where
  PendingGroups copies;    // cp.async
  PendingGroups stores;    // TMA
  PendingGroups products;  // wgmma, of the warp: in its first lane
  std::vector<Accumulators> accumulators;
  bool wgmma_fenced = false;
  void* stack_pointer;
  SanitizedStack stack;
};

extern thread_local Fiber* running __attribute__((tls_model("initial-exec")));

// ---- Called by the twins, inside a kernel

const Index3& block_index();
const Index3& block_dim();
const Index3& grid_dim();

// Ends the launch with an error that names the block, the thread, the place and the seed.
[[noreturn]] void fail(const std::string& what, Place place);

// The lanes of `mask` that have not exited meet. The last to arrive calls finish(records), where
// records[l] is lane l's record or null, and all go on. Operands and results of a warp-wide
// operation travel in the records.
void meet_warp(const char* what, unsigned mask, void* record, Finish finish, Place place);

// The same of all 32 lanes, none of which may have exited: no record is null.
void meet_whole_warp(const char* what, void* record, Finish finish, Place place);

// All threads of the block that have not exited meet. Returns how many came with a true predicate.
int meet_block(const char* what, bool predicate, Place place);

// A part of the block's threads meets at barrier `id`: when `threads` have come, those that wait go
// on. One that does not wait is counted and goes on at once.
void meet_part(const char* what, int id, int threads, bool waits, Place place);

// All threads of all blocks of the cluster that have not exited meet.
void meet_cluster(Place place);
int cluster_rank();  // of the running thread's block

// Until another thread, or the scheduler, wakes this one. `detail` is for the list of who waits
// where.
void sleep(const char* what, const std::string& detail, Place place);
void wake(Fiber& fiber);

// Where in the block's shared memory the address is, in bytes. Fails unless all of the bytes belong
// to one array and the address is a multiple of `alignment`.
uint32_t shared_offset(const char* what, const void* address, size_t bytes, size_t alignment,
                       Place place);

// Shared memory of the block, 0xFF at its start. One static array per key; the same key gives the
// same array.
void* static_shared(const void* key, size_t bytes, Place place);
void* dynamic_shared();
char* shared_base();    // on a 1024-byte line
size_t shared_bytes();  // from there, all arrays so far

// `Tag` is the type of a lambda at the declaration, so each declaration of each template instance
// has its own array.
template <class T, class Tag>
T& shared_array(Tag, Place place) {
  static const char key = 0;
  return *static_cast<T*>(static_shared(&key, sizeof(T), place));
}

// ---- Called by launchers

struct Shape {
  Index3 grid, block;
  size_t shared_bytes;
  unsigned cluster = 1;  // neighbours along x that run at the same time
};

// Runs thread_body once per CUDA thread, as a dependent of the leading grid if there is one. Throws
// std::runtime_error: a shape that no GPU takes, a deadlock, a failure.
void run(const Shape& shape, const std::function<void()>& thread_body,
         LeadingGrid* leading = nullptr);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, const Arguments&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> copies(arguments...);
  run(shape, [&] { std::apply(kernel, copies); });
}

}  // namespace vitkernels::emulator

extern "C" {
void vitkernels_emulator_set_seed(uint64_t seed);
uint64_t vitkernels_emulator_seed();
}
