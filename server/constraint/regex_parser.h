// Regular expressions as patterns: the part of ECMA 262 that is regular. The whole output must match; ^ and $ may stand
// at the ends.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "server/constraint/pattern.h"

namespace minitron::server::constraint {

struct RegexOptions {
  // On: an expression without ^ may match after, one without $ before, any text, as JSON Schema's "pattern" does.
  bool search = false;
  // What "." and negated classes may be besides their own meaning; a string of JSON has none of these unescaped.
  CharRanges excluded = {};
};

// Literals, "." (no line end), classes with ranges and \d \w \s, groups (also (?:...) and (?<name>...)), |, * + ? {m,n}
// (lazy ones mean the same), \n \r \t \f \v \xHH \uHHHH. Errors: INVALID_ARGUMENT with the place, also for what is not
// regular (look-around, back references, \b).
absl::StatusOr<Pattern> ParseRegex(std::string_view text, const RegexOptions& options = {});

}  // namespace minitron::server::constraint
