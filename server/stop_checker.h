// StopChecker: finds stop strings in streamed text, across token borders. Output thread.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace minitron::server {

// Holds back the longest suffix that could still become a stop string, so nothing of or after a stop string leaks.
class StopChecker {
 public:
  // `include_stop`: leave the matched string in the text.
  StopChecker(std::vector<std::string> stop_strings, bool include_stop);

  struct Result {
    std::string text;                 // safe to send now
    std::optional<std::string> stop;  // the string that matched: the sequence ends here
  };

  // Adds text. With `enabled` false (before min_tokens) matches that end in this text are ignored.
  // Of several matches the one that starts first wins, then the longest... see the .cc for the tie rule.
  // Requires: no match was returned before. Cost is linear in the text.
  Result Append(const std::string& text, bool enabled = true);

  // What was held back, when the sequence ends for another reason.
  std::string Finish();

 private:
  std::vector<std::string> stops_;
  bool include_stop_;
  std::string held_;
};

}  // namespace minitron::server
