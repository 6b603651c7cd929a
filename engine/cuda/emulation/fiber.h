// Fiber: a stack and a saved stack pointer, switched to without a system call. x86-64, System V calling convention.
// The one place that talks to the sanitizers about stacks, so nothing above it knows which one is there.
#pragma once

#include <cstddef>

namespace minitron::engine::cuda::emulation {

// Not thread-safe; a fiber is entered and left on one thread. Owns its stack.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next Enter start `entry` from its top. `entry` must not return: it ends with Leave().
  void Reset(void (*entry)());
  // Switches from the scheduler to this fiber; returns at the fiber's next Leave().
  void Enter();
  // Switches from this fiber back to the scheduler.
  void Leave();

 private:
  unsigned char* stack_;
  void* stack_pointer_ = nullptr;
  void* scheduler_stack_pointer_ = nullptr;
  void* sanitizer_fiber_ = nullptr;            // ThreadSanitizer's notion of this fiber
  void* scheduler_sanitizer_fiber_ = nullptr;  // and of who entered it
};

// Orders memory between fibers for ThreadSanitizer: what happened before Release(p) is visible after Acquire(p).
// No-ops without it. Fiber switches themselves order nothing, as CUDA threads order nothing without a barrier.
void Release(void* sync_object);
void Acquire(void* sync_object);

// Whether ThreadSanitizer watches, and so memory must not be reused between blocks.
bool HasThreadSanitizer();

// Marks memory as (not) to be touched for AddressSanitizer; no-ops without it.
void Poison(void* begin, size_t num_bytes);
void Unpoison(void* begin, size_t num_bytes);

}  // namespace minitron::engine::cuda::emulation
