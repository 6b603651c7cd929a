// Events of a call as wire messages. Pure.
#pragma once

#include <minitron/v1/generation.pb.h>

#include "server/call_sink.h"
#include "server/request_builder.h"
#include "server/tokenizer.h"

namespace minitron::server {

// What of an answer goes on the wire.
struct AnswerOptions {
  bool token_ids = true;
  bool logprobs = false;
  bool prompt_logprobs = false;
};
AnswerOptions MakeAnswerOptions(const BuiltRequest& built);

void ToProto(const engine::ResultRowOutput& row, const Tokenizer& tokenizer, v1::PositionLogprobs& out);
v1::Started ToProto(const StartedEvent& event, const AnswerOptions& options, const Tokenizer& tokenizer);
v1::Finished ToProto(const FinishedEvent& event);

// Appends to a Delta or a GeneratedSequence, which share their field names.
template <typename Message>
void AppendDelta(const DeltaEvent& event, const AnswerOptions& options, const Tokenizer& tokenizer, Message& out) {
  out.mutable_text()->append(event.text);
  if (!event.token.has_value()) return;
  if (options.token_ids) out.add_token_ids(static_cast<uint32_t>(event.token->token_id));
  if (options.logprobs) ToProto(*event.token, tokenizer, *out.add_logprobs());
}

}  // namespace minitron::server
