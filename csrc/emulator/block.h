// A block and its threads, and the blocks of a cluster, which run at the same time: what the
// scheduler (emulator.cpp) and the meetings (block.cpp) keep.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator/arena.h"
#include "emulator/async_proxy.h"
#include "emulator/dependent_launch.h"
#include "emulator/describe.h"
#include "emulator/emulator.h"

namespace vitkernels::emulator {

constexpr int kWarp = 32;

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

// Blocks that run at the same time and reach each other's shared memory; one where a launch asks
// for none.
struct Cluster {
  std::vector<Block*> blocks;   // by rank
  std::vector<Fiber*> waiting;  // at cluster_sync
  uint64_t generation = 0;
  uint64_t order[2] = {};  // for ThreadSanitizer, as in Meetings

  void open_barrier_when_all_arrived();
};

class Stack;  // fiber.h

// What a block uses, memory and stacks included, for one run after another.
struct Block {
  Block();
  ~Block();

  const Shape* shape;
  const std::function<void()>* body;
  Index3 index;
  std::vector<Fiber> fibers;
  std::vector<std::vector<Fiber*>> ready;  // of each warp
  int live = 0;
  int arrived = 0, predicates = 0;  // of the block meeting
  Place barrier{};
  PartBarrier part_barriers[16];
  std::unique_ptr<char[]> memory;  // of the arena
  std::vector<std::unique_ptr<Stack>> stacks;
  Arena arena;
  AsyncProxy async;
  Dependence dependence;
  std::exception_ptr error;
  void* scheduler = nullptr;  // its stack pointer while a fiber runs
  SanitizedStack scheduler_stack;
  std::unique_ptr<Meetings> meetings;
  uint64_t barrier_generation = 0;
  void* launch = nullptr;  // what the threads' ends and the launch's end are ordered by
  Cluster* cluster = nullptr;
  int rank = 0;  // in the cluster

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
  // As many threads as the shape says, ready, with their stacks and shared memory.
  void begin();
  void open_barrier_when_all_arrived();
  bool finish_warp_meeting(const Fiber& member);
  void leave(Fiber& fiber);
  std::string who_waits_where() const;
};

}  // namespace vitkernels::emulator
