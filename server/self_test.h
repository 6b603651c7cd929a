// Self-test: the loaded model answers a fixed prompt before anybody may ask it.
#pragma once

#include <functional>

#include "absl/status/statusor.h"
#include "engine/model_runner.h"
#include "scheduler/request.h"

namespace minitron::server {

struct SelfTestResult {
  scheduler::Duration longest_step{};  // of a few tokens
  int num_tokens = 0;                  // rows of that step
};

// Completes one short prompt twice, whole and in chunks, and compares the tokens: they must be equal, or the model, the
// memory or the device is broken. A few steps; leaves no state that a request can see. Call before the engine starts.
// Error: INTERNAL saying what went wrong.
absl::StatusOr<SelfTestResult> RunSelfTest(engine::ModelRunner& runner,
                                           const std::function<scheduler::TimePoint()>& now);

}  // namespace minitron::server
