#include "server/detokenizer.h"

namespace minitron::server {

Detokenizer::Detokenizer(const Tokenizer* tokenizer, const DecodeOptions& options)
    : tokenizer_(tokenizer), skip_special_(options.skip_special), at_start_(options.at_text_start) {}

std::string Detokenizer::Append(TokenId id) {
  std::string text;
  AppendUtf8(held_, tokenizer_->NextBytes(id, skip_special_, at_start_), text);
  return text;
}

std::string Detokenizer::Finish() {
  std::string text;
  if (!held_.empty()) text = kReplacementCharacter;
  held_.clear();
  return text;
}

}  // namespace minitron::server
