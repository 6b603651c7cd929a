#include "server/self_test.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "scheduler/engine_core.h"

namespace minitron::server {
namespace {

constexpr int kPromptTokens = 8;
constexpr int kChunk = 5;
constexpr int kOutputTokens = 2;

class Recorder : public scheduler::StepSink {
 public:
  void OnStep(scheduler::StepOutput output) override {
    for (const scheduler::TokenEvent& event : output.tokens) {
      tokens.push_back(event.output.token_id);
      failed = failed || event.output.failed;
    }
    for (const scheduler::FinishEvent& event : output.finished) {
      failed = failed || event.reason == scheduler::FinishReason::kError;
    }
    if (!output.engine_error.empty()) error = output.engine_error;
    if (output.stats.step_duration > longest.longest_step) {
      longest = {output.stats.step_duration, output.stats.num_batch_tokens};
    }
  }

  std::vector<engine::TokenId> tokens;
  bool failed = false;
  std::string error;
  SelfTestResult longest;
};

absl::StatusOr<Recorder> Complete(engine::ModelRunner& runner, const std::function<scheduler::TimePoint()>& now,
                                  int chunk) {
  Recorder recorder;
  scheduler::EngineCoreOptions options;
  options.scheduler.max_prefill_chunk = chunk;
  scheduler::EngineCore core(options, &runner, &recorder, now);
  scheduler::Request request;
  request.id = 1;
  request.max_tokens = kOutputTokens;
  request.params.temperature = 0;
  request.arrival = now();
  // Ids spread over the vocabulary; what they say does not matter.
  for (int i = 1; i <= kPromptTokens; ++i) {
    request.prompt_token_ids.push_back(
        static_cast<engine::TokenId>(int64_t{i} * 7919 % runner.model_info().vocab_size));
  }
  RETURN_IF_ERROR(core.Submit(std::move(request)));
  while (core.Step()) {
  }
  if (!recorder.error.empty())
    return absl::InternalError(absl::StrCat("self-test: the engine failed: ", recorder.error));
  if (recorder.failed) return absl::InternalError("self-test: the model produces logits that are not finite");
  if (recorder.tokens.size() != kOutputTokens) {
    return absl::InternalError(
        absl::StrCat("self-test: ", recorder.tokens.size(), " tokens instead of ", kOutputTokens));
  }
  return recorder;
}

}  // namespace

absl::StatusOr<SelfTestResult> RunSelfTest(engine::ModelRunner& runner,
                                           const std::function<scheduler::TimePoint()>& now) {
  ASSIGN_OR_RETURN(const Recorder whole, Complete(runner, now, kPromptTokens));
  ASSIGN_OR_RETURN(const Recorder chunked, Complete(runner, now, kChunk));
  if (whole.tokens != chunked.tokens) {
    return absl::InternalError("self-test: the same prompt gave two answers; the device or its memory is broken");
  }
  return whole.longest.longest_step > chunked.longest.longest_step ? whole.longest : chunked.longest;
}

}  // namespace minitron::server
