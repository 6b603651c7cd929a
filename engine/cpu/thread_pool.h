// ThreadPool: fixed workers that share the ranges of one loop at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace minitron::engine::cpu {

// One loop at a time, called from one thread. Every thread has a contiguous part of the loop, of which it claims range
// after range in ascending order, so that it reads memory as one stream; whoever is done goes on with what is left of
// the others' parts. Which thread runs a range is random: what is computed for an index must not depend on it.
class ThreadPool {
 public:
  // Starts num_threads - 1 workers (>= 1 thread; the caller is one of them). With `thread_cpus` worker t stays on the
  // CPUs thread_cpus[t] (cpu_topology.h), so that a part of a loop, and the memory that is first touched in it, belong
  // to one memory node.
  explicit ThreadPool(int num_threads, std::vector<std::vector<int>> thread_cpus = {});
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Keeps the calling thread, which is to call ParallelFor, on the CPUs of thread 0; for good.
  void PlaceCaller() const { StayOnCpus(0); }

  // Calls function() on a new thread in the place of thread 0 and waits for it: for a caller that goes on to other
  // things, whose own threads would inherit its place. The function may call ParallelFor.
  void CallInPlace(const std::function<void()>& function) const;

  // Calls function(begin, end, thread) over disjoint ranges of `grain` indices (the last may be shorter) that cover
  // [0, count); thread in [0, num_threads). Returns when all are done. Never allocates. One range runs on the caller.
  template <typename Function>
  void ParallelFor(int64_t count, int64_t grain, const Function& function) {
    Run(count, grain, &Call<Function>, &function);
  }

 private:
  using Trampoline = void (*)(const void* function, int64_t begin, int64_t end, int thread);

  template <typename Function>
  static void Call(const void* function, int64_t begin, int64_t end, int thread) {
    (*static_cast<const Function*>(function))(begin, end, thread);
  }

  void Run(int64_t count, int64_t grain, Trampoline trampoline, const void* function);
  void RunRanges(uint32_t loop, int thread);
  uint32_t RunPart(uint32_t loop, int thread, int part);  // returns how many ranges it ran
  int64_t PartEnd(int64_t num_ranges, int part) const;    // first range that is not in `part` or one before it
  void WorkerMain(int thread);
  void StayOnCpus(int thread) const;

  const std::vector<std::vector<int>> thread_cpus_;  // empty: anywhere

  // The loop at hand. Written by the caller before the tickets announce it; a worker that read them while they changed
  // cannot claim a range of its loop any more and drops what it read.
  std::atomic<int64_t> count_{0};
  std::atomic<int64_t> grain_{1};
  std::atomic<Trampoline> trampoline_{nullptr};
  std::atomic<const void*> function_{nullptr};
  struct alignas(64) Part {
    std::atomic<uint64_t> ticket{0};  // High half: number of the loop. Low half: ranges not claimed yet.
  };
  std::unique_ptr<Part[]> parts_;                     // one per thread
  alignas(64) std::atomic<uint32_t> ranges_left_{0};  // not finished
  alignas(64) std::atomic<uint32_t> announced_{0};    // number of the latest loop; workers sleep on it
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace minitron::engine::cpu
