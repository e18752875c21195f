#include "emulator/async_proxy.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "emulator/arena.h"
#include "emulator/describe.h"

namespace vitkernels::emulator {

namespace {

constexpr uint64_t kMark = 0x6d62617272696572;  // in the memory of a live mbarrier
constexpr int64_t kByteLimit = (1 << 20) - 1;   // [PTX ISA, "Contents of the mbarrier object"]
constexpr int kPatience = 1000;

}  // namespace

// ---- mbarriers

AsyncProxy::Barrier& AsyncProxy::find(const char* what, const uint64_t* barrier, Place place) {
  return find(what, shared_offset(what, barrier, 8, 8, place), place);
}

AsyncProxy::Barrier& AsyncProxy::find(const char* what, uint32_t offset, Place place) {
  const auto found = barriers_.find(offset);
  if (found == barriers_.end())
    fail(std::string(what) + " of an mbarrier that is not initialized", place);
  if (std::memcmp(shared_ + offset, &kMark, sizeof(kMark)) != 0)
    fail(std::string(what) + " of an mbarrier whose memory was overwritten", place);
  return found->second;
}

void AsyncProxy::init_barrier(uint64_t* barrier, int arrivals, Place place) {
  const Unwatched emulator;
  const uint32_t offset = shared_offset("mbarrier_init", barrier, 8, 8, place);
  if (barriers_.count(offset) != 0)
    fail("mbarrier_init of an mbarrier that is in use: invalidate it first", place);
  if (arrivals < 1 || arrivals > kByteLimit)
    fail("mbarrier_init for " + std::to_string(arrivals) + " arrivals", place);
  *barrier = kMark;
  barriers_[offset] = {arrivals, arrivals, 0, 0, running, {}};
}

void AsyncProxy::invalidate_barrier(uint64_t* barrier, Place place) {
  const Unwatched emulator;
  if (!find("mbarrier_invalidate", barrier, place).waiters.empty())
    fail("mbarrier_invalidate of an mbarrier that threads wait at", place);
  const uint32_t offset = shared_offset("mbarrier_invalidate", barrier, 8, 8, place);
  for (const Load& load : loads_)
    if (load.barrier == offset)
      fail("mbarrier_invalidate of an mbarrier that a TMA load of " + text(load.place) +
               " will complete at",
           place);
  barriers_.erase(offset);
  std::memset(barrier, 0xFF, 8);
}

void AsyncProxy::publish_barriers() {
  const Unwatched emulator;
  for (auto& [offset, barrier] : barriers_)
    if (barrier.published_by == running) barrier.published_by = nullptr;
}

void AsyncProxy::complete_if_due(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  ++barrier.phase;
  fruitless_ = 0;
  for (const Waiter& waiter : std::exchange(barrier.waiters, {})) {
    *waiter.result = true;
    wake(*waiter.fiber);
  }
}

void AsyncProxy::arrive(const char* what, uint64_t* barrier, int expected_bytes, Place place) {
  arrive(what, shared_offset(what, barrier, 8, 8, place), expected_bytes, place);
}

void AsyncProxy::arrive(const char* what, uint32_t offset, int expected_bytes, Place place) {
  const Unwatched emulator;
  Barrier& b = find(what, offset, place);
  b.bytes += expected_bytes;
  if (expected_bytes < 0 || b.bytes > kByteLimit)
    fail(std::string(what) + ": " + std::to_string(b.bytes) + " bytes expected in one phase",
         place);
  if (b.pending == 0)
    fail(std::string(what) + ": more than the " + std::to_string(b.expected) +
             " arrivals that this phase expects",
         place);
  --b.pending;
  release(&b.order[b.phase % 2]);
  complete_if_due(b);
}

bool AsyncProxy::wait(const char* what, uint64_t* barrier, int parity, bool may_give_up,
                      Place place) {
  const Unwatched emulator;
  Barrier& b = find(what, barrier, place);
  if (parity != 0 && parity != 1)
    fail(std::string(what) + " with parity " + std::to_string(parity), place);
  if (static_cast<int>(b.phase % 2) != parity) {
    acquire(&b.order[parity]);
    return true;
  }
  bool result = false;
  b.waiters.push_back({running, may_give_up, &result});
  sleep(what,
        " for phase " + std::to_string(b.phase) + " of the mbarrier at byte " +
            std::to_string(shared_offset(what, barrier, 8, 8, place)) + " (" +
            std::to_string(b.pending) + " arrivals and " + std::to_string(b.bytes) +
            " bytes were missing)",
        place);
  if (result) acquire(&b.order[parity]);
  return result;
}

// ---- Shared memory as the async proxy sees it

char* AsyncProxy::seen() {
  if (seen_.size() < arena_->used) seen_.resize(arena_->used, static_cast<char>(0xFF));
  return seen_.data();
}

void AsyncProxy::publish_shared() {
  const Unwatched emulator;
  copy_with_gaps(seen(), shared_, arena_->used);
  publish_barriers();
}

void AsyncProxy::check_published(const char* what, uint32_t offset, size_t bytes, Place place) {
  const Unwatched emulator;
  if (std::memcmp(seen() + offset, shared_ + offset, bytes) != 0)
    fail(std::string(what) +
             " reads shared memory that ordinary stores have written, without fence_proxy_async "
             "after them",
         place);
}

void AsyncProxy::write(uint32_t offset, const void* bytes, size_t size) {
  const Unwatched emulator;
  std::memcpy(shared_ + offset, bytes, size);
  std::memcpy(seen() + offset, bytes, size);
}

void AsyncProxy::poison(uint32_t offset, size_t size) {
  const Unwatched emulator;
  std::memset(shared_ + offset, 0xFF, size);
  std::memset(seen() + offset, 0xFF, size);
}

// ---- Copies to shared memory

void AsyncProxy::begin_load(uint32_t barrier, uint32_t offset, size_t bytes,
                            std::function<void()> perform, Place place) {
  const Unwatched emulator;
  if (find("tma_load", barrier, place).published_by != nullptr)
    fail("tma_load with an mbarrier that mbarrier_fence_init has not shown to the async proxy",
         place);
  poison(offset, bytes);
  loads_.push_back({barrier, offset, bytes, std::move(perform), place});
}

// ---- The scheduler

void AsyncProxy::open(const Arena& shared) {
  arena_ = &shared;
  shared_ = shared.base;
  barriers_.clear();
  loads_.clear();
  seen_.clear();
  sequences_.clear();
  fruitless_ = 0;
}

bool AsyncProxy::perform_load(std::minstd_rand& random) {
  if (loads_.empty()) return false;
  std::swap(loads_[random() % loads_.size()], loads_.back());
  const Load load = std::move(loads_.back());
  loads_.pop_back();
  const char* target = shared_ + load.offset;
  if (std::any_of(target, target + load.bytes, [](char c) { return c != static_cast<char>(0xFF); }))
    fail("shared memory was written while a TMA load to it was under way", load.place);
  load.perform();
  Barrier& barrier = barriers_.at(load.barrier);
  barrier.bytes -= static_cast<int64_t>(load.bytes);
  complete_if_due(barrier);
  return true;
}

bool AsyncProxy::let_give_up() {
  if (++fruitless_ > kPatience) return false;
  bool any = false;
  for (auto& [offset, barrier] : barriers_) {
    const auto gives_up = [](const Waiter& w) { return w.may_give_up; };
    const auto first = std::stable_partition(barrier.waiters.begin(), barrier.waiters.end(),
                                             std::not_fn(gives_up));
    for (auto w = first; w != barrier.waiters.end(); ++w) wake(*w->fiber), any = true;
    barrier.waiters.erase(first, barrier.waiters.end());
  }
  return any;
}

std::string AsyncProxy::unfinished() const {
  if (!loads_.empty())
    return "the block ends with a TMA load that nobody waited for, of " + text(loads_[0].place);
  for (const auto& [group, sequence] : sequences_)
    for (size_t done : sequence.done)
      if (done != sequence.operations.size())
        return "the warps of warpgroup " + std::to_string(group) +
               " end after different numbers of wgmma operations";
  return "";
}

void AsyncProxy::check_sequence(int warp, const std::string& operation, Place place) {
  const Unwatched emulator;
  Sequence& sequence = sequences_[warp / 4];
  size_t& done = sequence.done[warp % 4];
  if (done == sequence.operations.size()) sequence.operations.push_back(operation);
  if (sequence.operations[done] != operation)
    fail("the warps of a warpgroup go different ways: " + operation + ", but another's " +
             std::to_string(done + 1) + "th wgmma operation was " + sequence.operations[done],
         place);
  ++done;
}

}  // namespace vitkernels::emulator
