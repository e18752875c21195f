// Switching between stacks. swapcontext saves the signal mask with a system call, which is nearly
// all its time; ten instructions of assembly do for x86-64 (System V ABI) and AArch64 (AAPCS64).
// Elsewhere, ucontext.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#if !defined(VK_EMULATOR_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define VK_EMULATOR_UCONTEXT
#endif
#ifdef VK_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace vitkernels::emulator {

// Memory for one fiber, with a guard page below it: an overflow faults instead of reaching a
// neighbour.
class Stack {
 public:
  static constexpr size_t kBytes = 128 << 10;

  Stack() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    base_ = static_cast<char*>(
        mmap(nullptr, kBytes + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_, page_, PROT_NONE);
  }
  ~Stack() { munmap(base_, kBytes + page_); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* low() const { return base_ + page_; }
  char* high() const { return base_ + page_ + kBytes; }

#ifdef VK_EMULATOR_UCONTEXT
  ucontext_t context;
#endif

 private:
  size_t page_;
  char* base_;
};

#ifndef VK_EMULATOR_UCONTEXT

// Saves the callee-saved registers and the stack pointer, and goes on with those of the other
// stack.
extern "C" void vk_emulator_switch(void** save, void* next);

#ifdef __x86_64__
asm(R"(
  .text
  .p2align 4
  .hidden vk_emulator_switch
  .globl vk_emulator_switch
  .type vk_emulator_switch, @function
vk_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size vk_emulator_switch, .-vk_emulator_switch
)");

inline void* first_frame(const Stack& stack, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(stack.high());
  top[-1] = 0;  // the entry's return address, so that the stack is aligned as after a call
  top[-2] = reinterpret_cast<uint64_t>(entry);
  std::memset(top - 8, 0, 6 * sizeof(uint64_t));
  return top - 8;
}
#else
asm(R"(
  .text
  .p2align 4
  .hidden vk_emulator_switch
  .globl vk_emulator_switch
  .type vk_emulator_switch, %function
vk_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size vk_emulator_switch, .-vk_emulator_switch
)");

inline void* first_frame(const Stack& stack, void (*entry)()) {
  char* frame = stack.high() - 160;
  std::memset(frame, 0, 160);
  std::memcpy(frame + 88, &entry, sizeof(entry));  // x30, where ret goes
  return frame;
}
#endif

#else  // ucontext: the "stack pointer" is the address of a ucontext_t

inline void vk_emulator_switch(void** save, void* next) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(next));
}

inline void* first_frame(Stack& stack, void (*entry)()) {
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = stack.low();
  stack.context.uc_stack.ss_size = Stack::kBytes;
  stack.context.uc_link = nullptr;
  makecontext(&stack.context, entry, 0);
  return &stack.context;
}

#endif

}  // namespace vitkernels::emulator
