// Constraints for tests: sets of tokens that depend on how many there were.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "engine/batch.h"
#include "engine/token_constraint.h"

namespace minitron::engine {

using TokenSet = std::vector<uint64_t>;

inline bool Has(absl::Span<const uint64_t> set, TokenId token) {
  const auto word = static_cast<size_t>(token) / 64;
  return word < set.size() && (set[word] >> (token % 64) & 1) != 0;
}

inline TokenSet SetOf(const std::vector<TokenId>& tokens) {
  TokenSet set;
  for (const TokenId token : tokens) {
    set.resize(std::max(set.size(), static_cast<size_t>(token) / 64 + 1));
    set[token / 64] |= uint64_t{1} << (token % 64);
  }
  return set;
}

// After n tokens set n may follow; behind the last set, the first again.
class Sets final : public TokenConstraint {
 public:
  explicit Sets(std::vector<TokenSet> sets) : sets_(std::move(sets)) {}

  // Token t may follow where t mod 3 is the number of tokens so far mod 3.
  static Sets ByCount(int vocab_size) {
    std::vector<TokenSet> sets;
    for (int rest = 0; rest < 3; ++rest) {
      std::vector<TokenId> tokens;
      for (TokenId token = rest; token < vocab_size; token += 3) tokens.push_back(token);
      sets.push_back(SetOf(tokens));
    }
    return Sets(std::move(sets));
  }

  absl::Span<const uint64_t> At(size_t num_tokens) const { return sets_[num_tokens % sets_.size()]; }

  std::unique_ptr<TokenWalk> NewWalk() const override { return std::make_unique<Walk>(*this); }

 private:
  class Walk final : public TokenWalk {
   public:
    explicit Walk(const Sets& sets) : sets_(sets) {}
    void Advance(TokenId) override { ++num_tokens_; }
    absl::Span<const uint64_t> Allowed() override { return sets_.At(num_tokens_); }

   private:
    const Sets& sets_;  // owned by the sequence's params
    size_t num_tokens_ = 0;
  };

  const std::vector<TokenSet> sets_;
};

}  // namespace minitron::engine
