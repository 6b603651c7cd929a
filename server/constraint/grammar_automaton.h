// GrammarAutomaton: a grammar seen by tokens of a vocabulary. A token may lead through the end of a rule into what lies
// on the stack, and stacks have no limit; so the tokens that a state allows are kept in parts: those that stay in the
// state's rule, whatever the stack; and those that leave it, by the state that is returned to, and so on downwards.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "server/constraint/pushdown.h"
#include "server/constraint/token_automaton.h"

namespace minitron::server::constraint {

class GrammarAutomaton final : public CompiledConstraint {
 public:
  // Errors: as Pushdown::Compile; RESOURCE_EXHAUSTED and UNIMPLEMENTED as TokenAutomaton::Make.
  // `vocabulary` must outlive the result.
  static absl::StatusOr<std::shared_ptr<const GrammarAutomaton>> Make(const GrammarRules& rules,
                                                                      const Vocabulary& vocabulary,
                                                                      const AutomatonLimits& automaton_limits,
                                                                      const TokenAutomatonLimits& limits);

  // A walk fails, allowing nothing, when more than Parses::kMax parses are open or the stacks exceed kMaxStackNodes.
  static constexpr int kMaxStackNodes = 1 << 18;
  std::unique_ptr<engine::TokenWalk> NewWalk() const override;
  int64_t num_bytes() const override { return num_bytes_; }

  const Pushdown& pushdown() const { return pushdown_; }
  const Vocabulary& vocabulary() const { return vocabulary_; }
  // Sets the bits of the tokens that may come next in one parse.
  void AddAllowed(const Parse& parse, const Stacks& stacks, std::vector<uint64_t>& allowed) const;

 private:
  friend class GrammarCompiler;

  // Tokens, as ids or, where that is less, as bits.
  struct TokenSet {
    std::vector<uint32_t> ids;
    std::vector<uint64_t> bits;
  };
  // What a parse allows beyond its state's own tokens: `leaving` names nodes of the vocabulary's tree at which its rule
  // may be left; 0 is none.
  struct Step {
    uint32_t set = 0;
    uint32_t leaving = 0;
  };
  static uint64_t Key(uint32_t leaving, uint32_t return_to) { return uint64_t{leaving} << 32 | return_to; }

  GrammarAutomaton(Pushdown pushdown, const Vocabulary& vocabulary)
      : pushdown_(std::move(pushdown)), vocabulary_(vocabulary) {}

  const Pushdown pushdown_;
  const Vocabulary& vocabulary_;  // owned by the compiler
  std::vector<TokenSet> sets_;
  std::vector<Step> own_;                             // by state
  std::unordered_map<uint64_t, Step> behind_return_;  // by Key
  int64_t num_bytes_ = 0;
};

}  // namespace minitron::server::constraint
