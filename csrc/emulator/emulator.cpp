// The scheduler: blocks one after another on each OS thread, the fibers of a block in random order.
#include "emulator/emulator.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "emulator/arena.h"
#include "emulator/async_proxy.h"
#include "emulator/dependent_launch.h"
#include "emulator/describe.h"
#include "emulator/fiber.h"

namespace vitkernels::emulator {

thread_local Fiber* running = nullptr;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStaticLimit =
    48 << 10;  // CUDA C++ Programming Guide, "Compute Capabilities", technical specifications
constexpr size_t kMostEnded = 6000;  // of the 8128 threads that ThreadSanitizer can tell apart

uint64_t from_environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == 0 ? otherwise : std::strtoull(text, nullptr, 0);
}

// A barrier of a part of the block.
struct PartBarrier {
  int threads = 0, arrived = 0;
  uint64_t generation = 0;
  Place place{};  // of the first to come
  std::vector<Fiber*> waiting;
};

// What ThreadSanitizer takes for the barriers' own memory: a block's alone, so that the order of
// one block's threads is none between blocks. Two of each: a thread that is early at the next
// meeting has nothing to say to one that is late from the last.
struct Meetings {
  uint64_t block[2], warp[32], part[16][2];
};

}  // namespace

struct Block {
  const Shape* shape;
  const std::function<void()>* body;
  Index3 index;
  std::vector<Fiber> fibers;
  std::vector<std::vector<Fiber*>> ready;  // of each warp
  int live = 0;
  int arrived = 0, predicates = 0;  // of the block meeting
  Place barrier{};
  PartBarrier part_barriers[16];
  Arena arena;
  AsyncProxy async;
  Dependence dependence;
  std::exception_ptr error;
  void* scheduler = nullptr;  // its stack pointer while a fiber runs
  SanitizedStack scheduler_stack;
  std::unique_ptr<Meetings> meetings;
  uint64_t barrier_generation = 0;
  void* launch = nullptr;  // what the threads' ends and the launch's end are ordered by

  std::string describe() const {
    return "block " + text(index) + " of grid " + text(shape->grid) + ", seed " +
           std::to_string(settings().seed);
  }
  void wake(Fiber& fiber) {
    fiber.state = Fiber::kReady;
    ready[fiber.id / kWarp].push_back(&fiber);
  }
  bool step(std::minstd_rand& random);
  void run(std::vector<Fiber*>& fibers, std::minstd_rand& random);
  void open_barrier_when_all_arrived();
  bool finish_warp_meeting(const Fiber& member);
  void leave(Fiber& fiber);
  std::string who_waits_where() const;
};

namespace {

void to_scheduler(bool ends = false) {
  Fiber* self = running;
  self->stack.leave_for(self->block->scheduler_stack, ends);
  vk_emulator_switch(&self->stack_pointer, self->block->scheduler);
  self->stack.entered_from(self->block->scheduler_stack);
}

// What a thread leaves behind, and whether the others can go on without it.
void end_of(Fiber& self) {
  const Unwatched emulator;
  Block& block = *self.block;
  try {
    if (block.error == nullptr) {
      if (!self.copies.none())
        fail("the thread ends with copies (cp.async) that it has not waited for", self.place);
      if (!self.stores.none())
        fail("the thread ends with TMA stores that it has not waited for", self.place);
      if (!self.accumulators.empty())
        fail("the thread ends with wgmma operations that it has not waited for", self.place);
    }
  } catch (...) {
    block.error = std::current_exception();
  }
  try {
    block.leave(self);
  } catch (...) {
    if (block.error == nullptr) block.error = std::current_exception();
  }
}

void fiber_main() {
  Fiber* self = running;
  self->stack.entered_from(self->block->scheduler_stack);
  try {
    (*self->block->body)();
  } catch (...) {
    self->block->error = std::current_exception();
  }
  release(self->block->launch);
  end_of(*self);
  to_scheduler(true);
  std::abort();  // a finished fiber is never resumed
}

}  // namespace

// ---- Meetings

void Block::open_barrier_when_all_arrived() {
  if (arrived == 0 || arrived < live) return;
  const int result = predicates;
  arrived = predicates = 0;
  ++barrier_generation;
  for (Fiber& fiber : fibers)
    if (fiber.state == Fiber::kInBlockMeeting) {
      fiber.block_result = result;
      wake(fiber);
    }
}

