#include "server/live_call.h"

#include <algorithm>
#include <utility>

#include "server/grpc_status.h"

namespace minitron::server {

SequenceState::SequenceState(const Tokenizer* tokenizer, const CallSpec& spec)
    : detokenizer(tokenizer, {.skip_special = spec.skip_special_tokens, .at_text_start = false}),
      stop_checker(spec.stop_sequences, spec.include_stop_sequence) {}

LiveCall::LiveCall(scheduler::RequestId request_id, const Tokenizer* tokenizer, CallSpec call_spec,
                   std::shared_ptr<CallSink> call_sink)
    : id(request_id), spec(std::move(call_spec)), sink(std::move(call_sink)) {
  sequences.reserve(spec.num_sequences);
  for (int i = 0; i < spec.num_sequences; ++i) sequences.emplace_back(tokenizer, spec);
}

int LiveCall::NumGenerated() const {
  int num_tokens = 0;
  for (const SequenceState& sequence : sequences) num_tokens += sequence.num_tokens;
  return num_tokens;
}

absl::Status LiveCall::DeadlineError() const {
  if (spec.has_first_token_timeout && NumGenerated() == 0) {
    return ReasonError(absl::StatusCode::kDeadlineExceeded, reason::kFirstTokenTimeout,
                       "no token could be there before the first token's timeout, or the deadline");
  }
  return ReasonError(absl::StatusCode::kDeadlineExceeded, reason::kDeadlineExceeded,
                     "the deadline passed before the completion was finished");
}

FinishedEvent LiveCall::Finish(const scheduler::FinishEvent& event) {
  const SequenceState& sequence = sequences[event.index];
  FinishedEvent finished;
  finished.index = event.index;
  if (sequence.stop_sequence.has_value()) {
    finished.reason = FinishedEvent::Reason::kStopSequence;
    finished.stop_sequence = *sequence.stop_sequence;
  } else if (event.reason == scheduler::FinishReason::kEosToken) {
    finished.reason = FinishedEvent::Reason::kEosToken;
  } else if (event.reason == scheduler::FinishReason::kStopToken) {
    finished.reason = FinishedEvent::Reason::kStopToken;
  }
  if (finished.reason == FinishedEvent::Reason::kLength && !spec.scoring) outcome = CallOutcome::kLength;
  finished.stop_token = event.stop_token;
  finished.num_prompt_tokens = event.num_prompt_tokens;
  finished.num_cached_tokens = event.num_cached_tokens;
  finished.num_output_tokens = sequence.num_tokens;
  if (event.first_scheduled == scheduler::TimePoint{}) return finished;  // it never ran
  finished.queue = event.first_scheduled - event.arrival;
  if (sequence.num_tokens > 0) {
    finished.prefill = sequence.first_token - event.first_scheduled;
    finished.time_to_first_token = sequence.first_token - event.arrival;
    finished.decode = sequence.last_token - sequence.first_token;
  }
  return finished;
}

}  // namespace minitron::server
