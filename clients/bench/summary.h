// Summary: the figures of one run. Pure functions of its records.
#pragma once

#include <array>
#include <map>
#include <string>
#include <vector>

#include "clients/bench/record.h"

namespace minitron::bench {

inline constexpr std::array<int, 5> kPercentiles = {50, 75, 90, 95, 99};

// Value at `percent` of an ascending list, linear between neighbours (numpy's default). 0 for an empty list.
double Percentile(const std::vector<double>& sorted, double percent);

// In milliseconds.
struct Distribution {
  double mean = 0;
  double median = 0;
  double deviation = 0;                                      // of the population
  std::array<double, kPercentiles.size()> percentiles = {};  // at kPercentiles
};

Distribution Describe(std::vector<double> seconds);

// Most a request may take and still count for goodput, in milliseconds; 0: no limit.
struct Targets {
  double ttft_ms = 0;
  double tpot_ms = 0;
  double e2el_ms = 0;
  bool any() const { return ttft_ms > 0 || tpot_ms > 0 || e2el_ms > 0; }
};

// "ttft:200", "tpot:30", "e2el:5000", several with commas. False: not of that form, or not above 0.
bool ParseTargets(const std::string& text, Targets* targets);

// What one run was asked to do and what it saw.
struct RunResult {
  std::string label;        // "concurrency 8", "4 requests/s"
  double request_rate = 0;  // 0: closed loop or trace
  double burstiness = 1;
  size_t max_concurrency = 0;   // 0: no limit
  double duration_s = 0;        // first request sent to last one ended
  double client_cpu_s = 0;      // of this process, meanwhile
  size_t peak_concurrency = 0;  // most requests open at once
  double late_s = 0;            // the most a request was sent after its time; 0 in a closed loop
  bool interrupted = false;
  std::vector<CallRecord> records;
};

struct Summary {
  size_t completed = 0;
  size_t failed = 0;
  uint64_t input_tokens = 0;  // of completed requests
  uint64_t output_tokens = 0;
  double request_throughput = 0;  // completed per second
  double output_throughput = 0;   // tokens per second
  double total_throughput = 0;    // prompt and output tokens per second
  double goodput = 0;             // requests per second within the targets
  double peak_output_per_s = 0;   // most tokens in one whole second of the run
  Distribution ttft;
  Distribution tpot;  // of requests with two tokens or more
  Distribution itl;
  Distribution e2el;
  std::map<std::string, size_t> errors;  // status to count
  double client_cpu_share = 0;           // of the machine's processors
};

Summary Summarize(const RunResult& run, const Targets& targets, unsigned processors);

// What makes the figures doubtful, one sentence each.
std::vector<std::string> Warnings(const RunResult& run, const Summary& summary);

}  // namespace minitron::bench
