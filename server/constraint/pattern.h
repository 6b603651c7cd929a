// Pattern: a regular language over bytes, built up from smaller ones. What a regular expression or a JSON schema is
// turned into before it becomes an automaton. With names of rules in it, a part of a context-free one. Values share
// their parts; immutable.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace minitron::server::constraint {

// Characters by code point; sorted, apart from each other.
using CharRanges = std::vector<std::pair<uint32_t, uint32_t>>;
inline constexpr uint32_t kMaxChar = 0x10FFFF;

// All characters not in `ranges` (sorted or not); surrogates are no characters.
CharRanges Complement(CharRanges ranges);

class Pattern {
 public:
  enum class Kind { kBytes, kChars, kConcat, kAlternate, kRepeat, kSeparated, kRule };
  static constexpr int kUnbounded = -1;

  static Pattern Empty() { return Bytes(""); }
  static Pattern Bytes(std::string bytes);
  // One character of the ranges, in UTF-8.
  static Pattern Chars(CharRanges ranges);
  static Pattern Concat(std::vector<Pattern> parts);
  static Pattern Alternate(std::vector<Pattern> parts);  // no part: nothing matches
  // What the rule of this number derives.
  static Pattern Rule(int rule);
  static Pattern Repeat(Pattern part, int min, int max);
  static Pattern Optional(Pattern part) { return Repeat(std::move(part), 0, 1); }
  // The parts in this order with `separator` between those that are there; any that is not required may be left out.
  static Pattern Separated(const std::vector<std::pair<Pattern, bool>>& parts_and_required, Pattern separator);

  Kind kind() const { return node_->kind; }
  const std::string& bytes() const { return node_->bytes; }
  const CharRanges& chars() const { return node_->chars; }
  const std::vector<Pattern>& parts() const { return node_->parts; }
  const std::vector<bool>& required() const { return node_->required; }  // kSeparated; its last part is the separator
  int min() const { return node_->min; }
  int max() const { return node_->max; }
  int rule() const { return node_->rule; }

 private:
  struct Node {
    Kind kind;
    std::string bytes = {};
    CharRanges chars = {};
    std::vector<Pattern> parts = {};
    std::vector<bool> required = {};
    int min = 0;
    int max = 0;
    int rule = 0;
  };
  explicit Pattern(Node node) : node_(std::make_shared<const Node>(std::move(node))) {}

  std::shared_ptr<const Node> node_;
};

}  // namespace minitron::server::constraint
