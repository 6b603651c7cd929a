// Context-free grammars in the notation of llama.cpp's GBNF, which is also what vLLM's `grammar` takes:
//
//   root ::= item ("," item)*        # a comment
//   item ::= [a-z]+ | "(" root ")"
//
// Literals with the escapes \n \r \t \\ \" \xHH \uHHHH, classes as in regular expressions, "." (any character), names
// of rules, groups, |, and * + ? {m} {m,} {m,n} behind any of them. Space and line ends mean nothing. The output is
// what the rule `root` derives.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/constraint/pattern.h"

namespace minitron::server::constraint {

inline constexpr int kMaxGrammarRules = 1000;

struct Grammar {
  std::vector<std::string> names;
  std::vector<Pattern> rules;  // by the same index as names; refer to each other by Pattern::Rule
  int root = 0;
};

// Errors: INVALID_ARGUMENT with the place or the name of the rule.
absl::StatusOr<Grammar> ParseGrammar(std::string_view text);

}  // namespace minitron::server::constraint
