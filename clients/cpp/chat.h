// Conversation: what was said so far, and how it becomes a prompt. Pure.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "clients/cpp/options.h"

namespace minitron::client {

enum class ChatTemplate {
  kNone,          // a base model: the prompt is everything so far, and the model continues it
  kNemotronMini,  // Nemotron-Mini-4B-Instruct: turns between special tokens
};

class Conversation {
 public:
  Conversation(ChatTemplate chat_template, std::string system) : template_(chat_template), system_(std::move(system)) {}

  // Tokens of a prompt; nothing when they cannot be counted.
  using TokenCounter = std::function<std::optional<int64_t>(const std::string& prompt)>;

  // The prompt for what was said and `line`, but for turns that were left out. Error: a line or system text that spells
  // a mark of the template could forge a turn.
  std::optional<UsageError> Prompt(const std::string& line, std::string* prompt) const;
  // Keeps a turn, when its answer is complete or was stopped by the user.
  void Add(const std::string& line, const std::string& answer) { turns_.push_back({line, answer}); }
  // When Prompt(line) has more than `max_tokens`, leaves out oldest turns until it has three quarters of that, or none
  // is left: the prompts of the next turns then begin alike, and the server's prefix cache holds. Returns how many
  // went.
  size_t Fit(const std::string& line, int64_t max_tokens, const TokenCounter& count_tokens);
  // Forgets the last turn; false when there is none.
  bool Undo();
  void Reset();
  size_t num_turns() const { return turns_.size(); }
  // All that was said, left out or not: lines with "> " in front, answers, an empty line after each turn.
  std::string Transcript() const;

 private:
  struct Turn {
    std::string line;
    std::string answer;
  };

  ChatTemplate template_;
  std::string system_;
  std::vector<Turn> turns_;
  size_t first_ = 0;  // those before it are left out of prompts
};

// "none" or "nemotron-mini".
std::optional<ChatTemplate> ParseChatTemplate(const std::string& name);

}  // namespace minitron::client
