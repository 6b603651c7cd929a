// CallSink: the events of one admitted call. The wire protocols are adapters behind it.
//
// Order: OnStarted once, then OnDelta and one OnFinished per sequence, then OnComplete. OnFailed may come at any point
// instead of what is left. OnComplete or OnFailed is the last event. All from the output thread; none may block.
#pragma once

#include <grpcpp/grpcpp.h>

#include <optional>
#include <string>
#include <vector>

#include "engine/batch.h"
#include "scheduler/request.h"

namespace minitron::server {

struct StartedEvent {
  int num_prompt_tokens = 0;
  int num_cached_tokens = 0;
  std::vector<engine::ResultRowOutput> prompt_logprobs;  // from the request's prompt_logprobs_start on
};

// New text and one token of one sequence, or (at the end) text alone.
struct DeltaEvent {
  int index = 0;
  std::string text;  // whole UTF-8 characters; may be empty
  std::optional<engine::ResultRowOutput> token;
};

struct FinishedEvent {
  enum class Reason { kLength, kEosToken, kStopToken, kStopSequence };
  int index = 0;
  Reason reason = Reason::kLength;
  engine::TokenId stop_token = 0;  // kEosToken, kStopToken
  std::string stop_sequence;       // kStopSequence
  int num_prompt_tokens = 0;
  int num_cached_tokens = 0;
  int num_output_tokens = 0;
  scheduler::Duration queue{};
  scheduler::Duration prefill{};
  scheduler::Duration time_to_first_token{};
  scheduler::Duration decode{};
};

class CallSink {
 public:
  virtual ~CallSink() = default;
  virtual void OnStarted(StartedEvent event) = 0;
  virtual void OnDelta(DeltaEvent event) = 0;
  virtual void OnFinished(FinishedEvent event) = 0;
  virtual void OnComplete() = 0;
  virtual void OnFailed(const grpc::Status& status) = 0;

  // Cuts the call off, and returns true, if a write has been in flight since before `limit`.
  virtual bool CutOffIfStalled(scheduler::TimePoint limit) = 0;
};

}  // namespace minitron::server