// True when every lane of member's mask has come to the same operation with the same mask, or has
// exited.
bool Block::finish_warp_meeting(const Fiber& member) {
  const int first = member.id / kWarp * kWarp;
  const int lanes = std::min<int>(kWarp, static_cast<int>(fibers.size()) - first);
  if (member.needs_whole_warp &&
      (lanes < kWarp || std::any_of(
                            &fibers[first], &fibers[first] + lanes,
                            [](const Fiber& f) { return f.state == Fiber::kDone; })))
    fail(std::string(member.waits_for) +
             " needs all 32 lanes of the warp; some have exited or never were",
         member.place);
  Fiber* met[kWarp];
  void* records[kWarp] = {};
  int count = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    Fiber& other = fibers[first + lane];
    if (!(member.mask >> lane & 1) || other.state == Fiber::kDone) continue;
    if (other.state != Fiber::kInWarpMeeting || other.mask != member.mask ||
        std::strcmp(other.waits_for, member.waits_for))
      return false;
    records[lane] = other.record;
    met[count++] = &other;
  }
  if (member.finish != nullptr) {  // reads and writes for all lanes, each of which has released
    uint64_t* order = &meetings->warp[first / kWarp];
    acquire(order);
    {
      const Watched kernel;
      member.finish(records);
    }
    release(order);
  }
  for (int i = 0; i < count; ++i) wake(*met[i]);
  return true;
}

void Block::leave(Fiber& fiber) {
  fiber.state = Fiber::kDone;
  --live;
  open_barrier_when_all_arrived();
  const int first = fiber.id / kWarp * kWarp;
  for (int id = first; id < std::min<int>(first + kWarp, static_cast<int>(fibers.size())); ++id)
    if (fibers[id].state == Fiber::kInWarpMeeting) finish_warp_meeting(fibers[id]);
}

int meet_block(const char* what, bool predicate, Place place) {
  const Unwatched emulator;
  Fiber& self = *running;
  Block& block = *self.block;
  if (block.arrived == 0) block.barrier = place;
  if (place.line != block.barrier.line || std::strcmp(place.file, block.barrier.file))
    fail(std::string(what) + ", but other threads of the block are at the barrier of " +
             text(block.barrier),
         place);
  self.waits_for = what;
  self.place = place;
  self.state = Fiber::kInBlockMeeting;
  ++block.arrived;
  block.predicates += predicate;
  uint64_t* order = &block.meetings->block[block.barrier_generation % 2];
  release(order);
  block.open_barrier_when_all_arrived();
  to_scheduler();
  acquire(order);
  return self.block_result;
}

namespace {
void meet_lanes(const char* what, unsigned mask, bool whole, void* record, Finish finish,
                Place place) {
  const Unwatched emulator;
  Fiber& self = *running;
  if (!(mask >> self.id % kWarp & 1))
    fail(std::string(what) + " with a mask that leaves out the calling lane", place);
  self.waits_for = what;
  self.place = place;
  self.mask = mask;
  self.needs_whole_warp = whole;
  self.record = record;
  self.finish = finish;
  self.state = Fiber::kInWarpMeeting;
  uint64_t* order = &self.block->meetings->warp[self.id / kWarp];
  release(order);
  self.block->finish_warp_meeting(self);
  to_scheduler();
  acquire(order);
}
}  // namespace

void meet_warp(const char* what, unsigned mask, void* record, Finish finish, Place place) {
  meet_lanes(what, mask, false, record, finish, place);
}
void meet_whole_warp(const char* what, void* record, Finish finish, Place place) {
  meet_lanes(what, 0xffffffffu, true, record, finish, place);
}

