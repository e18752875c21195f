// What ThreadSanitizer and AddressSanitizer must be told of fibers; nothing in ordinary builds.
//
// ThreadSanitizer (VK_EMULATOR_TSAN): a fiber is a thread of its own. Switching orders nothing;
// only what orders threads on the GPU does: barriers, warp-wide operations, mbarriers, a launch's
// start and end. The emulator's files are not instrumented, but malloc and memcpy are intercepted
// even there: Unwatched keeps them out. AddressSanitizer (VK_EMULATOR_ASAN): stacks are announced
// at each switch; what lies between the arrays of shared memory is poisoned.
#pragma once

#include <cstddef>
#include <cstring>

#ifdef VK_EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}
#endif
#ifdef VK_EMULATOR_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, size_t* size);
void __asan_poison_memory_region(const volatile void* address, size_t size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif

namespace vitkernels::emulator {

#ifdef VK_EMULATOR_TSAN

constexpr bool kFreshMemory = true;  // each block has its own stacks and shared memory

// Accesses of the emulator itself, while one of these is in scope, are no accesses of the kernel.
class Unwatched {
 public:
  Unwatched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }  // reads and writes
  ~Unwatched() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
  Unwatched(const Unwatched&) = delete;
};
// The kernel's own, called from inside of that.
class Watched {
 public:
  Watched() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
  ~Watched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
  Watched(const Watched&) = delete;
};

// What came before `release` of an object comes before what follows `acquire`.
inline void release(void* object) { __tsan_release(object); }
inline void acquire(void* object) { __tsan_acquire(object); }

#else

constexpr bool kFreshMemory = false;
struct Unwatched {
  Unwatched() {}
};
struct Watched {
  Watched() {}
};
inline void release(void*) {}
inline void acquire(void*) {}

#endif

// One side of the switches between a scheduler and its fibers.
class SanitizedStack {
 public:
#ifdef VK_EMULATOR_TSAN
  void create() { fiber_ = __tsan_create_fiber(0); }
  void adopt_current() { fiber_ = __tsan_get_current_fiber(); }
  void destroy() { __tsan_destroy_fiber(fiber_); }
#else
  void create() {}
  void adopt_current() {}
  void destroy() {}
#endif

#ifdef VK_EMULATOR_ASAN
  void set_bounds(const void* bottom, size_t size) {
    bottom_ = bottom, size_ = size;
    __asan_unpoison_memory_region(bottom, size);
  }
#else
  void set_bounds(const void*, size_t) {}
#endif

  // Before control goes from this stack to `next`; `ends` when it will never come back.
  void leave_for(SanitizedStack& next, bool ends = false) {
#ifdef VK_EMULATOR_TSAN
    __tsan_switch_to_fiber(next.fiber_, 1);  // 1: it orders nothing
#endif
#ifdef VK_EMULATOR_ASAN
    __sanitizer_start_switch_fiber(ends ? nullptr : &saved_, next.bottom_, next.size_);
#endif
    (void)next, (void)ends;
  }
  // After control has come to this stack from `previous`.
  void entered_from(SanitizedStack& previous) {
#ifdef VK_EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(saved_, &previous.bottom_, &previous.size_);
#endif
    (void)previous;
  }

 private:
  void* fiber_ = nullptr;
  void* saved_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

inline void poison(const void* address, size_t size) {
#ifdef VK_EMULATOR_ASAN
  __asan_poison_memory_region(address, size);
#endif
  (void)address, (void)size;
}
inline void unpoison(const void* address, size_t size) {
#ifdef VK_EMULATOR_ASAN
  __asan_unpoison_memory_region(address, size);
#endif
  (void)address, (void)size;
}

// A copy of shared memory by the emulator itself, poisoned gaps and all: AddressSanitizer would
// report a memcpy of them, and the compiler would make one of a loop without `volatile`.
inline void copy_with_gaps(char* to, const char* from, size_t size) {
#ifdef VK_EMULATOR_ASAN
  const volatile char* source = from;
  for (size_t i = 0; i < size; ++i) to[i] = source[i];
#else
  std::memcpy(to, from, size);
#endif
}

}  // namespace vitkernels::emulator
