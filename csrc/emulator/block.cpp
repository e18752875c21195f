// The threads of a block: where they wait for each other, in which order they go on, and their
// shared memory.
#include "emulator/block.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>

#include "emulator/fiber.h"

namespace vitkernels::emulator {

thread_local Fiber* running = nullptr;

namespace {
constexpr size_t kStaticLimit =
    48 << 10;  // CUDA C++ Programming Guide, "Compute Capabilities", technical specifications
constexpr size_t kMemory = Arena::kBytes + 1024;
}  // namespace

Block::Block() : memory(new char[kMemory]) {}
Block::~Block() { unpoison(memory.get(), kMemory); }

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
  cluster->open_barrier_when_all_arrived();
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

// ---- Clusters

void Cluster::open_barrier_when_all_arrived() {
  size_t live = 0;
  for (const Block* block : blocks) live += static_cast<size_t>(block->live);
  if (waiting.empty() || waiting.size() < live) return;
  ++generation;
  for (Fiber* fiber : std::exchange(waiting, {})) emulator::wake(*fiber);
}

void meet_cluster(Place place) {
  const Unwatched emulator;
  Fiber& self = *running;
  Cluster& cluster = *self.block->cluster;
  self.waits_for = "cluster_sync";
  self.detail.clear();
  self.place = place;
  self.state = Fiber::kAsleep;
  uint64_t* order = &cluster.order[cluster.generation % 2];
  release(order);
  cluster.waiting.push_back(&self);
  cluster.open_barrier_when_all_arrived();
  to_scheduler();
  acquire(order);
}

int cluster_rank() { return running->block->rank; }

AsyncProxy& async_proxy_of(const char* what, int rank, Place place) {
  const Unwatched emulator;
  const Cluster& cluster = *running->block->cluster;
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size()))
    fail(std::string(what) + " of block " + std::to_string(rank) + " of a cluster of " +
             std::to_string(cluster.blocks.size()),
         place);
  Block& block = *cluster.blocks[static_cast<size_t>(rank)];
  if (block.live == 0)
    fail(std::string(what) + " of block " + std::to_string(rank) +
             " of the cluster, which has ended: its shared memory may be another's",
         place);
  return block.async;
}

AsyncProxy& async_proxy() { return running->block->async; }
Dependence& dependence() { return running->block->dependence; }

// ---- Begin

void Block::begin() {
  const int threads = static_cast<int>(shape->block.x * shape->block.y * shape->block.z);
  while (static_cast<int>(stacks.size()) < threads) stacks.push_back(std::make_unique<Stack>());
  meetings = std::make_unique<Meetings>();
  barrier_generation = 0;
  scheduler_stack.adopt_current();
  live = threads;
  arrived = predicates = 0;
  for (PartBarrier& barrier : part_barriers) barrier = {};
  error = nullptr;
  const uintptr_t line = (reinterpret_cast<uintptr_t>(memory.get()) + 1023) / 1024 * 1024;
  arena.open(reinterpret_cast<char*>(line), shape->shared_bytes);
  async.open(arena);
  fibers.assign(threads, Fiber{});
  ready.assign((threads + kWarp - 1) / kWarp, {});
  for (int id = 0; id < threads; ++id) {
    Fiber& fiber = fibers[id];
    fiber.block = this;
    fiber.id = id;
    fiber.thread_index.x = id % shape->block.x;
    fiber.thread_index.y = id / shape->block.x % shape->block.y;
    fiber.thread_index.z = id / shape->block.x / shape->block.y;
    fiber.stack_pointer = first_frame(*stacks[id], fiber_main);
    fiber.stack.set_bounds(stacks[id]->low(), Stack::kBytes);
    fiber.stack.create();
    wake(fiber);
  }
}

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

}  // namespace vitkernels::emulator
