#include "clients/cpp/chat.h"

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
    for (const Turn& turn : turns_) absl::StrAppend(prompt, turn.line, turn.answer, "\n");
    *prompt += line;
    return std::nullopt;
  }
  for (const std::string* text : {&line, &system_}) {
    if (absl::StrContains(*text, kMark))
      return UsageError{absl::StrCat("the text spells a mark of the template, ", kMark)};
  }
  // Source: the chat template in the tokenizer_config.json of nvidia/Nemotron-Mini-4B-Instruct.
  absl::StrAppend(prompt, "<extra_id_0>System\n", Trimmed(system_), system_.empty() ? "" : "\n", "\n");
  for (const Turn& turn : turns_) {
    absl::StrAppend(prompt, "<extra_id_1>User\n", Trimmed(turn.line), "\n<extra_id_1>Assistant\n", Trimmed(turn.answer),
                    "\n");
  }
  absl::StrAppend(prompt, "<extra_id_1>User\n", Trimmed(line), "\n<extra_id_1>Assistant\n");
  return std::nullopt;
}

bool Conversation::Undo() {
  if (turns_.empty()) return false;
  turns_.pop_back();
  return true;
}

std::optional<ChatTemplate> ParseChatTemplate(const std::string& name) {
  if (name == "none") return ChatTemplate::kNone;
  if (name == "nemotron-mini") return ChatTemplate::kNemotronMini;
  return std::nullopt;
}

}  // namespace minitron::client
