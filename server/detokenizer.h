// Detokenizer: token ids of one sequence to text, piece by piece, whole UTF-8 characters only. Output thread.
#pragma once

#include <string>

#include "server/tokenizer.h"
#include "server/utf8.h"

namespace minitron::server {

// The concatenation of all Append results and Finish equals Tokenizer::Decode of all ids, byte for byte.
class Detokenizer {
 public:
  // `tokenizer` must outlive this object.
  Detokenizer(const Tokenizer* tokenizer, const DecodeOptions& options);

  // New text that is certain; an incomplete character (at most 3 bytes) is held back.
  std::string Append(TokenId id);

  // The rest: a held incomplete character becomes U+FFFD. Call once, last.
  std::string Finish();

 private:
  const Tokenizer* tokenizer_;  // owned by main
  bool skip_special_;
  bool at_start_;
  std::string held_;  // incomplete UTF-8 prefix
};

}  // namespace minitron::server