void meet_part(const char* what, int id, int threads, bool waits, Place place) {
  const Unwatched emulator;
  Fiber& self = *running;
  if (id < 1 || id > 15)
    fail(std::string(what) + " of barrier " + std::to_string(id) +
             "; 1 to 15 are there, 0 is that of __syncthreads",
         place);
  if (threads <= 0 || threads % kWarp != 0)
    fail(std::string(what) + " of " + std::to_string(threads) +
             " threads; a multiple of 32 is needed",
         place);
  PartBarrier& barrier = self.block->part_barriers[id];
  if (barrier.arrived == 0) barrier.threads = threads, barrier.place = place;
  if (barrier.threads != threads)
    fail(std::string(what) + " of " + std::to_string(threads) + " threads, but barrier " +
             std::to_string(id) + " is one of " + std::to_string(barrier.threads) + " at " +
             text(barrier.place),
         place);
  uint64_t* order = &self.block->meetings->part[id][barrier.generation % 2];
  release(order);
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    for (Fiber* fiber : std::exchange(barrier.waiting, {})) wake(*fiber);
  } else if (waits) {
    barrier.waiting.push_back(&self);
    sleep(what,
          " of barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads",
          place);
  }
  if (waits) acquire(order);
}

void sleep(const char* what, const std::string& detail, Place place) {
  const Unwatched emulator;
  Fiber& self = *running;
  self.waits_for = what;
  self.detail = detail;
  self.place = place;
  self.state = Fiber::kAsleep;
  to_scheduler();
}
void wake(Fiber& fiber) {
  const Unwatched emulator;
  fiber.block->wake(fiber);
}

AsyncProxy& async_proxy() { return running->block->async; }
Dependence& dependence() { return running->block->dependence; }

// ---- The order of fibers

// Runs each of the fibers, which are ready, until it waits or ends.
void Block::run(std::vector<Fiber*>& order, std::minstd_rand& random) {
  std::shuffle(order.begin(), order.end(), random);
  for (Fiber* fiber : order) {
    running = fiber;
    scheduler_stack.leave_for(fiber->stack);
    vk_emulator_switch(&scheduler, fiber->stack_pointer);
    scheduler_stack.entered_from(fiber->stack);
    if (error != nullptr) break;
  }
}

// Either everyone goes on as far as the next wait, or one warp goes on as far as it can without the
// others: a missing barrier shows in a thread that is late in the first, in a warp that is early in
// the second. False when nobody can go on.
bool Block::step(std::minstd_rand& random) {
  std::vector<Fiber*> order;
  const size_t warps = ready.size(), first = random() % warps;
  const bool everyone = random() % 2 == 0;
  for (size_t i = 0; i < warps; ++i) {
    std::vector<Fiber*>& warp = ready[(first + i) % warps];
    if (everyone) {
      order.insert(order.end(), warp.begin(), warp.end());
      warp.clear();
      continue;
    }
    if (warp.empty()) continue;
    while (!warp.empty() && error == nullptr) {
      order.clear();
      order.swap(warp);
      run(order, random);
    }
    return true;
  }
  run(order, random);
  return !order.empty();
}

std::string Block::who_waits_where() const {
  std::map<std::string, std::vector<int>> groups;
  for (const Fiber& fiber : fibers) {
    char mask[40] = "";
    if (fiber.state == Fiber::kInWarpMeeting)
      std::snprintf(mask, sizeof(mask), " with mask 0x%08x", fiber.mask);
    groups[fiber.state == Fiber::kDone ? "have exited"
                                       : "wait in " + std::string(fiber.waits_for) + mask +
                                             (fiber.state == Fiber::kAsleep ? fiber.detail : "") +
                                             " at " + text(fiber.place)]
        .push_back(fiber.id);
  }
  std::string out;
  for (const auto& [where, ids] : groups) out += "\n  threads " + ranges(ids) + " " + where;
  return out;
}

void fail(const std::string& what, Place place) {
  throw std::runtime_error("emulated kernel: " + what + "\n  thread " +
                           text(running->thread_index) + " at " + text(place) + ", " +
                           running->block->describe());
}

const Index3& block_index() { return running->block->index; }
const Index3& block_dim() { return running->block->shape->block; }
const Index3& grid_dim() { return running->block->shape->grid; }

// ---- Shared memory

void* dynamic_shared() { return running->block->arena.base; }
char* shared_base() { return running->block->arena.base; }
size_t shared_bytes() { return running->block->arena.used; }

