// The questions that the scheduling benchmark asks and that tests/bench/scheduling_claims_test holds it to. Virtual
// time: the answers are the same on every machine.
#pragma once

#include <string>
#include <vector>

#include "tests/bench/virtual_server.h"

namespace minitron::bench {

// Offered load, and what became of it.
struct OverloadPoint {
  double load = 0;           // of capacity
  double offered = 0;        // requests/s
  double goodput = 0;        // requests/s completed, first token in time
  double share_of_peak = 0;  // of the best goodput at any load
  double p99_ttft_s = 0;     // of requests that got a first token
  double refused_share = 0;  // of offered
  double expired_share = 0;  // of offered: accepted, but not served in time
};
struct OverloadResult {
  double capacity = 0;  // requests/s, a backlog without timeouts
  double peak = 0;      // requests/s, best goodput over loads from 0.5 to 1.5
  std::vector<OverloadPoint> points;
};
// Requests/s of a backlog without timeouts.
double MeasureCapacity();
// First-token timeout 2 s; `loads` are multiples of the capacity.
OverloadResult MeasureOverload(const std::vector<double>& loads);

struct FairnessResult {
  double alone_p50_s = 0, alone_p99_s = 0;  // time to first token of the well-behaved tenant without others
  double flood_p50_s = 0, flood_p99_s = 0;  // while another one sends a hundred times as much
  double served_share = 0;                  // of its requests that were completed in the flood
  double completed_per_s = 0;               // in the flood, requests of both
};
FairnessResult MeasureFlood();

// Jain's index of the service (weighted tokens) of two tenants that both want more than there is, at 10:1.
double MeasureJain();

struct LatencyResult {
  double median_s = 0, p99_s = 0, worst_s = 0;  // between tokens of 32 streams
  double prompt_ttft_s = 0;                     // median, of the 4k prompts that are injected
};
// itl_target_ms 0: the fixed budget alone.
LatencyResult MeasureLatency(double itl_target_ms, int max_step_tokens, int max_prefill_chunk);

}  // namespace minitron::bench
