#include "server/compat/openai_answer.h"

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <utility>

namespace minitron::server::compat {
namespace {

using Json = nlohmann::ordered_json;

// A token may be half a character: what is not UTF-8 becomes U+FFFD.
std::string Dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

int64_t CountCharacters(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

// The bytes of a token, as chat answers list them.
Json Bytes(const std::string& text) {
  Json bytes = Json::array();
  for (const char c : text) bytes.push_back(static_cast<unsigned char>(c));
  return bytes;
}

}  // namespace

struct CompletionAnswer::Prompt {
  std::vector<engine::TokenId> ids;
  std::string text;
};

// What of one choice has not been sent yet.
struct CompletionAnswer::Choice {
  std::string text;
  Json tokens = Json::array();
  Json token_logprobs = Json::array();
  Json top_logprobs = Json::array();
  Json text_offset = Json::array();
  Json content = Json::array();  // of chats
  int64_t offset = 0;            // characters so far
  bool is_first = true;
  const char* finish_reason = nullptr;

  void AddToken(const std::string& token, const engine::ResultRowOutput* row,
                const std::function<std::string(engine::TokenId)>& text_of);
  Json Logprobs(bool is_chat) const;
  void Clear();
};

// `row` is null for a prompt's first token, which nothing predicts.
void CompletionAnswer::Choice::AddToken(const std::string& token, const engine::ResultRowOutput* row,
                                        const std::function<std::string(engine::TokenId)>& text_of) {
  tokens.push_back(token);
  text_offset.push_back(offset);
  offset += CountCharacters(token);
  token_logprobs.push_back(row == nullptr ? Json(nullptr) : Json(row->chosen.logprob));
  if (row == nullptr) {
    top_logprobs.push_back(nullptr);
    return;
  }
  // Different tokens may have the same text; the likelier one stands for both.
  Json top = Json::object();
  const auto add = [&](const engine::TokenLogprob& entry) {
    Json& value = top[text_of(entry.token_id)];
    if (value.is_null() || value.get<float>() < entry.logprob) value = entry.logprob;
  };
  Json chat_top = Json::array();
  for (const engine::TokenLogprob& entry : row->top) {
    add(entry);
    const std::string text_of_entry = text_of(entry.token_id);
    chat_top.push_back({{"token", text_of_entry}, {"logprob", entry.logprob}, {"bytes", Bytes(text_of_entry)}});
  }
  add(row->chosen);
  top_logprobs.push_back(std::move(top));
  content.push_back({{"token", token},
                     {"logprob", row->chosen.logprob},
                     {"bytes", Bytes(token)},
                     {"top_logprobs", std::move(chat_top)}});
}

Json CompletionAnswer::Choice::Logprobs(bool is_chat) const {
  if (is_chat) return {{"content", content}};
  return {{"tokens", tokens},
          {"token_logprobs", token_logprobs},
          {"top_logprobs", top_logprobs},
          {"text_offset", text_offset}};
}

void CompletionAnswer::Choice::Clear() {
  text.clear();
  for (Json* list : {&tokens, &token_logprobs, &top_logprobs, &text_offset, &content}) list->clear();
  is_first = false;
}

CompletionAnswer::CompletionAnswer(const CompletionRequest* request, const ServedModel* model, std::string id,
                                   int64_t created)
    : request_(request), model_(model), id_(std::move(id)), created_(created) {
  prompts_.resize(request->tasks.size());
  choices_.resize(request->tasks.size() * static_cast<size_t>(request->num_sequences));
}

CompletionAnswer::~CompletionAnswer() = default;

void CompletionAnswer::SetPrompt(size_t prompt, const BuiltRequest& built) {
  if (!request_->echo) return;
  prompts_[prompt].ids = built.request.prompt_token_ids;
  const v1::GenerationTask& task = request_->tasks[prompt];
  DecodeOptions options;
  options.at_text_start = true;
  options.skip_special = false;
  prompts_[prompt].text =
      task.has_text() ? task.text() : model_->tokenizer->Decode(built.request.prompt_token_ids, options);
}

std::string CompletionAnswer::TokenText(engine::TokenId id) const {
  return model_->tokenizer->TokenBytes(id, /*skip_special=*/false);
}

CompletionAnswer::Choice& CompletionAnswer::ChoiceOf(size_t prompt, int index) {
  return choices_[prompt * static_cast<size_t>(request_->num_sequences) + static_cast<size_t>(index)];
}

std::vector<std::string> CompletionAnswer::Add(size_t prompt, const StartedEvent& event) {
  num_prompt_tokens_ += event.num_prompt_tokens;
  if (!request_->echo) return {};
  std::vector<std::string> pieces;
  for (int index = 0; index < request_->num_sequences; ++index) {
    Choice& choice = ChoiceOf(prompt, index);
    choice.text = prompts_[prompt].text;
    const std::vector<engine::TokenId>& ids = prompts_[prompt].ids;
    for (size_t i = 0; request_->logprobs && i < ids.size(); ++i) {
      const bool has_row = i > 0 && i - 1 < event.prompt_logprobs.size();
      choice.AddToken(TokenText(ids[i]), has_row ? &event.prompt_logprobs[i - 1] : nullptr,
                      [this](engine::TokenId id) { return TokenText(id); });
    }
    for (std::string& piece : Piece(prompt, index)) pieces.push_back(std::move(piece));
  }
  return pieces;
}

std::vector<std::string> CompletionAnswer::Add(size_t prompt, const DeltaEvent& event) {
  Choice& choice = ChoiceOf(prompt, event.index);
  choice.text += event.text;
  if (event.token.has_value()) {
    ++num_output_tokens_;
    if (request_->logprobs) {
      choice.AddToken(TokenText(event.token->token_id), &*event.token,
                      [this](engine::TokenId id) { return TokenText(id); });
    }
  }
  if (choice.text.empty() && !request_->logprobs) return {};
  return Piece(prompt, event.index);
}

std::vector<std::string> CompletionAnswer::Add(size_t prompt, const FinishedEvent& event) {
  Choice& choice = ChoiceOf(prompt, event.index);
  choice.finish_reason = event.reason == FinishedEvent::Reason::kLength ? "length" : "stop";
  return Piece(prompt, event.index);
}

std::vector<std::string> CompletionAnswer::Piece(size_t prompt, int index) {
  if (!request_->stream) return {};
  Choice& choice = ChoiceOf(prompt, index);
  Json json = {{"index", prompt * static_cast<size_t>(request_->num_sequences) + static_cast<size_t>(index)}};
  if (request_->is_chat) {
    Json delta = Json::object();
    if (choice.is_first) delta["role"] = "assistant";
    if (!choice.text.empty() || choice.is_first) delta["content"] = choice.text;
    json["delta"] = std::move(delta);
  } else {
    json["text"] = choice.text;
  }
  json["logprobs"] = request_->logprobs ? choice.Logprobs(request_->is_chat) : Json(nullptr);
  json["finish_reason"] = choice.finish_reason == nullptr ? Json(nullptr) : Json(choice.finish_reason);
  choice.Clear();
  Json chunk = {{"id", id_},
                {"object", request_->is_chat ? "chat.completion.chunk" : "text_completion"},
                {"created", created_},
                {"model", model_->name},
                {"choices", Json::array({std::move(json)})}};
  if (request_->include_usage) chunk["usage"] = nullptr;
  return {Dump(chunk)};
}

std::string CompletionAnswer::Whole() const {
  Json choices = Json::array();
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = choices_[i];
    Json json = {{"index", i}};
    if (request_->is_chat) {
      json["message"] = {{"role", "assistant"}, {"content", choice.text}};
    } else {
      json["text"] = choice.text;
    }
    json["logprobs"] = request_->logprobs ? choice.Logprobs(request_->is_chat) : Json(nullptr);
    json["finish_reason"] = choice.finish_reason == nullptr ? Json(nullptr) : Json(choice.finish_reason);
    choices.push_back(std::move(json));
  }
  return Dump({{"id", id_},
               {"object", request_->is_chat ? "chat.completion" : "text_completion"},
               {"created", created_},
               {"model", model_->name},
               {"choices", std::move(choices)},
               {"usage",
                {{"prompt_tokens", num_prompt_tokens_},
                 {"completion_tokens", num_output_tokens_},
                 {"total_tokens", num_prompt_tokens_ + num_output_tokens_}}}});
}

std::string CompletionAnswer::StreamedUsage() const {
  if (!request_->include_usage) return "";
  return Dump({{"id", id_},
               {"object", request_->is_chat ? "chat.completion.chunk" : "text_completion"},
               {"created", created_},
               {"model", model_->name},
               {"choices", Json::array()},
               {"usage",
                {{"prompt_tokens", num_prompt_tokens_},
                 {"completion_tokens", num_output_tokens_},
                 {"total_tokens", num_prompt_tokens_ + num_output_tokens_}}}});
}

}  // namespace minitron::server::compat
