// Bodies of the OpenAI-compatible endpoints, read into native requests. Pure.
#pragma once

#include <minitron/v1/generation.pb.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/request_builder.h"

namespace minitron::server::compat {

// A body of /v1/completions or /v1/chat/completions: one task per prompt, and what of the answers is sent.
struct CompletionRequest {
  std::vector<v1::GenerationTask> tasks;
  bool stream = false;
  bool include_usage = false;  // a last event with the counts
  bool echo = false;
  bool score_only = false;  // max_tokens 0 with echo: the prompt's log-probabilities, nothing generated
  bool logprobs = false;
  bool is_chat = false;
  int num_sequences = 1;
};

// How messages become a prompt.
enum class ChatTemplate { kNone, kNemotronMini };

// Errors of all: INVALID_ARGUMENT naming the field; unknown fields are refused.
absl::StatusOr<CompletionRequest> ReadCompletion(const std::string& body);
absl::StatusOr<CompletionRequest> ReadChat(const std::string& body, ChatTemplate chat_template,
                                           const ServedModel& model);
absl::StatusOr<v1::TokenizeRequest> ReadTokenize(const std::string& body);
absl::StatusOr<v1::DetokenizeRequest> ReadDetokenize(const std::string& body);

}  // namespace minitron::server::compat
