// CompletionAnswer: the events of a completion request as JSON, whole or in pieces. Not synchronized.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "server/call_sink.h"
#include "server/compat/openai_request.h"
#include "server/request_builder.h"

namespace minitron::server::compat {

class CompletionAnswer {
 public:
  // `model` and `request` must outlive this object. `created` in seconds since 1970.
  CompletionAnswer(const CompletionRequest* request, const ServedModel* model, std::string id, int64_t created);
  ~CompletionAnswer();

  // What an echo needs to know of a prompt; before its events.
  void SetPrompt(size_t prompt, const BuiltRequest& built);

  // Each takes an event of one prompt. When the answer is streamed it returns what to send now, which may be nothing;
  // else nothing, and Whole gives all of it at the end.
  std::vector<std::string> Add(size_t prompt, const StartedEvent& event);
  std::vector<std::string> Add(size_t prompt, const DeltaEvent& event);
  std::vector<std::string> Add(size_t prompt, const FinishedEvent& event);
  std::string Whole() const;
  // The last event before the end of a stream, with the counts; empty unless it was asked for.
  std::string StreamedUsage() const;

 private:
  struct Choice;
  struct Prompt;

  Choice& ChoiceOf(size_t prompt, int index);
  std::vector<std::string> Piece(size_t prompt, int index);
  std::string TokenText(engine::TokenId id) const;

  const CompletionRequest* request_;  // the handler's
  const ServedModel* model_;          // owned by Serving
  const std::string id_;
  const int64_t created_;
  std::vector<Prompt> prompts_;
  std::vector<Choice> choices_;  // prompt by prompt
  int64_t num_prompt_tokens_ = 0;
  int64_t num_output_tokens_ = 0;
};

}  // namespace minitron::server::compat
