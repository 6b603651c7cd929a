#include "clients/cpp/chat.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace minitron::client {
namespace {

constexpr char kMark[] = "<extra_id_";

std::string Trimmed(const std::string& text) { return std::string(absl::StripAsciiWhitespace(text)); }

}  // namespace

std::optional<UsageError> Conversation::Prompt(const std::string& line, std::string* prompt) const {
  prompt->clear();
  if (!IsUtf8(line) || !IsUtf8(system_)) return UsageError{"the text is not valid UTF-8"};
  if (template_ == ChatTemplate::kNone) {
    *prompt = system_;
    for (size_t i = first_; i < turns_.size(); ++i) absl::StrAppend(prompt, turns_[i].line, turns_[i].answer, "\n");
    *prompt += line;
    return std::nullopt;
  }
  for (const std::string* text : {&line, &system_}) {
    if (absl::StrContains(*text, kMark))
      return UsageError{absl::StrCat("the text spells a mark of the template, ", kMark)};
  }
  // Source: the chat template in the tokenizer_config.json of nvidia/Nemotron-Mini-4B-Instruct.
  absl::StrAppend(prompt, "<extra_id_0>System\n", Trimmed(system_), system_.empty() ? "" : "\n", "\n");
  for (size_t i = first_; i < turns_.size(); ++i) {
    const Turn& turn = turns_[i];
    absl::StrAppend(prompt, "<extra_id_1>User\n", Trimmed(turn.line), "\n<extra_id_1>Assistant\n", Trimmed(turn.answer),
                    "\n");
  }
  absl::StrAppend(prompt, "<extra_id_1>User\n", Trimmed(line), "\n<extra_id_1>Assistant\n");
  return std::nullopt;
}

bool Conversation::Undo() {
  if (turns_.empty()) return false;
  turns_.pop_back();
  first_ = std::min(first_, turns_.size());
  return true;
}

void Conversation::Reset() {
  turns_.clear();
  first_ = 0;
}

size_t Conversation::Fit(const std::string& line, int64_t max_tokens, const TokenCounter& count_tokens) {
  const size_t before = first_;
  std::string prompt;
  int64_t limit = max_tokens;
  for (; first_ < turns_.size() && !Prompt(line, &prompt).has_value(); ++first_) {
    // A token is a byte or more, but for the two that may stand in front.
    if (static_cast<int64_t>(prompt.size()) + 2 <= limit) break;
    const std::optional<int64_t> tokens = count_tokens(prompt);
    if (!tokens.has_value() || *tokens <= limit) break;
    limit = max_tokens * 3 / 4;
  }
  return first_ - before;
}

std::string Conversation::Transcript() const {
  std::string text = system_.empty() ? "" : system_ + "\n\n";
  for (const Turn& turn : turns_) absl::StrAppend(&text, "> ", turn.line, "\n", turn.answer, "\n\n");
  return text;
}

std::optional<ChatTemplate> ParseChatTemplate(const std::string& name) {
  if (name == "none") return ChatTemplate::kNone;
  if (name == "nemotron-mini") return ChatTemplate::kNemotronMini;
  return std::nullopt;
}

}  // namespace minitron::client
