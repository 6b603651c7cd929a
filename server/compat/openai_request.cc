#include "server/compat/openai_request.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/json.h"
#include "server/compat/sampling_fields.h"
#include "server/grpc_status.h"
#include "server/limits.h"

namespace minitron::server::compat {
namespace {

using engine::JsonValue;
using Type = engine::JsonValue::Type;

constexpr size_t kMaxPrompts = 256;
constexpr uint32_t kDefaultMaxTokens = 16;  // of /v1/completions, in OpenAI's reference
constexpr char kTurnMark[] = "<extra_id_1>";
constexpr JsonTyping kStrict = JsonTyping::kStrict;

absl::StatusOr<JsonValue> Parse(const std::string& body) {
  JsonValue value;
  std::string error;
  engine::JsonLimits limits;
  limits.max_bytes = static_cast<int64_t>(body.size());  // bounded when it was read
  limits.max_values = 2 * limits::kMaxTokenIds;
  limits.max_depth = 40;  // a response_format holds a schema
  if (!engine::ParseJson(body.data(), static_cast<int64_t>(body.size()), limits, &value, &error)) {
    return FieldError("body", error);
  }
  if (!value.is(Type::kObject)) return FieldError("body", "is not a JSON object");
  return value;
}

// Reads every member of `body` with `read`, which says whether it knew the field. Null is as if left out.
absl::Status ReadMembers(const JsonValue& body,
                         const std::function<absl::StatusOr<bool>(const std::string&, const JsonValue&)>& read) {
  for (size_t i = 0; i < body.items.size(); ++i) {
    const std::string& key = body.keys[i];
    if (body.items[i].is(Type::kNull)) continue;
    ASSIGN_OR_RETURN(const bool known, read(key, body.items[i]));
    if (!known) return UnknownField(key.substr(0, 64));
  }
  return absl::OkStatus();
}

absl::Status AddTokenPrompt(const JsonValue& value, std::vector<v1::GenerationTask>& prompts) {
  ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, ReadTokenIds("prompt", value, kStrict));
  prompts.emplace_back().mutable_token_ids()->mutable_ids()->Assign(ids.begin(), ids.end());
  return absl::OkStatus();
}

// A text, a list of texts, a list of token ids, or a list of lists of token ids.
absl::StatusOr<std::vector<v1::GenerationTask>> ReadPrompts(const JsonValue& value) {
  std::vector<v1::GenerationTask> prompts;
  if (value.is(Type::kString)) {
    prompts.emplace_back().set_text(value.string);
    return prompts;
  }
  if (!value.is(Type::kArray) || value.items.empty()) {
    return FieldError("prompt", "is none of: a text, texts, token ids, lists of token ids");
  }
  if (value.items[0].is(Type::kInt)) {
    RETURN_IF_ERROR(AddTokenPrompt(value, prompts));
    return prompts;
  }
  if (value.items.size() > kMaxPrompts) {
    return FieldError("prompt", absl::StrCat(value.items.size(), " prompts, at most ", kMaxPrompts),
                      {{"actual", absl::StrCat(value.items.size())}, {"limit", absl::StrCat(kMaxPrompts)}});
  }
  for (const JsonValue& item : value.items) {
    if (item.is(Type::kArray)) {
      RETURN_IF_ERROR(AddTokenPrompt(item, prompts));
    } else {
      ASSIGN_OR_RETURN(const std::string text, ReadString("prompt", item));
      prompts.emplace_back().set_text(text);
    }
  }
  return prompts;
}

absl::Status ReadStreamOptions(const JsonValue& value, CompletionRequest& request) {
  if (!value.is(Type::kObject)) return FieldError("stream_options", "is not an object");
  return ReadMembers(value, [&](const std::string& key, const JsonValue& item) -> absl::StatusOr<bool> {
    const std::string field = "stream_options." + key.substr(0, 64);
    if (key != "include_usage") return absl::Status(UnknownField(field));
    ASSIGN_OR_RETURN(request.include_usage, ReadBool(field, item, kStrict));
    return true;
  });
}

// Fields that both kinds of completion share. `task` collects what holds for every prompt.
absl::StatusOr<bool> ReadShared(const std::string& key, const JsonValue& value, CompletionRequest& request,
                                v1::GenerationTask& task) {
  if (key == "model") {
    ASSIGN_OR_RETURN(*task.mutable_model(), ReadString(key, value));
  } else if (key == "stream") {
    ASSIGN_OR_RETURN(request.stream, ReadBool(key, value, kStrict));
  } else if (key == "stream_options") {
    RETURN_IF_ERROR(ReadStreamOptions(value, request));
  } else if (key == "user") {
    RETURN_IF_ERROR(ReadString(key, value).status());  // nothing is kept about users
  } else if (key == "add_special_tokens") {
    ASSIGN_OR_RETURN(const bool on, ReadBool(key, value, kStrict));
    // True is every client's default and means what the model does, which may be nothing.
    if (!on) task.mutable_tokenize_options()->set_add_bos(false);
  } else {
    return ReadSamplingField(key, value, kStrict, task);
  }
  return true;
}

// Spreads what holds for every prompt over the prompts. A request of several prompts with a seed is reproducible as a
// whole: each prompt draws as it would alone.
void Spread(const v1::GenerationTask& shared, CompletionRequest& request) {
  for (v1::GenerationTask& task : request.tasks) {
    v1::GenerationTask merged = shared;
    merged.MergeFrom(task);
    task = std::move(merged);
  }
  request.num_sequences = std::max(1, static_cast<int>(shared.sampling().num_sequences()));
}

struct Message {
  std::string role;
  std::string content;
};

absl::StatusOr<std::string> ReadContent(const std::string& field, const JsonValue& value) {
  if (value.is(Type::kString)) return value.string;
  if (!value.is(Type::kArray)) return FieldError(field, "is not a text or a list of text parts");
  std::string text;
  for (const JsonValue& part : value.items) {
    const JsonValue* type = part.Find("type");
    const JsonValue* content = part.Find("text");
    if (type == nullptr || type->string != "text" || content == nullptr) {
      return FieldError(field, "has a part that is not text");
    }
    ASSIGN_OR_RETURN(const std::string piece, ReadString(field, *content));
    text += piece;
  }
  return text;
}

absl::StatusOr<std::vector<Message>> ReadMessages(const JsonValue& value) {
  if (!value.is(Type::kArray) || value.items.empty()) return FieldError("messages", "is not a list of messages");
  std::vector<Message> messages;
  for (size_t i = 0; i < value.items.size(); ++i) {
    const std::string field = absl::StrCat("messages[", i, "]");
    if (!value.items[i].is(Type::kObject)) return FieldError(field, "is not an object");
    Message message;
    RETURN_IF_ERROR(
        ReadMembers(value.items[i], [&](const std::string& key, const JsonValue& item) -> absl::StatusOr<bool> {
          if (key == "role") {
            ASSIGN_OR_RETURN(message.role, ReadString(field + ".role", item));
          } else if (key == "content") {
            ASSIGN_OR_RETURN(message.content, ReadContent(field + ".content", item));
          } else if (key != "name") {
            return absl::Status(UnknownField(absl::StrCat(field, ".", key.substr(0, 64))));
          }
          return true;
        }));
    if (message.role != "system" && message.role != "user" && message.role != "assistant") {
      return FieldError(field + ".role", "is none of system, user, assistant");
    }
    messages.push_back(std::move(message));
  }
  return messages;
}

// Nemotron-Mini-4B-Instruct's format. Its turns are marked by special tokens, so a message that spells one out could
// forge a turn: it is refused.
absl::StatusOr<std::string> RenderNemotronMini(const std::vector<Message>& messages, const ServedModel& model) {
  std::string system;
  std::string turns;
  for (size_t i = 0; i < messages.size(); ++i) {
    const Message& message = messages[i];
    EncodeOptions special;
    special.parse_special = true;
    if (static_cast<int64_t>(message.content.size()) > limits::kMaxTextBytes ||
        message.content.find("<extra_id_") != std::string::npos ||
        model.tokenizer->Encode(message.content, special) != model.tokenizer->Encode(message.content, {})) {
      return FieldError(absl::StrCat("messages[", i, "].content"),
                        absl::StrCat("is longer than ", limits::kMaxTextBytes, " bytes or spells a special token"));
    }
    const std::string content(absl::StripAsciiWhitespace(message.content));
    if (message.role == "system") {
      if (i != 0) return FieldError(absl::StrCat("messages[", i, "].role"), "system is possible for the first only");
      system = content;
    } else {
      absl::StrAppend(&turns, "<extra_id_1>", message.role == "user" ? "User" : "Assistant", "\n", content, "\n");
    }
  }
  return absl::StrCat("<extra_id_0>System\n", system, system.empty() ? "" : "\n", "\n", turns,
                      "<extra_id_1>Assistant\n");
}

}  // namespace