void* static_shared(const void* key, size_t bytes, Place place) {
  const Unwatched emulator;
  Arena& arena = running->block->arena;
  if (void* known = arena.find(key); known != nullptr) return known;
  const size_t all_static = arena.static_bytes + bytes, all = all_static + arena.dynamic_bytes;
  if (all_static > kStaticLimit)
    fail(std::to_string(all_static) + " bytes of static shared memory; the limit is 49152", place);
  if (all > settings().shared_limit)
    fail(std::to_string(all) + " bytes of static and dynamic shared memory; " + "the limit is " +
             std::to_string(settings().shared_limit),
         place);
  return arena.add(key, bytes);
}

uint32_t shared_offset(const char* what, const void* address, size_t bytes, size_t alignment,
                       Place place) {
  const Unwatched emulator;
  const Arena& arena = running->block->arena;
  if (!arena.holds(address, bytes))
    fail(std::string(what) + " of what is not, or not all, in shared memory", place);
  const size_t offset = static_cast<size_t>(static_cast<const char*>(address) - arena.base);
  if (offset % alignment != 0)
    fail(
        std::string(what) + " of shared memory off its " + std::to_string(alignment) + "-byte line",
        place);
  return static_cast<uint32_t>(offset);
}

namespace {

// ---- Running

// What one OS thread keeps between blocks and launches: stacks and shared memory.
struct Worker {
  std::vector<std::unique_ptr<Stack>> stacks;
  std::unique_ptr<char[]> arena{new char[Arena::kBytes + 1024]};
  Block block;

  // Threads that ThreadSanitizer still has to know of: it gives a new one the number of one that it
  // has forgotten, and would take the accesses of both for those of one.
  std::vector<SanitizedStack> ended;

  ~Worker() { unpoison(arena.get(), Arena::kBytes + 1024); }
  void forget_ended() {
    for (SanitizedStack& stack : ended) stack.destroy();
    ended.clear();
  }

  void run_block(const Shape& shape, const std::function<void()>& body, Index3 index, uint64_t seed,
                 void* launch, LeadingGrid* leading);
};

void Worker::run_block(const Shape& shape, const std::function<void()>& body, Index3 index,
                       uint64_t seed, void* launch, LeadingGrid* leading) {
  const int threads = static_cast<int>(shape.block.x * shape.block.y * shape.block.z);
  if (kFreshMemory) {
    stacks.clear();
    arena.reset(new char[Arena::kBytes + 1024]);
    std::vector<Fiber>().swap(block.fibers);  // with its memory
  }
  while (static_cast<int>(stacks.size()) < threads) stacks.push_back(std::make_unique<Stack>());
  block.shape = &shape;
  block.body = &body;
  block.index = index;
  block.launch = launch;
  block.meetings = std::make_unique<Meetings>();
  block.barrier_generation = 0;
  block.scheduler_stack.adopt_current();
  block.live = threads;
  block.arrived = block.predicates = 0;
  for (PartBarrier& barrier : block.part_barriers) barrier = {};
  block.error = nullptr;
  const uintptr_t line = (reinterpret_cast<uintptr_t>(arena.get()) + 1023) / 1024 * 1024;
  block.arena.open(reinterpret_cast<char*>(line), shape.shared_bytes);
  block.async.open(block.arena.base);
  block.dependence = {leading, {}};
  block.fibers.assign(threads, Fiber{});
  block.ready.assign((threads + kWarp - 1) / kWarp, {});
  for (int id = 0; id < threads; ++id) {
    Fiber& fiber = block.fibers[id];
    fiber.block = &block;
    fiber.id = id;
    fiber.thread_index.x = id % shape.block.x;
    fiber.thread_index.y = id / shape.block.x % shape.block.y;
    fiber.thread_index.z = id / shape.block.x / shape.block.y;
    fiber.stack_pointer = first_frame(*stacks[id], fiber_main);
    fiber.stack.set_bounds(stacks[id]->low(), Stack::kBytes);
    fiber.stack.create();
    block.wake(fiber);
  }

  std::minstd_rand random(static_cast<uint32_t>(seed ^ seed >> 32) | 1);
  bool stuck = false;
  while (block.live > 0 && block.error == nullptr && !stuck)
    stuck = !block.step(random) && !block.async.advance(random) && !block.dependence.advance();
  running = nullptr;
  if (ended.size() > kMostEnded) forget_ended();
  for (Fiber& fiber : block.fibers)
    if (fiber.state == Fiber::kDone) ended.push_back(fiber.stack);
  if (stuck)
    throw std::runtime_error("emulated kernel: deadlock, " + block.describe() +
                             block.who_waits_where());
  if (block.error != nullptr) std::rethrow_exception(block.error);
  if (const std::string wrong = block.arena.overrun(); !wrong.empty())
    throw std::runtime_error("emulated kernel: " + wrong + ", " + block.describe());
  if (const std::string wrong = block.async.unfinished(); !wrong.empty())
    throw std::runtime_error("emulated kernel: " + wrong + "\n  " + block.describe());
}

// Workers outlive launches, so that stacks are mapped once.
class Pool {
 public:
  std::unique_ptr<Worker> take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Worker>();
    std::unique_ptr<Worker> worker = std::move(idle_.back());
    idle_.pop_back();
    return worker;
  }
  void give_back(std::unique_ptr<Worker> worker) {
    std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(worker));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> idle_;
};

