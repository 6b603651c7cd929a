#include "engine/cuda/emulation/block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "engine/base/check.h"
#include "engine/cuda/emulation/fiber.h"

// Compiled without sanitizers: its own bookkeeping is shared by all fibers and must not look like a race of the kernel.
// For the same reason every container here holds a type of this file's anonymous namespace.
namespace minitron::engine::cuda::emulation {
namespace {

enum class State { kRunning, kAtBarrier, kAtCollective, kDone };

struct Copy {
  PendingCopy copy;
};
struct GroupEnd {
  size_t index;  // copies before it are in the group or an older one
};

struct CudaThread {
  Fiber fiber;
  State state = State::kRunning;
  bool begun = false;
  Where where = Where::Current();  // of the barrier or collective it waits at
  Dim3 index;
  unsigned lane = 0;
  unsigned warp = 0;
  std::vector<Copy> copies;
  std::vector<GroupEnd> groups;
  size_t num_popped = 0;
};

struct Warp {
  unsigned num_lanes = 0;
  unsigned num_arrived = 0;
  unsigned generation = 0;
  void (*compute)(Slot*) = nullptr;
  // Alternating: a lane may reach the next collective while a slower one still reads this one's slots. The same holds
  // for the objects ThreadSanitizer orders by: with one, a late waiter would acquire the next release.
  Slot slots[2][kWarpSize];
  char sync[2][8];
};

struct ThreadBox {
  std::unique_ptr<CudaThread> thread;
};

// Everything of the grid that is running.
struct Runner {
  std::vector<ThreadBox> threads;
  std::vector<Warp> warps;
  unsigned num_threads = 0;
  unsigned num_at_barrier = 0;
  unsigned num_done = 0;
  unsigned barrier_generation = 0;
  char barrier_sync[2][8] = {};
  char block_start = 0, block_end = 0;  // sync objects
  Dim3 grid, block, block_index;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  bool early = false;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  CudaThread* current = nullptr;
};

struct OrderSetting {
  Order order = Order::kForward;
  uint64_t seed = 1;
};

struct Index {
  unsigned value;
};

thread_local Runner* runner = nullptr;
OrderSetting order_setting;

constexpr size_t kSharedGuardBytes = 1 << 10;  // poisoned on both sides

CudaThread& Current() { return *runner->current; }

void Wait(State state, const Where& where) {
  CudaThread& thread = Current();
  thread.state = state;
  thread.where = where;
  thread.fiber.Leave();
}

void ThreadMain() {
  Acquire(&runner->block_start);
  runner->body(runner->argument);
  if (runner->early && !Current().begun) {
    Die("a kernel that may start early did not call BeginKernel", Where::Current());
  }
  if (Current().num_popped < Current().copies.size()) {
    Die("the thread ended with a cp.async it never waited for", Where::Current());
  }
  Release(&runner->block_end);
  Current().state = State::kDone;
  Current().fiber.Leave();
  std::abort();  // a finished thread is not entered again
}

// Shared memory of one block: NaN everywhere, poisoned around. Under ThreadSanitizer every block gets fresh memory, as
// reuse would look like a race between blocks.
class SharedBuffer {
 public:
  unsigned char* Take(size_t num_bytes) {
    const size_t rounded = (num_bytes + 127) / 128 * 128;
    const size_t wanted = rounded + 2 * kSharedGuardBytes;
    if (memory_ == nullptr || size_ < wanted || HasThreadSanitizer()) {
      if (!HasThreadSanitizer()) Free();  // else kept until the end: an address must not come back
      void* memory = nullptr;
      CHECK(posix_memalign(&memory, 128, wanted) == 0);
      memory_ = static_cast<unsigned char*>(memory);
      size_ = wanted;
      if (HasThreadSanitizer()) retired_.push_back({memory_});
    }
    Unpoison(memory_, size_);
    std::memset(memory_, 0xFF, size_);
    unsigned char* begin = memory_ + kSharedGuardBytes;
    Poison(memory_, kSharedGuardBytes);
    Poison(begin + num_bytes, size_ - kSharedGuardBytes - num_bytes);
    return begin;
  }
  // The first byte outside that was changed, or null.
  const unsigned char* FindOverrun(const unsigned char* begin, size_t num_bytes) const {
    for (const unsigned char* p = memory_; p < memory_ + size_; ++p) {
      if (p == begin) p += num_bytes;
      if (*p != 0xFF) return p;
    }
    return nullptr;
  }
  ~SharedBuffer() {
    if (!HasThreadSanitizer()) Free();
    for (const Retired& retired : retired_) std::free(retired.memory);
  }

