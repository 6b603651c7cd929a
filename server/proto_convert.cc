#include "server/proto_convert.h"

namespace minitron::server {
namespace {

void Fill(const engine::TokenLogprob& from, const Tokenizer& tokenizer, v1::TokenLogprob& to) {
  to.set_token_id(static_cast<uint32_t>(from.token_id));
  to.set_logprob(from.logprob);
  to.set_rank(static_cast<uint32_t>(from.rank));
  to.set_token_bytes(tokenizer.TokenBytes(from.token_id, /*skip_special=*/false));
}

void Fill(scheduler::Duration from, google::protobuf::Duration& to) {
  const auto nanos = std::chrono::duration_cast<std::chrono::nanoseconds>(from).count();
  to.set_seconds(nanos / 1000000000);
  to.set_nanos(static_cast<int32_t>(nanos % 1000000000));
}

}  // namespace

AnswerOptions MakeAnswerOptions(const BuiltRequest& built) {
  return {built.send_token_ids, built.request.num_top_logprobs >= 0, built.request.num_prompt_top_logprobs >= 0};
}

void ToProto(const engine::ResultRowOutput& row, const Tokenizer& tokenizer, v1::PositionLogprobs& out) {
  Fill(row.chosen, tokenizer, *out.mutable_chosen());
  for (const engine::TokenLogprob& top : row.top) Fill(top, tokenizer, *out.add_top());
}

v1::Started ToProto(const StartedEvent& event, const AnswerOptions& options, const Tokenizer& tokenizer) {
  v1::Started started;
  started.set_prompt_token_count(static_cast<uint32_t>(event.num_prompt_tokens));
  started.set_cached_token_count(static_cast<uint32_t>(event.num_cached_tokens));
  if (options.prompt_logprobs) {
    started.add_prompt_logprobs();  // the first token: nothing predicts it
    for (const auto& row : event.prompt_logprobs) ToProto(row, tokenizer, *started.add_prompt_logprobs());
  }
  return started;
}

v1::Finished ToProto(const FinishedEvent& event) {
  v1::Finished finished;
  finished.set_index(static_cast<uint32_t>(event.index));
  finished.set_reason(event.reason == FinishedEvent::Reason::kLength ? v1::FINISH_REASON_LENGTH
                                                                     : v1::FINISH_REASON_STOP);
  switch (event.reason) {
    case FinishedEvent::Reason::kLength:
      break;
    case FinishedEvent::Reason::kEosToken:
      finished.set_eos_token_id(static_cast<uint32_t>(event.stop_token));
      break;
    case FinishedEvent::Reason::kStopToken:
      finished.set_stop_token_id(static_cast<uint32_t>(event.stop_token));
      break;
    case FinishedEvent::Reason::kStopSequence:
      finished.set_stop_sequence(event.stop_sequence);
      break;
  }
  finished.mutable_usage()->set_prompt_tokens(static_cast<uint32_t>(event.num_prompt_tokens));
  finished.mutable_usage()->set_cached_tokens(static_cast<uint32_t>(event.num_cached_tokens));
  finished.mutable_usage()->set_completion_tokens(static_cast<uint32_t>(event.num_output_tokens));
  Fill(event.queue, *finished.mutable_timings()->mutable_queue());
  Fill(event.prefill, *finished.mutable_timings()->mutable_prefill());
  Fill(event.time_to_first_token, *finished.mutable_timings()->mutable_time_to_first_token());
  Fill(event.decode, *finished.mutable_timings()->mutable_decode());
  return finished;
}

}  // namespace minitron::server
