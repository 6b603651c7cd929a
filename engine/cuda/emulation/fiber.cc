#include "engine/cuda/emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>

#include "engine/base/check.h"

// The sanitizers' hooks are weak: this file is compiled without instrumentation and serves every build.
// NOLINTBEGIN(bugprone-reserved-identifier,readability-identifier-naming): the sanitizers' names
extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* sync_object);
__attribute__((weak)) void __tsan_release(void* sync_object);
__attribute__((weak)) void __asan_poison_memory_region(void const volatile* begin, size_t num_bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(void const volatile* begin, size_t num_bytes);

// Saves the callee-saved registers on the current stack and its pointer in *save, then continues on the stack `load`.
void minitron_switch_stack(void** save, void* load);
}
// NOLINTEND(bugprone-reserved-identifier,readability-identifier-naming)

#if !defined(__x86_64__)
#error "the emulation's context switch is written for x86-64"
#endif
asm(R"(
.text
.globl minitron_switch_stack
.type minitron_switch_stack, @function
minitron_switch_stack:
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
.size minitron_switch_stack, .-minitron_switch_stack
)");

namespace minitron::engine::cuda::emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // kernels keep tiles in local arrays; sanitizers widen the frames
constexpr size_t kGuardBytes = 4 << 10;    // below the stack: an overflow faults instead of corrupting a neighbour
constexpr int kNumSavedRegisters = 6;      // what minitron_switch_stack pops before it returns
constexpr unsigned kTsanNoSync = 1;        // a switch is not a synchronisation

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  CHECK(memory != MAP_FAILED);
  CHECK(mprotect(memory, kGuardBytes, PROT_NONE) == 0);
  stack_ = static_cast<unsigned char*>(memory);
  if (__tsan_create_fiber != nullptr) sanitizer_fiber_ = __tsan_create_fiber(0);
}

Fiber::~Fiber() {
  if (sanitizer_fiber_ != nullptr) __tsan_destroy_fiber(sanitizer_fiber_);
  Unpoison(stack_ + kGuardBytes, kStackBytes);  // frames left behind by fibers that were not run to their end
  munmap(stack_, kGuardBytes + kStackBytes);
}

void Fiber::Reset(void (*entry)()) {
  // What a switch pops: six registers, then the address to return to. The slot above makes the stack look as a call
  // leaves it: 16-byte aligned before the return address was pushed.
  void** top = reinterpret_cast<void**>(stack_ + kGuardBytes + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kNumSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::Enter() {
  if (sanitizer_fiber_ != nullptr) {
    scheduler_sanitizer_fiber_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(sanitizer_fiber_, kTsanNoSync);
  }
  minitron_switch_stack(&scheduler_stack_pointer_, stack_pointer_);
}

void Fiber::Leave() {
  if (sanitizer_fiber_ != nullptr) __tsan_switch_to_fiber(scheduler_sanitizer_fiber_, kTsanNoSync);
  minitron_switch_stack(&stack_pointer_, scheduler_stack_pointer_);
}

void Release(void* sync_object) {
  if (__tsan_release != nullptr) __tsan_release(sync_object);
}

void Acquire(void* sync_object) {
  if (__tsan_acquire != nullptr) __tsan_acquire(sync_object);
}

bool HasThreadSanitizer() { return __tsan_create_fiber != nullptr; }

void Poison(void* begin, size_t num_bytes) {
  if (__asan_poison_memory_region != nullptr) __asan_poison_memory_region(begin, num_bytes);
}

void Unpoison(void* begin, size_t num_bytes) {
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(begin, num_bytes);
}

}  // namespace minitron::engine::cuda::emulation
