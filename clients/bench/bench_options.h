// The command line of minitron-bench.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "clients/bench/arrivals.h"
#include "clients/bench/dataset.h"
#include "clients/bench/driver.h"
#include "clients/bench/summary.h"
#include "clients/cpp/options.h"

namespace minitron::bench {

// One run of a sweep.
struct RunPlan {
  std::string label;
  double rate = 0;             // 0: closed loop or trace
  size_t max_concurrency = 0;  // 0: no limit
};

struct BenchOptions {
  std::string protocol = "native";
  std::string dataset = "random";
  std::string dataset_path;
  DatasetOptions prompts;
  DriverOptions driver;
  ArrivalOptions arrivals;     // the rate is the plan's
  bool replay = false;         // send at the times of the trace
  double time_scale = 1;       // of a trace: 2 is twice as slow
  std::vector<RunPlan> plans;  // one or more
  size_t warmup = 0;           // requests before the first run that count nowhere
  Targets targets;
  std::string result_path;  // JSON lines
  std::string report_path;  // HTML
  bool detailed = false;
  bool quiet = false;  // no progress
};

const client::CommandSpec& BenchSpec();

// Names, ranges and combinations are checked here; nothing is read or sent.
std::optional<client::UsageError> ReadBenchOptions(const client::Arguments& arguments, BenchOptions* options);

}  // namespace minitron::bench