 private:
  struct Retired {
    unsigned char* memory;
  };
  void Free() {
    if (memory_ == nullptr) return;
    Unpoison(memory_, size_);
    std::free(memory_);
    memory_ = nullptr;
  }
  unsigned char* memory_ = nullptr;
  size_t size_ = 0;
  std::vector<Retired> retired_;
};

[[noreturn]] void DieOfDivergence(const char* what, const CudaThread& a, const CudaThread& b) {
  std::fprintf(stderr, "emulation: %s: thread %u at %s:%d, thread %u ", what, a.index.x, a.where.file, a.where.line,
               b.index.x);
  if (b.state == State::kDone) {
    std::fprintf(stderr, "has ended\n");
  } else {
    std::fprintf(stderr, "at %s:%d\n", b.where.file, b.where.line);
  }
  std::abort();
}

bool SamePlace(const Where& a, const Where& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// All lanes of the warp are at a collective: computes it and lets them run on.
void CompleteCollective(unsigned warp_index) {
  Warp& warp = runner->warps[warp_index];
  const unsigned first = warp_index * kWarpSize;
  const CudaThread& leader = *runner->threads[first].thread;
  for (unsigned lane = 1; lane < warp.num_lanes; ++lane) {
    const CudaThread& thread = *runner->threads[first + lane].thread;
    if (!SamePlace(leader.where, thread.where)) DieOfDivergence("divergent warp collective", leader, thread);
  }
  if (warp.compute != nullptr) {
    if (warp.num_lanes != kWarpSize) Die("matrix instruction in a warp with fewer than 32 lanes", leader.where);
    warp.compute(warp.slots[warp.generation & 1]);
  }
  warp.num_arrived = 0;
  ++warp.generation;
  for (unsigned lane = 0; lane < warp.num_lanes; ++lane) runner->threads[first + lane].thread->state = State::kRunning;
}

void CompleteBarrier() {
  const CudaThread& leader = *runner->threads[0].thread;
  for (unsigned i = 1; i < runner->num_threads; ++i) {
    const CudaThread& thread = *runner->threads[i].thread;
    if (!SamePlace(leader.where, thread.where)) DieOfDivergence("divergent block barrier", leader, thread);
  }
  runner->num_at_barrier = 0;
  ++runner->barrier_generation;
  for (unsigned i = 0; i < runner->num_threads; ++i) runner->threads[i].thread->state = State::kRunning;
}

// Nobody can run and somebody waits: names one waiting thread and one that will never join it.
[[noreturn]] void DieOfDeadlock() {
  unsigned waiting = 0;
  while (runner->threads[waiting].thread->state == State::kDone) ++waiting;
  const CudaThread& a = *runner->threads[waiting].thread;
  unsigned other = waiting;
  for (unsigned i = 0; i < runner->num_threads; ++i) {
    const CudaThread& b = *runner->threads[i].thread;
    if (b.state != a.state || !SamePlace(a.where, b.where)) other = i;
  }
  DieOfDivergence(a.state == State::kAtBarrier ? "divergent block barrier" : "divergent warp collective", a,
                  *runner->threads[other].thread);
}

void PrepareBlock(SharedBuffer& shared) {
  Runner& r = *runner;
  r.shared = shared.Take(r.shared_bytes);
  r.num_at_barrier = r.num_done = 0;
  for (size_t w = 0; w < r.warps.size(); ++w) {
    r.warps[w].num_lanes = std::min<unsigned>(kWarpSize, r.num_threads - static_cast<unsigned>(w) * kWarpSize);
    r.warps[w].num_arrived = r.warps[w].generation = 0;
  }
  for (unsigned i = 0; i < r.num_threads; ++i) {
    CudaThread& thread = *r.threads[i].thread;
    thread.state = State::kRunning;
    thread.begun = false;
    thread.index = {i % r.block.x, i / r.block.x % r.block.y, i / (r.block.x * r.block.y)};
    thread.lane = i % kWarpSize;
    thread.warp = i / kWarpSize;
    thread.copies.clear();
    thread.groups.clear();
    thread.num_popped = 0;
    thread.fiber.Reset(&ThreadMain);
  }
  Release(&r.block_start);
}

void RunBlock(SharedBuffer& shared, std::vector<Index>& order, std::mt19937_64& random) {
  Runner& r = *runner;
  PrepareBlock(shared);
  while (r.num_done < r.num_threads) {
    if (order_setting.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (const Index& i : order) {
      CudaThread& thread = *r.threads[i.value].thread;
      if (thread.state != State::kRunning) continue;
      progress = true;
      r.current = &thread;
      thread.fiber.Enter();
      if (thread.state == State::kDone) ++r.num_done;
      if (thread.state == State::kAtBarrier && ++r.num_at_barrier == r.num_threads) CompleteBarrier();
      if (thread.state == State::kAtCollective) {
        Warp& warp = r.warps[thread.warp];
        if (++warp.num_arrived == warp.num_lanes) CompleteCollective(thread.warp);
      }
    }
    if (!progress && r.num_done < r.num_threads) DieOfDeadlock();
  }
  Acquire(&r.block_end);
  if (shared.FindOverrun(r.shared, r.shared_bytes) != nullptr) {
    Die("the block wrote outside its shared memory", Where::Current());
  }
}

// Fibers are kept from grid to grid: a stack is cheap to keep and dear to make.
void EnsureThreads(Runner& r) {
  while (r.threads.size() < r.num_threads) r.threads.push_back({std::make_unique<CudaThread>()});
  r.warps.resize((r.num_threads + kWarpSize - 1) / kWarpSize);
}

}  // namespace

void SetOrder(Order order, uint64_t seed) { order_setting = {order, seed}; }

void RunGrid(const GridShape& shape, void (*body)(void*), void* argument) {
  const Dim3 grid = shape.grid, block = shape.block;
  static thread_local Runner kept;
  CHECK(runner == nullptr);  // a kernel cannot start kernels
  runner = &kept;
  Runner& r = kept;
  r.grid = grid;
  r.block = block;
  r.shared_bytes = shape.shared_bytes;
  r.early = shape.early;
  r.body = body;
  r.argument = argument;
  r.num_threads = block.x * block.y * block.z;
  CHECK(r.num_threads > 0 && r.num_threads <= kMaxThreadsPerBlock && shape.shared_bytes <= kMaxSharedBytes);
  EnsureThreads(r);
  std::mt19937_64 random(order_setting.seed);
  std::vector<Index> order(r.num_threads);
  for (unsigned i = 0; i < r.num_threads; ++i) {
    order[i].value = order_setting.order == Order::kReverse ? r.num_threads - 1 - i : i;
  }
  const unsigned num_blocks = grid.x * grid.y * grid.z;
  std::vector<Index> blocks(num_blocks);
  for (unsigned i = 0; i < num_blocks; ++i) {
    blocks[i].value = order_setting.order == Order::kReverse ? num_blocks - 1 - i : i;
  }
  if (order_setting.order == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), random);
  SharedBuffer shared;
  for (const Index& b : blocks) {
    r.block_index = {b.value % grid.x, b.value / grid.x % grid.y, b.value / (grid.x * grid.y)};
    RunBlock(shared, order, random);
  }
  r.current = nullptr;
  runner = nullptr;
}

void Die(const char* what, const Where& where) {
  std::fprintf(stderr, "emulation: %s", what);
  if (runner != nullptr && runner->current != nullptr) {
    const Dim3 block = runner->block_index, thread = runner->current->index;
    std::fprintf(stderr, ": block (%u, %u, %u) thread (%u, %u, %u)", block.x, block.y, block.z, thread.x, thread.y,
                 thread.z);
  }
  std::fprintf(stderr, " at %s:%d\n", where.file, where.line);
  std::abort();
}

void BeginThread() { Current().begun = true; }
Dim3 ThreadIndex() { return Current().index; }
Dim3 BlockIndex() { return runner->block_index; }
Dim3 BlockDim() { return runner->block; }
Dim3 GridDim() { return runner->grid; }
unsigned LaneIndex() { return Current().lane; }
unsigned char* SharedMemory() { return runner->shared; }

void BlockBarrier(const Where& where) {
  void* sync = runner->barrier_sync[runner->barrier_generation & 1];
  Release(sync);
  Wait(State::kAtBarrier, where);
  Acquire(sync);
}

const Slot* WarpCollective(const void* input, size_t num_bytes, void (*compute)(Slot*), const Where& where) {
  CHECK(num_bytes <= kSlotBytes);
  Warp& warp = runner->warps[Current().warp];
  const unsigned parity = warp.generation & 1;
  void* sync = warp.sync[parity];
  if (num_bytes > 0) std::memcpy(warp.slots[parity][Current().lane].bytes, input, num_bytes);
  warp.compute = compute;
  Release(sync);
  Wait(State::kAtCollective, where);
  Acquire(sync);
  return warp.slots[parity];
}

void PushCopy(const PendingCopy& copy) { Current().copies.push_back({copy}); }
void CommitCopies() { Current().groups.push_back({Current().copies.size()}); }

bool PopCopy(int num_groups_left, PendingCopy& copy) {
  CudaThread& thread = Current();
  const size_t left = static_cast<size_t>(num_groups_left);
  if (thread.groups.size() <= left) return false;
  if (thread.num_popped >= thread.groups[thread.groups.size() - 1 - left].index) return false;
  copy = thread.copies[thread.num_popped++].copy;
  return true;
}

}  // namespace minitron::engine::cuda::emulation
