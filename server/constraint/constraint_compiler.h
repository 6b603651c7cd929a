// ConstraintCompiler: from a request's constraint to what the sampler walks. On the thread of the call, never
// the engine's; what was compiled last is kept, because clients send the same schema again and again.
#pragma once

#include <minitron/v1/generation.pb.h>

#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "server/constraint/token_automaton.h"

namespace minitron::server::constraint {

class ConstraintCompiler {
 public:
  // `tokenizer` must outlive this object, and this object what it compiles.
  ConstraintCompiler(const Tokenizer* tokenizer, std::vector<TokenId> end_tokens)
      : tokenizer_(tokenizer), end_tokens_(std::move(end_tokens)) {}

  // Any thread. At most about half a second, by limits on states, steps and bytes. Lengths are checked by the caller.
  // Errors: INVALID_ARGUMENT with the field, the place and the limit; UNIMPLEMENTED as TokenAutomaton::Make.
  absl::StatusOr<std::shared_ptr<const CompiledConstraint>> Compile(const v1::OutputConstraint& constraint) const;

 private:
  absl::StatusOr<std::shared_ptr<const CompiledConstraint>> CompileAnew(const v1::OutputConstraint& constraint) const;
  struct Kept {
    std::string key;
    std::shared_ptr<const CompiledConstraint> compiled;
  };
  std::shared_ptr<const CompiledConstraint> Find(const std::string& key) const;
  void Keep(std::string key, std::shared_ptr<const CompiledConstraint> compiled) const;

  const Tokenizer* tokenizer_;  // owned by main
  const std::vector<TokenId> end_tokens_;
  mutable std::once_flag vocabulary_once_;  // made by the first who constrains: most servers never do
  mutable std::optional<Vocabulary> vocabulary_;
  mutable std::mutex mutex_;
  mutable std::list<Kept> kept_;  // used last first
};

}  // namespace minitron::server::constraint
