// StopChecker: finds stop strings in streamed text, across token borders. Output thread.
//
// Which match counts: the one that ends first; of several that end at the same byte the longest. This is a property of
// the whole text, so the result does not depend on how the text is cut into Append calls, and a sequence ends at the
// first token that completes a stop string. ("abcd", "bc") on "abcd" therefore matches "bc" and leaves "a". (Decided
// 2026-11-24 against "starts first", which would have to run the model on after a complete match to see whether an
// earlier, longer one completes too.)
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace minitron::server {

// Holds back the longest suffix that could still become a stop string, so nothing of or after a stop string leaks.
// Text and stop strings must be valid UTF-8; then every result is.
class StopChecker {
 public:
  // `include_stop`: leave the matched string in the text. Requires: no stop string is empty. The caller bounds their
  // number and length (16 of 256 bytes).
  StopChecker(std::vector<std::string> stop_strings, bool include_stop);

  struct Result {
    std::string text;  // safe to send now
    std::optional<std::string>
        stop;  // the string that matched: the sequence ends here, the rest of the text is dropped
  };

  // Adds text. With `enabled` false (before min_tokens) matches that end in this text are ignored; one that starts in
  // it and ends in later, enabled text counts. Requires: no match was returned before. Time: at most 2 x stop strings
  // steps per byte of text.
  Result Append(const std::string& text, bool enabled = true);

  // What was held back, when the sequence ends for another reason. Call once, last, and not after a match.
  std::string Finish();

 private:
  // One stop string and its Knuth-Morris-Pratt automaton.
  struct Stop {
    std::string text;
    std::vector<uint32_t> border;  // [i]: the longest proper border of the first i + 1 bytes
    uint32_t matched = 0;          // bytes of `text` that the text so far ends with, less than all
  };

  // Whether the text, extended by `byte`, ends with the whole of `stop`.
  static bool Step(Stop& stop, char byte);

  std::vector<Stop> stops_;
  bool include_stop_;
  std::string held_;
};

}  // namespace minitron::server