// CUDA C++ Programming Guide, "Compute Capabilities", technical specifications.
void check_shape(const Shape& shape) {
  const auto& [grid, block, shared_bytes] = shape;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  std::string wrong;
  if (threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64)
    wrong = "block " + text(block) + "; at most 1024 threads, 64 along z";
  else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
           grid.z > 65535)
    wrong = "grid " + text(grid) + "; at least 1, at most (2147483647,65535,65535)";
  else if (shared_bytes > settings().shared_limit)
    wrong = std::to_string(shared_bytes) + " bytes of dynamic shared memory; the limit is " +
            std::to_string(settings().shared_limit);
  if (!wrong.empty()) throw std::runtime_error("emulated kernel: cannot launch with " + wrong);
}

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

}  // namespace

Settings& settings() {
  static Settings values{
      from_environment("VITKERNELS_EMULATOR_SEED", 1),
      static_cast<int>(from_environment("VITKERNELS_EMULATOR_THREADS", 1)),
      static_cast<int>(from_environment("VITKERNELS_EMULATOR_MULTIPROCESSORS", 2)),
      static_cast<int>(from_environment("VITKERNELS_EMULATOR_ARCHITECTURE", 90)),
      std::min<uint64_t>(from_environment("VITKERNELS_EMULATOR_SHARED_LIMIT", 232448),
                         Arena::kBytes / 2)};
  return values;
}

void run(const Shape& shape, const std::function<void()>& thread_body, LeadingGrid* leading) {
  static Pool pool;
  check_shape(shape);
  if (running != nullptr)
    throw std::runtime_error("emulated kernel: a launch from inside a kernel");
  const uint64_t seed = settings().seed;
  const uint64_t blocks = static_cast<uint64_t>(shape.grid.x) * shape.grid.y * shape.grid.z;
  // Blocks promise each other no order: odd strides visit all residues of a power of two, starting
  // anywhere.
  uint64_t span = 1;
  while (span < blocks) span *= 2;
  const uint64_t start = mix(seed), stride = mix(start) | 1;

  std::atomic<uint64_t> next{0};
  std::atomic<bool> stop{false};
  std::exception_ptr error;
  std::mutex mutex;
  const auto launch = std::make_unique<uint64_t>();
  auto work = [&] {
    const Unwatched emulator;
    std::unique_ptr<Worker> worker = pool.take();
    try {
      for (uint64_t step; !stop && (step = next++) < span;) {
        const uint64_t b = (start + step * stride) % span;
        if (b >= blocks) continue;
        const Index3 index(static_cast<unsigned>(b % shape.grid.x),
                           static_cast<unsigned>(b / shape.grid.x % shape.grid.y),
                           static_cast<unsigned>(b / shape.grid.x / shape.grid.y));
        worker->run_block(shape, thread_body, index, mix(seed ^ mix(b)), launch.get(), leading);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
      stop = true;
    }
    running = nullptr;
    worker->forget_ended();
    pool.give_back(std::move(worker));
  };
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < std::min<uint64_t>(blocks, static_cast<uint64_t>(settings().threads));
       ++i)
    helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  acquire(launch.get());
  if (error) std::rethrow_exception(error);
}

}  // namespace vitkernels::emulator

void vitkernels_emulator_set_seed(uint64_t seed) { vitkernels::emulator::settings().seed = seed; }
uint64_t vitkernels_emulator_seed() { return vitkernels::emulator::settings().seed; }
