// minitron score, tokenize, detokenize.
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/cpp/commands.h"
#include "clients/cpp/format.h"
#include "clients/cpp/generate_request.h"

namespace minitron::client {
namespace {

// The text of the positional argument, "-" being standard input.
std::optional<UsageError> ReadArgument(const Session& session, std::string* text) {
  if (session.arguments.positionals().empty()) return UsageError{"no text; - reads it from standard input"};
  *text = session.arguments.positionals()[0];
  if (*text == "-") {
    if (auto error = ReadFile("-", text)) return error;
  }
  if (!IsUtf8(*text)) return UsageError{"the text is not valid UTF-8"};
  return std::nullopt;
}

}  // namespace

int RunScore(const Session& session) {
  const Arguments& arguments = session.arguments;
  v1::ScoreRequest request;
  request.set_model(arguments.Get("model"));
  SetTokenizeOptions(arguments, request.mutable_tokenize_options());
  std::vector<uint32_t> ids;
  if (arguments.Has("context-ids")) {
    if (!ParseIds(arguments.Get("context-ids"), &ids))
      return FailUsage(session, {"--context-ids is not a list of ids"});
    request.mutable_context_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  } else {
    if (!IsUtf8(arguments.Get("context"))) return FailUsage(session, {"--context is not valid UTF-8"});
    request.set_context_text(arguments.Get("context"));
  }
  ids.clear();
  std::string target;
  if (arguments.Has("target-ids")) {
    if (!ParseIds(arguments.Get("target-ids"), &ids)) return FailUsage(session, {"--target-ids is not a list of ids"});
    request.mutable_target_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  } else {
    if (const auto error = ReadArgument(session, &target)) return FailUsage(session, *error);
    request.set_target_text(target);
  }
  uint64_t logprobs = 0;
  if (arguments.Has("logprobs") && !ParseUint(arguments.Get("logprobs"), UINT32_MAX, &logprobs)) {
    return FailUsage(session, {"--logprobs \"" + arguments.Get("logprobs") + "\" is not a whole number from 0"});
  }
  request.set_top_logprobs(static_cast<uint32_t>(logprobs));

  v1::ScoreResponse response;
  if (const Outcome error = session.client->Score(request, &response, session.cancellation)) {
    return Fail(session, *error);
  }
  if (session.json) return Print(ToJsonLine(response)) ? kExitOk : kExitOutput;
  return Print(absl::StrCat(FormatLogprobs(response.positions()),
                            absl::StrFormat("total %.4f over %d tokens%s\n", response.total_logprob(),
                                            response.positions_size(), response.is_greedy() ? ", greedy" : "")))
             ? kExitOk
             : kExitOutput;
}

int RunTokenize(const Session& session) {
  v1::TokenizeRequest request;
  std::string text;
  if (const auto error = ReadArgument(session, &text)) return FailUsage(session, *error);
  request.set_model(session.arguments.Get("model"));
  request.set_text(text);
  SetTokenizeOptions(session.arguments, request.mutable_options());
  v1::TokenizeResponse response;
  if (const Outcome error = session.client->Tokenize(request, &response)) return Fail(session, *error);
  std::string out;
  if (session.json) {
    out = ToJsonLine(response);
  } else {
    for (int i = 0; i < response.token_ids_size(); ++i) {
      absl::StrAppend(&out, response.token_ids(i));
      if (session.arguments.Has("pieces") && i < response.token_bytes_size()) {
        absl::StrAppend(&out, "\t", Quoted(response.token_bytes(i)), "\n");
      } else {
        absl::StrAppend(&out, i + 1 < response.token_ids_size() ? " " : "\n");
      }
    }
  }
  return Print(out) ? kExitOk : kExitOutput;
}

int RunDetokenize(const Session& session) {
  std::vector<uint32_t> ids;
  for (std::string text : session.arguments.positionals()) {
    if (text == "-") {
      if (const auto error = ReadFile("-", &text)) return FailUsage(session, *error);
    }
    if (!ParseIds(text, &ids))
      return FailUsage(session, {absl::StrCat("\"", text.substr(0, 40), "\" is not a list of token ids")});
  }
  if (session.arguments.positionals().empty()) return FailUsage(session, {"no token ids"});
  v1::DetokenizeRequest request;
  request.set_model(session.arguments.Get("model"));
  request.mutable_token_ids()->Add(ids.begin(), ids.end());
  if (session.arguments.Has("keep-special")) request.set_skip_special_tokens(false);
  v1::DetokenizeResponse response;
  if (const Outcome error = session.client->Detokenize(request, &response)) return Fail(session, *error);
  return Print(session.json ? ToJsonLine(response) : response.text() + "\n") ? kExitOk : kExitOutput;
}

}  // namespace minitron::client
