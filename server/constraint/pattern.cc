#include "server/constraint/pattern.h"

#include <algorithm>

namespace minitron::server::constraint {

CharRanges Complement(CharRanges ranges) {
  ranges.emplace_back(0xD800, 0xDFFF);
  std::sort(ranges.begin(), ranges.end());
  CharRanges result;
  uint32_t next = 0;
  for (const auto& [first, last] : ranges) {
    if (first > next) result.emplace_back(next, first - 1);
    next = std::max(next, last + 1);
  }
  if (next <= kMaxChar) result.emplace_back(next, kMaxChar);
  return result;
}

Pattern Pattern::Bytes(std::string bytes) { return Pattern({.kind = Kind::kBytes, .bytes = std::move(bytes)}); }

Pattern Pattern::Chars(CharRanges ranges) {
  // Twice, so that the ranges come out sorted, apart and without surrogates.
  return Pattern({.kind = Kind::kChars, .chars = Complement(Complement(std::move(ranges)))});
}

Pattern Pattern::Concat(std::vector<Pattern> parts) {
  return Pattern({.kind = Kind::kConcat, .parts = std::move(parts)});
}

Pattern Pattern::Alternate(std::vector<Pattern> parts) {
  return Pattern({.kind = Kind::kAlternate, .parts = std::move(parts)});
}

Pattern Pattern::Rule(int rule) { return Pattern({.kind = Kind::kRule, .rule = rule}); }

Pattern Pattern::Repeat(Pattern part, int min, int max) {
  return Pattern({.kind = Kind::kRepeat, .parts = {std::move(part)}, .min = min, .max = max});
}

Pattern Pattern::Separated(const std::vector<std::pair<Pattern, bool>>& parts_and_required, Pattern separator) {
  Node node{.kind = Kind::kSeparated};
  for (const auto& [part, required] : parts_and_required) {
    node.parts.push_back(part);
    node.required.push_back(required);
  }
  node.parts.push_back(std::move(separator));
  return Pattern(std::move(node));
}

}  // namespace minitron::server::constraint
