// A fibre: a stack of its own and a switch to it and back. One fibre stands for one CUDA thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define FASTRNN_EMU_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

#if defined(__x86_64__)
// Saves the registers a callee must keep, swaps stacks, restores: swapcontext without its system calls.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

class Fiber {
 public:
  static constexpr size_t kStack = 128 * 1024;  // committed by the system as it is touched

  // `body` runs on `stack` at the first resume(); it must not return but end in finish().
  void prepare(char* stack, void (*body)()) {
    stack_ = stack;
#if defined(FASTRNN_EMU_ASAN)
    __asan_unpoison_memory_region(stack, kStack);  // what an abandoned fibre left behind
    fake_ = nullptr;
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack + kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(body);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    sp_ = top;
#else
    getcontext(&here_);
    here_.uc_stack.ss_sp = stack;
    here_.uc_stack.ss_size = kStack;
    makecontext(&here_, body, 0);
#endif
  }

  // From the scheduler into the fibre, until it yields.
  void resume() {
#if defined(FASTRNN_EMU_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, kStack);
#endif
#if defined(__x86_64__)
    switch_stacks(&main().sp, sp_);
#else
    swapcontext(&main().context, &here_);
#endif
#if defined(FASTRNN_EMU_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // First thing on the fibre's stack.
  void entered() {
#if defined(FASTRNN_EMU_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &main().bottom, &main().size);
#endif
  }

  // From the fibre back to the scheduler; the last time with last = true.
  void yield(bool last = false) {
    (void)last;
#if defined(FASTRNN_EMU_ASAN)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_, main().bottom, main().size);
#endif
#if defined(__x86_64__)
    switch_stacks(&sp_, main().sp);
#else
    swapcontext(&here_, &main().context);
#endif
#if defined(FASTRNN_EMU_ASAN)
    __sanitizer_finish_switch_fiber(fake_, &main().bottom, &main().size);
#endif
  }

 private:
  struct Main {
    void* sp = nullptr;
    const void* bottom = nullptr;
    size_t size = 0;
#if !defined(__x86_64__)
    ucontext_t context;
#endif
  };
  static Main& main() {
    static Main m;
    return m;
  }

  char* stack_ = nullptr;
  void* sp_ = nullptr;
  void* fake_ = nullptr;
#if !defined(__x86_64__)
  ucontext_t here_;
#endif
};

// Stacks are kept from one launch to the next.
class Stacks {
 public:
  char* at(size_t i) {
    while (stacks_.size() <= i) {
      void* p = mmap(nullptr, Fiber::kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (p == MAP_FAILED) std::abort();
      stacks_.push_back(static_cast<char*>(p));
    }
    return stacks_[i];
  }

 private:
  std::vector<char*> stacks_;
};

}  // namespace emu
