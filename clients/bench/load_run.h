// RunLoad: sends the requests of one run at their times and gathers the records.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "clients/bench/driver.h"
#include "clients/bench/summary.h"

namespace minitron::bench {

struct Progress {
  size_t sent = 0;
  size_t ended = 0;
  size_t failed = 0;
  size_t total = 0;
  uint64_t output_tokens = 0;
  double elapsed_s = 0;
};

struct LoadOptions {
  std::vector<double> offsets;                       // when to send; empty: as soon as there is room (closed loop)
  size_t max_concurrency = 0;                        // requests open at once; 0: no limit
  const std::atomic<bool>* stop = nullptr;           // set: nothing more is sent, what runs is waited for
  std::function<void(const Progress&)> on_progress;  // about once per second, on the calling thread
};

// Blocks until every request has ended. Requires: offsets are empty or as many as the prompts; one limit is set.
RunResult RunLoad(const std::vector<Prompt>& prompts, const LoadOptions& options, Driver* driver);

}  // namespace minitron::bench
