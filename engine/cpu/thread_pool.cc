#include "engine/cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "engine/base/check.h"

namespace minitron::engine::cpu {
namespace {

// Polls before sleeping: a step has hundreds of loops a few microseconds apart, and waking a sleeper costs as much as
// many of them. About 20 us on a 3 GHz core; on a machine with other work the sleep gives the core away.
constexpr int kPolls = 1000;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns once `value` differs from `old`.
void WaitForChange(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kPolls; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    Pause();
  }
  value.wait(old, std::memory_order_acquire);
}

constexpr int64_t NumRanges(int64_t count, int64_t grain) { return (count + grain - 1) / grain; }

constexpr uint64_t Ticket(uint32_t loop, uint32_t unclaimed) { return uint64_t{loop} << 32 | unclaimed; }

}  // namespace

ThreadPool::ThreadPool(int num_threads, std::vector<std::vector<int>> thread_cpus)
    : thread_cpus_(std::move(thread_cpus)) {
  CHECK(num_threads >= 1 && (thread_cpus_.empty() || static_cast<int>(thread_cpus_.size()) == num_threads));
  parts_ = std::make_unique<Part[]>(num_threads);
  workers_.reserve(num_threads - 1);
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { WorkerMain(thread); });
  }
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  announced_.fetch_add(1);
  announced_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int64_t count, int64_t grain, Trampoline trampoline, const void* function) {
  CHECK(grain > 0);
  if (count <= 0) return;
  const int64_t num_ranges = NumRanges(count, grain);
  CHECK(num_ranges <= std::numeric_limits<uint32_t>::max());
  if (workers_.empty() || num_ranges == 1) {
    for (int64_t begin = 0; begin < count; begin += grain) {
      trampoline(function, begin, std::min(begin + grain, count), 0);
    }
    return;
  }
  count_.store(count, std::memory_order_relaxed);
  grain_.store(grain, std::memory_order_relaxed);
  trampoline_.store(trampoline, std::memory_order_relaxed);
  function_.store(function, std::memory_order_relaxed);
  ranges_left_.store(static_cast<uint32_t>(num_ranges), std::memory_order_relaxed);
  const uint32_t loop = announced_.load(std::memory_order_relaxed) + 1;
  for (int part = 0; part < num_threads(); ++part) {
    const int64_t size = PartEnd(num_ranges, part) - PartEnd(num_ranges, part - 1);
    parts_[part].ticket.store(Ticket(loop, static_cast<uint32_t>(size)), std::memory_order_release);
  }
  announced_.store(loop, std::memory_order_release);
  announced_.notify_all();
  RunRanges(loop, 0);
  for (uint32_t left = ranges_left_.load(std::memory_order_acquire); left != 0;
       left = ranges_left_.load(std::memory_order_acquire)) {
    WaitForChange(ranges_left_, left);
  }
}

int64_t ThreadPool::PartEnd(int64_t num_ranges, int part) const { return num_ranges * (part + 1) / num_threads(); }

void ThreadPool::RunRanges(uint32_t loop, int thread) {
  // What is left is told once, not per range: the counter's cache line travels between the cores each time.
  uint32_t done = 0;
  for (int i = 0; i < num_threads(); ++i) done += RunPart(loop, thread, (thread + i) % num_threads());
  if (done != 0 && ranges_left_.fetch_sub(done, std::memory_order_acq_rel) == done) ranges_left_.notify_one();
}

uint32_t ThreadPool::RunPart(uint32_t loop, int thread, int part) {
  uint32_t done = 0;
  std::atomic<uint64_t>& shared = parts_[part].ticket;
  uint64_t ticket = shared.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(ticket >> 32) == loop && static_cast<uint32_t>(ticket) != 0) {
    // Acquire keeps these reads in front of the claim that makes them valid.
    const int64_t count = count_.load(std::memory_order_acquire);
    const int64_t grain = grain_.load(std::memory_order_acquire);
    const Trampoline trampoline = trampoline_.load(std::memory_order_acquire);
    const void* function = function_.load(std::memory_order_acquire);
    if (!shared.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      continue;
    }
    const int64_t begin = (PartEnd(NumRanges(count, grain), part) - static_cast<uint32_t>(ticket)) * grain;
    trampoline(function, begin, std::min(begin + grain, count), thread);
    ++done;
    ticket = shared.load(std::memory_order_acquire);
  }
  return done;
}

void ThreadPool::StayOnCpus(int thread) const {
  if (thread_cpus_.empty()) return;
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  for (const int cpu : thread_cpus_[thread]) {
    if (cpu < CPU_SETSIZE) CPU_SET(cpu, &cpus);
  }
  // Refused when the CPUs were taken from the process since: the thread is then slower, not wrong.
  static_cast<void>(sched_setaffinity(0, sizeof(cpus), &cpus));
}

void ThreadPool::CallInPlace(const std::function<void()>& function) const {
  std::thread caller([&] {
    PlaceCaller();
    function();
  });
  caller.join();
}

void ThreadPool::WorkerMain(int thread) {
  StayOnCpus(thread);
  uint32_t seen = 0;
  while (true) {
    WaitForChange(announced_, seen);
    seen = announced_.load(std::memory_order_acquire);
    if (stopping_.load()) return;
    RunRanges(seen, thread);
  }
}

}  // namespace minitron::engine::cpu