absl::StatusOr<CompletionRequest> ReadCompletion(const std::string& body) {
  ASSIGN_OR_RETURN(const JsonValue object, Parse(body));
  CompletionRequest request;
  v1::GenerationTask shared;
  shared.mutable_stopping()->set_max_tokens(kDefaultMaxTokens);
  RETURN_IF_ERROR(ReadMembers(object, [&](const std::string& key, const JsonValue& value) -> absl::StatusOr<bool> {
    if (key == "prompt") {
      ASSIGN_OR_RETURN(request.tasks, ReadPrompts(value));
    } else if (key == "echo") {
      ASSIGN_OR_RETURN(request.echo, ReadBool(key, value, kStrict));
    } else if (key == "parse_special") {
      ASSIGN_OR_RETURN(const bool on, ReadBool(key, value, kStrict));
      shared.mutable_tokenize_options()->set_parse_special(on);
    } else if (key == "logprobs") {
      ASSIGN_OR_RETURN(const uint32_t top, ReadUint32(key, value, kStrict));
      request.logprobs = true;
      shared.mutable_output()->set_logprobs(top);
    } else {
      return ReadShared(key, value, request, shared);
    }
    return true;
  }));
  if (request.tasks.empty()) return FieldError("prompt", "is missing");
  if (request.echo && request.logprobs) shared.mutable_output()->set_prompt_logprobs(shared.output().logprobs());
  request.score_only = request.echo && shared.stopping().max_tokens() == 0;
  Spread(shared, request);
  return request;
}

