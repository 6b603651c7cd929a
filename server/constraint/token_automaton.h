// TokenAutomaton: a byte automaton seen by tokens of a vocabulary, with the tokens each state allows.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/token_constraint.h"
#include "server/constraint/byte_automaton.h"
#include "server/tokenizer.h"

namespace minitron::server::constraint {

// The tokens of a tokenizer as a tree of their bytes; made once per model. Special tokens are not in it.
class Vocabulary {
 public:
  Vocabulary(const Tokenizer& tokenizer, std::vector<TokenId> end_tokens);

  struct Node {
    unsigned char byte;
    uint16_t depth;       // in bytes, from 1
    uint16_t num_tokens;  // that end here: token(first_token) and those after it
    uint32_t first_token;
    uint32_t after;  // the first node, depth first, that does not continue this one
  };
  const std::vector<Node>& nodes() const { return nodes_; }  // depth first
  TokenId token(uint32_t index) const { return ids_[index]; }
  const std::string& bytes(TokenId id) const { return bytes_[id]; }
  const std::vector<TokenId>& end_tokens() const { return end_tokens_; }
  int size() const { return static_cast<int>(bytes_.size()); }
  // UNIMPLEMENTED unless each byte is a token of its own, so that any text can be written, and a text can end.
  absl::Status CheckUsable() const;

 private:
  std::vector<std::string> bytes_;  // by id; empty: never generated under a constraint
  std::vector<Node> nodes_;
  std::vector<TokenId> ids_;
  std::vector<TokenId> end_tokens_;
  bool has_all_bytes_ = true;
};

struct TokenAutomatonLimits {
  int64_t max_work = 50'000'000;   // nodes visited; about a third of a second
  int64_t max_bytes = 64ll << 20;  // of sets of allowed tokens
};

// What the compiler makes and keeps.
class CompiledConstraint : public engine::TokenConstraint {
 public:
  virtual int64_t num_bytes() const = 0;
};

class TokenAutomaton final : public CompiledConstraint {
 public:
  // Errors: RESOURCE_EXHAUSTED (names the limit), UNIMPLEMENTED (a vocabulary that cannot write every text).
  // `vocabulary` must outlive the result.
  static absl::StatusOr<std::shared_ptr<const TokenAutomaton>> Make(ByteAutomaton bytes, const Vocabulary& vocabulary,
                                                                    const TokenAutomatonLimits& limits);

  using State = ByteAutomaton::State;

  std::unique_ptr<engine::TokenWalk> NewWalk() const override;

  // The state after `token`, which must be allowed in `state`. As many look-ups as the token has bytes.
  State Advance(State state, TokenId token) const;
  absl::Span<const uint64_t> Allowed(State state) const { return sets_[set_of_state_[state]]; }

  int64_t num_bytes() const override;

 private:
  TokenAutomaton(ByteAutomaton bytes, const Vocabulary& vocabulary)
      : bytes_(std::move(bytes)), vocabulary_(vocabulary) {}
  // Fills `set`; returns how many nodes were visited.
  int64_t Collect(State state, std::vector<uint64_t>& set) const;

  const ByteAutomaton bytes_;
  const Vocabulary& vocabulary_;             // owned by the compiler
  std::vector<std::vector<uint64_t>> sets_;  // different ones only
  std::vector<uint32_t> set_of_state_;       // [num_states]
};

}  // namespace minitron::server::constraint
