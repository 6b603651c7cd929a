#include "server/constraint/constraint_compiler.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/constraint/grammar_automaton.h"
#include "server/constraint/grammar_parser.h"
#include "server/constraint/grammar_rules.h"
#include "server/constraint/json_schema.h"
#include "server/constraint/regex_parser.h"
#include "server/grpc_status.h"

namespace minitron::server::constraint {
namespace {

constexpr int64_t kMaxKeptBytes = 256ll << 20;

absl::StatusOr<Pattern> MakePattern(const v1::OutputConstraint& constraint) {
  switch (constraint.kind_case()) {
    case v1::OutputConstraint::kRegex:
      return ParseRegex(constraint.regex());
    case v1::OutputConstraint::kJsonSchema:
      return ParseJsonSchema(constraint.json_schema());
    case v1::OutputConstraint::kChoices: {
      std::vector<Pattern> options;
      for (const std::string& option : constraint.choices().options()) options.push_back(Pattern::Bytes(option));
      return Pattern::Alternate(std::move(options));
    }
    case v1::OutputConstraint::kJsonObject:
      return AnyJsonObject();
    case v1::OutputConstraint::kGrammar:  // not regular
    case v1::OutputConstraint::KIND_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("is empty");
}

const char* FieldName(const v1::OutputConstraint& constraint) {
  switch (constraint.kind_case()) {
    case v1::OutputConstraint::kRegex:
      return "constraint.regex";
    case v1::OutputConstraint::kJsonSchema:
      return "constraint.json_schema";
    case v1::OutputConstraint::kChoices:
      return "constraint.choices";
    case v1::OutputConstraint::kGrammar:
      return "constraint.grammar";
    default:
      return "constraint";
  }
}

}  // namespace

std::shared_ptr<const CompiledConstraint> ConstraintCompiler::Find(const std::string& key) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find_if(kept_.begin(), kept_.end(), [&key](const Kept& kept) { return kept.key == key; });
  if (found == kept_.end()) return nullptr;
  kept_.splice(kept_.begin(), kept_, found);
  return kept_.front().compiled;
}

void ConstraintCompiler::Keep(std::string key, std::shared_ptr<const CompiledConstraint> compiled) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  kept_.push_front({std::move(key), std::move(compiled)});
  int64_t num_bytes = 0;
  for (auto kept = kept_.begin(); kept != kept_.end();) {
    num_bytes += kept->compiled->num_bytes();
    kept = num_bytes > kMaxKeptBytes && kept != kept_.begin() ? kept_.erase(kept) : std::next(kept);
  }
}

absl::StatusOr<std::shared_ptr<const CompiledConstraint>> ConstraintCompiler::CompileAnew(
    const v1::OutputConstraint& constraint) const {
  const auto vocabulary = [this]() -> const Vocabulary& {
    std::call_once(vocabulary_once_, [this] { vocabulary_.emplace(*tokenizer_, end_tokens_); });
    return *vocabulary_;
  };
  if (constraint.kind_case() == v1::OutputConstraint::kGrammar) {
    ASSIGN_OR_RETURN(const Grammar grammar, ParseGrammar(constraint.grammar()));
    ASSIGN_OR_RETURN(const GrammarRules rules, ReduceGrammar(grammar));
    return GrammarAutomaton::Make(rules, vocabulary(), {}, {});
  }
  ASSIGN_OR_RETURN(const Pattern pattern, MakePattern(constraint));
  ASSIGN_OR_RETURN(ByteAutomaton bytes, ByteAutomaton::Compile(pattern, {}));
  return TokenAutomaton::Make(std::move(bytes), vocabulary(), {});
}

absl::StatusOr<std::shared_ptr<const CompiledConstraint>> ConstraintCompiler::Compile(
    const v1::OutputConstraint& constraint) const {
  std::string key = constraint.SerializeAsString();
  if (auto kept = Find(key); kept != nullptr) return kept;
  absl::StatusOr<std::shared_ptr<const CompiledConstraint>> compiled = CompileAnew(constraint);
  if (compiled.ok()) {
    Keep(std::move(key), *compiled);
  } else if (absl::IsUnimplemented(compiled.status())) {
    return ReasonError(absl::StatusCode::kUnimplemented, reason::kUnsupported,
                       absl::StrCat("constraint: ", std::string(compiled.status().message())));
  } else {
    return FieldError(FieldName(constraint), std::string(compiled.status().message()));
  }
  return compiled;
}

}  // namespace minitron::server::constraint
