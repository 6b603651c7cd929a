// The rules of a grammar, made few and free of left recursion: what a pushdown automaton can be made of.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "server/constraint/grammar_parser.h"
#include "server/constraint/pattern.h"

namespace minitron::server::constraint {

// Rules that are left, by what Pattern::Rule means in them; the root first. Others went into the rules that name them:
// all but one of every cycle, and large ones that are named often. Left recursion of a rule became a repetition.
struct GrammarRules {
  std::vector<std::string> names;
  std::vector<Pattern> patterns;
};

// Errors: INVALID_ARGUMENT (the root derives no text; nested too deeply), RESOURCE_EXHAUSTED (too many alternatives).
absl::StatusOr<GrammarRules> ReduceGrammar(const Grammar& grammar);

}  // namespace minitron::server::constraint
