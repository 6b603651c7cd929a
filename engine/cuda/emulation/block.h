// How a grid of CUDA threads runs on one CPU thread: every CUDA thread of a block is a fiber, blocks run one after the
// other. Kernels see this only through the intrinsics of intrinsics.h.
//
// What aborts, with both source lines where two are involved: a block barrier not all threads of the block reach, a
// warp collective not all lanes of the warp reach or reach at different places, a thread that ends while others wait
// for it, a misaligned vector or matrix access, a cp.async nobody waited for.
//
// A thread of a kernel that may start early and ends without having waited for the kernels in front aborts, too.
//
// What is made visible: shared memory is filled with NaN before each block; a cp.async moves its bytes only when its
// thread waits for them; threads and blocks run in the order of SetOrder, so nothing may lean on one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minitron::engine::cuda {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

// A place in a kernel's source. As a default argument Where::Current() is the place of the call.
struct Where {
  const char* file;
  int line;
  static constexpr Where Current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

inline constexpr unsigned kWarpSize = 32;
inline constexpr unsigned kMaxThreadsPerBlock = 1024;
inline constexpr size_t kMaxSharedBytes = 99 << 10;  // of the smallest architecture built for (sm_89)

// Order in which the fibers of a block, and the blocks of a grid, get their turns.
enum class Order { kForward, kReverse, kRandom };
void SetOrder(Order order, uint64_t seed = 1);

struct GridShape {
  Dim3 grid, block;
  size_t shared_bytes = 0;
  bool early = false;  // every thread has to call BeginThread
};
// Runs body(argument) once per CUDA thread and returns when all have ended.
// Requires: block and grid not empty, at most kMaxThreadsPerBlock threads, shared_bytes <= kMaxSharedBytes.
void RunGrid(const GridShape& shape, void (*body)(void*), void* argument);

// Prints what went wrong, in which block and thread, and aborts.
[[noreturn]] void Die(const char* what, const Where& where);

// --- Called from inside a kernel. ---

void BeginThread();
Dim3 ThreadIndex();
Dim3 BlockIndex();
Dim3 BlockDim();
Dim3 GridDim();
unsigned LaneIndex();
unsigned char* SharedMemory();

void BlockBarrier(const Where& where);

// One lane's contribution to a warp collective, and its result.
inline constexpr size_t kSlotBytes = 64;
struct alignas(16) Slot {
  unsigned char bytes[kSlotBytes];
};

// Waits until every lane of the warp is here with `num_bytes` of input, runs compute(slots) once for the warp, and
// returns the 32 slots; they stay valid until the lane's next collective. `compute` may be null.
const Slot* WarpCollective(const void* input, size_t num_bytes, void (*compute)(Slot*), const Where& where);

// The asynchronous copies of the calling thread.
struct PendingCopy {
  void* destination;
  const void* source;
  bool valid;  // false: zeros are written
};
void PushCopy(const PendingCopy& copy);
void CommitCopies();
// Takes the oldest copy of all groups but the `num_groups_left` newest; false when there is none.
bool PopCopy(int num_groups_left, PendingCopy& copy);

// The arithmetic of one warp collective over its slots, in place. Input: each lane's registers; output likewise.
void ComputeLoadMatrix(Slot* slots);            // one 16-byte row -> four registers
void ComputeLoadMatrixTransposed(Slot* slots);  // the same, each 8x8 matrix transposed
void ComputeTransposeMatrix(Slot* slots);       // one register of an 8x8 matrix -> its transposed
void ComputeMmaBf16(Slot* slots);               // a[4], b[2], c[4] -> c[4]

}  // namespace emulation
}  // namespace minitron::engine::cuda
