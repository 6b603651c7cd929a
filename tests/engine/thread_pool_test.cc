#include "engine/cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace minitron::engine::cpu {
namespace {

TEST(ThreadPoolTest, EveryIndexRunsExactlyOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (const int64_t count : {0, 1, 2, 7, 64, 1000}) {
      for (const int64_t grain : {1, 3, 64, 5000}) {
        std::vector<int> runs(count, 0);
        pool.ParallelFor(count, grain, [&](int64_t begin, int64_t end, int) {
          for (int64_t i = begin; i < end; ++i) ++runs[i];
        });
        EXPECT_EQ(runs, std::vector<int>(count, 1)) << threads << " threads, count " << count << ", grain " << grain;
      }
    }
  }
}

TEST(ThreadPoolTest, RangesStartAtMultiplesOfTheGrain) {
  ThreadPool pool(3);
  std::atomic<int> wrong{0};
  pool.ParallelFor(103, 10, [&](int64_t begin, int64_t end, int) {
    if (begin % 10 != 0 || end != std::min<int64_t>(begin + 10, 103)) ++wrong;
  });
  EXPECT_EQ(wrong.load(), 0);
}

TEST(ThreadPoolTest, ThreadNumbersAreInRangeAndNotSharedAtTheSameTime) {
  ThreadPool pool(4);
  std::vector<std::atomic<int>> busy(4);
  std::atomic<int> wrong{0};
  pool.ParallelFor(2000, 1, [&](int64_t, int64_t, int thread) {
    if (thread < 0 || thread >= 4 || busy[thread].fetch_add(1) != 0) ++wrong;
    busy[thread].fetch_sub(1);
  });
  EXPECT_EQ(wrong.load(), 0);
}

// A worker that wakes late must never run a range of an earlier loop: its function is gone by then.
TEST(ThreadPoolTest, ThousandsOfShortLoopsStayApart) {
  ThreadPool pool(4);
  for (int64_t loop = 0; loop < 20000; ++loop) {
    std::atomic<int64_t> sum{0};
    const int64_t count = 1 + loop % 5;
    pool.ParallelFor(count, 1, [&sum, loop](int64_t begin, int64_t, int) { sum += loop + begin; });
    ASSERT_EQ(sum.load(), count * loop + count * (count - 1) / 2);
  }
}

TEST(ThreadPoolTest, WhatWorkersWroteIsVisibleAfterTheLoop) {
  ThreadPool pool(3);
  std::vector<int64_t> values(512);
  for (int64_t round = 0; round < 200; ++round) {
    pool.ParallelFor(512, 8, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) values[i] = round + i;
    });
    for (int64_t i = 0; i < 512; ++i) ASSERT_EQ(values[i], round + i);
  }
}

// The CPUs that the calling thread may run on.
std::vector<int> OwnCpus() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  EXPECT_EQ(sched_getaffinity(0, sizeof(allowed), &allowed), 0);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
  }
  return cpus;
}

TEST(ThreadPoolTest, ThreadsStayOnTheCpusTheyAreGivenAndTheCallerWhenAsked) {
  const std::vector<int> all = OwnCpus();
  const std::vector<std::vector<int>> given = {{all.front()}, {all.back()}, {all.front()}};
  std::vector<std::vector<int>> seen(3), before(1);
  ThreadPool pool(3, given);
  before[0] = OwnCpus();
  pool.CallInPlace([&] {
    // A range for each thread: none is done before all have begun.
    std::atomic<int> begun{0};
    pool.ParallelFor(3, 1, [&](int64_t, int64_t, int thread) {
      seen[thread] = OwnCpus();
      for (++begun; begun.load() < 3;) std::this_thread::yield();
    });
  });
  EXPECT_EQ(before[0], all);
  EXPECT_EQ(seen, given);
  EXPECT_EQ(OwnCpus(), all);
}

}  // namespace
}  // namespace minitron::engine::cpu
