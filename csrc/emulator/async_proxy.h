// What happens in a block beside its threads (sm_90): barriers in shared memory, TMA copies under
// way, and which bytes of shared memory the async proxy (TMA, wgmma) can see.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "emulator/emulator.h"

namespace vitkernels::emulator {

struct Arena;

class AsyncProxy {
 public:
  // ---- mbarriers

  void init_barrier(uint64_t* barrier, int arrivals, Place place);
  void invalidate_barrier(uint64_t* barrier, Place place);
  // The calling thread's new barriers can be named in TMA copies.
  void publish_barriers();
  void arrive(const char* what, uint64_t* barrier, int expected_bytes, Place place);
  // Of a thread of another block of the cluster, at the barrier that many bytes into this block's
  // shared memory.
  void arrive(const char* what, uint32_t offset, int expected_bytes, Place place);
  // False only if the caller may give up and nothing else can happen now.
  bool wait(const char* what, uint64_t* barrier, int parity, bool may_give_up, Place place);

  // ---- Shared memory as the async proxy sees it

  // fence.proxy.async: all that ordinary stores have written so far can be seen.
  void publish_shared();
  // Fails if ordinary stores have written these bytes and no fence has followed.
  void check_published(const char* what, uint32_t offset, size_t bytes, Place place);
  // A write by the async proxy itself.
  void write(uint32_t offset, const void* bytes, size_t size);
  void poison(uint32_t offset, size_t size);

  // ---- Copies to shared memory

  // `perform` runs when no thread can go on, the latest moment that the hardware may choose, and
  // then `bytes` have come to the barrier at byte `barrier`. The target is 0xFF until then.
  void begin_load(uint32_t barrier, uint32_t offset, size_t bytes, std::function<void()> perform,
                  Place place);

  // ---- For the scheduler

  void open(const Arena& shared);
  // When no thread can go on: performs a load; or else lets those give up that may. False: there is
  // none.
  bool perform_load(std::minstd_rand& random);
  bool let_give_up();
  // What is wrong at the end of the block, or nothing.
  std::string unfinished() const;

  // ---- The sequence of wgmma operations of each warpgroup, which its four warps share. Fails if
  // this warp's next one is not that of the others.
  void check_sequence(int warp, const std::string& operation, Place place);

 private:
  struct Waiter {
    Fiber* fiber;
    bool may_give_up;
    bool* result;
  };
  struct Barrier {
    int expected, pending;
    int64_t bytes = 0;
    unsigned phase = 0;
    Fiber* published_by = nullptr;  // who has to; null once it has
    std::vector<Waiter> waiters;
    uint64_t order[2] = {};  // for ThreadSanitizer, of each parity
  };
  struct Load {
    uint32_t barrier, offset;
    size_t bytes;
    std::function<void()> perform;
    Place place;
  };
  struct Sequence {
    std::vector<std::string> operations;
    size_t done[4] = {};
  };

  Barrier& find(const char* what, const uint64_t* barrier, Place place);
  Barrier& find(const char* what, uint32_t offset, Place place);
  void complete_if_due(Barrier& barrier);
  char* seen();  // the shared memory that the async proxy sees

  const Arena* arena_ = nullptr;
  char* shared_ = nullptr;
  std::map<uint32_t, Barrier> barriers_;
  std::vector<Load> loads_;
  std::vector<char> seen_;
  std::map<int, Sequence> sequences_;
  int fruitless_ = 0;  // times that threads gave up waiting with nothing happening between
};

// Of the running thread's block, and of another of its cluster, which must not have ended.
AsyncProxy& async_proxy();
AsyncProxy& async_proxy_of(const char* what, int rank, Place place);

}  // namespace vitkernels::emulator