absl::StatusOr<CompletionRequest> ReadChat(const std::string& body, ChatTemplate chat_template,
                                           const ServedModel& model) {
  if (chat_template == ChatTemplate::kNone) {
    return ReasonError(absl::StatusCode::kUnimplemented, reason::kInvalidField,
                       "no chat template is configured (--chat-template); use /v1/completions");
  }
  ASSIGN_OR_RETURN(const JsonValue object, Parse(body));
  CompletionRequest request;
  request.is_chat = true;
  v1::GenerationTask shared;
  uint32_t top_logprobs = 0;
  std::vector<Message> messages;
  RETURN_IF_ERROR(ReadMembers(object, [&](const std::string& key, const JsonValue& value) -> absl::StatusOr<bool> {
    if (key == "messages") {
      ASSIGN_OR_RETURN(messages, ReadMessages(value));
    } else if (key == "max_completion_tokens") {
      return ReadSamplingField("max_tokens", value, kStrict, shared);
    } else if (key == "logprobs") {
      ASSIGN_OR_RETURN(request.logprobs, ReadBool(key, value, kStrict));
    } else if (key == "top_logprobs") {
      ASSIGN_OR_RETURN(top_logprobs, ReadUint32(key, value, kStrict));
    } else {
      return ReadShared(key, value, request, shared);
    }
    return true;
  }));
  if (messages.empty()) return FieldError("messages", "is missing");
  if (request.logprobs) shared.mutable_output()->set_logprobs(top_logprobs);
  shared.mutable_tokenize_options()->set_parse_special(true);
  // The next turn's mark ends this one. Where it is a token of its own it has no text, so it is stopped at by its id.
  EncodeOptions special;
  special.parse_special = true;
  const std::vector<TokenId> mark = model.tokenizer->Encode(kTurnMark, special);
  if (mark.size() == 1) {
    shared.mutable_stopping()->add_stop_token_ids(static_cast<uint32_t>(mark[0]));
  } else {
    shared.mutable_stopping()->add_stop_sequences(kTurnMark);
  }
  ASSIGN_OR_RETURN(const std::string prompt, RenderNemotronMini(messages, model));
  request.tasks.emplace_back().set_text(prompt);
  Spread(shared, request);
  return request;
}

absl::StatusOr<v1::TokenizeRequest> ReadTokenize(const std::string& body) {
  ASSIGN_OR_RETURN(const JsonValue object, Parse(body));
  v1::TokenizeRequest request;
  // As Hugging Face's tokenizers do, for which clients use this endpoint: the spelling of a special token is that
  // token.
  request.mutable_options()->set_parse_special(true);
  bool has_prompt = false;
  RETURN_IF_ERROR(ReadMembers(object, [&](const std::string& key, const JsonValue& value) -> absl::StatusOr<bool> {
    if (key == "prompt") {
      has_prompt = true;
      ASSIGN_OR_RETURN(*request.mutable_text(), ReadString(key, value));
    } else if (key == "model") {
      ASSIGN_OR_RETURN(*request.mutable_model(), ReadString(key, value));
    } else if (key == "add_special_tokens") {
      ASSIGN_OR_RETURN(const bool on, ReadBool(key, value, kStrict));
      // True is every client's default and means what the model does, which may be nothing.
      if (!on) request.mutable_options()->set_add_bos(false);
    } else if (key == "parse_special") {
      ASSIGN_OR_RETURN(const bool on, ReadBool(key, value, kStrict));
      request.mutable_options()->set_parse_special(on);
    } else {
      return false;
    }
    return true;
  }));
  if (!has_prompt) return FieldError("prompt", "is missing");
  return request;
}

absl::StatusOr<v1::DetokenizeRequest> ReadDetokenize(const std::string& body) {
  ASSIGN_OR_RETURN(const JsonValue object, Parse(body));
  v1::DetokenizeRequest request;
  request.set_skip_special_tokens(false);
  RETURN_IF_ERROR(ReadMembers(object, [&](const std::string& key, const JsonValue& value) -> absl::StatusOr<bool> {
    if (key == "tokens") {
      ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, ReadTokenIds(key, value, kStrict));
      request.mutable_token_ids()->Assign(ids.begin(), ids.end());
    } else if (key == "model") {
      ASSIGN_OR_RETURN(*request.mutable_model(), ReadString(key, value));
    } else {
      return false;
    }
    return true;
  }));
  return request;
}

}  // namespace minitron::server::compat
