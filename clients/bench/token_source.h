// TokenSource: a stream of random token ids or words, a function of its seed.
#pragma once

#include <random>

#include "clients/bench/dataset.h"

namespace minitron::bench {

class TokenSource {
 public:
  // vocab_size 0: words of two letters with a space in front, about one token each.
  TokenSource(uint64_t seed, uint32_t vocab_size) : generator_(seed), vocab_size_(vocab_size) {}

  void Append(uint32_t count, Prompt* prompt) {
    for (uint32_t i = 0; i < count; ++i) {
      const uint64_t draw = generator_() >> 11;
      if (vocab_size_ > 0) {
        // The first ids of sentencepiece vocabularies are special tokens and bytes.
        const uint32_t first = vocab_size_ > 2 * kFirstId ? kFirstId : 0;
        prompt->ids.push_back(first + static_cast<uint32_t>(draw % (vocab_size_ - first)));
      } else {
        prompt->text.push_back(' ');
        prompt->text.push_back("bcdfghklmnprstvw"[draw % 16]);
        prompt->text.push_back("aeio"[draw / 16 % 4]);
      }
    }
    prompt->input_tokens += count;
  }

 private:
  static constexpr uint32_t kFirstId = 300;

  std::mt19937_64 generator_;
  uint32_t vocab_size_;
};

}  // namespace minitron::bench
