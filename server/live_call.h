// LiveCall: what the output thread knows of a call between its registration and the engine's last event of it.
// Output thread only.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/request.h"
#include "scheduler/step_output.h"
#include "server/call_sink.h"
#include "server/detokenizer.h"
#include "server/metrics.h"
#include "server/request_builder.h"
#include "server/stop_checker.h"

namespace minitron::server {

struct SequenceState {
  SequenceState(const Tokenizer* tokenizer, const CallSpec& spec);

  Detokenizer detokenizer;
  StopChecker stop_checker;
  std::optional<std::string> stop_sequence;        // found: nothing after it counts
  const scheduler::FinishEvent* finish = nullptr;  // set while the step that ends the sequence is processed
  bool finished = false;
  int num_tokens = 0;
  scheduler::TimePoint first_token;
  scheduler::TimePoint last_token;
};

struct LiveCall {
  LiveCall(scheduler::RequestId request_id, const Tokenizer* tokenizer, CallSpec call_spec,
           std::shared_ptr<CallSink> call_sink);

  // Tokens generated so far, of all sequences.
  int NumGenerated() const;
  // What a call is told whose time is over: the first token's, or the whole one's.
  absl::Status DeadlineError() const;
  // The last event of the sequence that `event` ends; decides the call's outcome with it.
  FinishedEvent Finish(const scheduler::FinishEvent& event);

  const scheduler::RequestId id;
  CallSpec spec;
  std::shared_ptr<CallSink> sink;
  std::vector<SequenceState> sequences;
  std::vector<engine::ResultRowOutput> prompt_logprobs;
  int num_cached_tokens = 0;
  int num_finished = 0;
  bool failed = false;  // the sink has its last event; only the engine's last events are awaited
  CallOutcome outcome = CallOutcome::kStop;
};

}  // namespace minitron::server
