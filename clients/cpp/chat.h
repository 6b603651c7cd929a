// Conversation: what was said so far, and how it becomes a prompt. Pure.
#pragma once

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

  // The prompt for what was said and `line`. Error: a line or system text that spells a mark of the template could
  // forge a turn.
  std::optional<UsageError> Prompt(const std::string& line, std::string* prompt) const;
  // Keeps a turn, when its answer is complete or was stopped by the user.
  void Add(const std::string& line, const std::string& answer) { turns_.push_back({line, answer}); }
  // Forgets the last turn; false when there is none.
  bool Undo();
  void Reset() { turns_.clear(); }
  size_t num_turns() const { return turns_.size(); }

 private:
  struct Turn {
    std::string line;
    std::string answer;
  };

  ChatTemplate template_;
  std::string system_;
  std::vector<Turn> turns_;
};

// "none" or "nemotron-mini".
std::optional<ChatTemplate> ParseChatTemplate(const std::string& name);

}  // namespace minitron::client
