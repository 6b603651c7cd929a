// What a request must produce, computed alone: one sequence, one step at a time, the whole prompt at once, blocks in
// order, never preempted. Builds its batches by hand, so that it shares no code with the scheduler.
#pragma once

#include <vector>

#include "scheduler/request.h"
#include "scheduler/step_output.h"
#include "tests/testing/fake_model_runner.h"

namespace minitron::simulation {

struct OracleOutput {
  std::vector<engine::ResultRowOutput> prompt_logprobs;  // from max(1, prompt_logprobs_start) on; sequence 0 only
  std::vector<engine::ResultRowOutput> tokens;
  scheduler::FinishReason reason = scheduler::FinishReason::kLength;
};

// `options` names the model (vocabulary, failing rows); its sizes are ignored.
OracleOutput RunUnbatched(const scheduler::Request& request, int index, testing::FakeModelRunnerOptions options);

}  // namespace minitron::simulation
