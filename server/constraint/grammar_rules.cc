#include "server/constraint/grammar_rules.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace minitron::server::constraint {
namespace {

constexpr int64_t kMaxCopiedParts = 64;  // of a rule that is named more than once and yet copied
constexpr int kMaxPatternDepth = 400;    // of patterns once rules are in their place: they are walked recursively
constexpr int kMaxLeftParts = 10'000;    // looked at to find what a rule starts with
constexpr int64_t kMaxParts = 50'000;    // of a rule with those that went into it

using Kind = Pattern::Kind;

// Calls visit(rule) for each name of a rule in `pattern`.
template <typename Visit>
void ForEachRule(const Pattern& pattern, const Visit& visit) {
  if (pattern.kind() == Kind::kRule) visit(pattern.rule());
  for (const Pattern& part : pattern.parts()) ForEachRule(part, visit);
}

// Whether `pattern` has a property that texts, sequences and choices inherit; `of_rule` says it of rules.
bool Derives(const Pattern& pattern, const std::vector<bool>& of_rule, bool empty_only) {
  const auto derives = [&](const Pattern& part) { return Derives(part, of_rule, empty_only); };
  const std::vector<Pattern>& parts = pattern.parts();
  switch (pattern.kind()) {
    case Kind::kBytes:
      return !empty_only || pattern.bytes().empty();
    case Kind::kChars:
      return !empty_only && !pattern.chars().empty();
    case Kind::kRule:
      return of_rule[pattern.rule()];
    case Kind::kAlternate:
      return std::any_of(parts.begin(), parts.end(), derives);
    case Kind::kRepeat:
      return pattern.min() == 0 || derives(parts.front());
    case Kind::kConcat:
    case Kind::kSeparated:
      return std::all_of(parts.begin(), parts.end(), derives);
  }
  return false;
}

// Rules that derive some text, or with `empty_only` the empty one.
std::vector<bool> Deriving(const std::vector<Pattern>& rules, bool empty_only) {
  std::vector<bool> deriving(rules.size(), false);
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t rule = 0; rule < rules.size(); ++rule) {
      if (deriving[rule] || !Derives(rules[rule], deriving, empty_only)) continue;
      deriving[rule] = changed = true;
    }
  }
  return deriving;
}

// Adds the rules that may stand at the start of `pattern`; returns whether it may be empty.
bool AddLeftCorners(const Pattern& pattern, const std::vector<bool>& nullable, std::set<int>& corners) {
  switch (pattern.kind()) {
    case Kind::kRule:
      corners.insert(pattern.rule());
      break;
    case Kind::kConcat:
      for (const Pattern& part : pattern.parts()) {
        if (!AddLeftCorners(part, nullable, corners)) break;
      }
      break;
    default:
      for (const Pattern& part : pattern.parts()) AddLeftCorners(part, nullable, corners);
  }
  return Derives(pattern, nullable, /*empty_only=*/true);
}

// Whether each rule may start with itself, perhaps through others.
std::vector<bool> LeftRecursive(const std::vector<Pattern>& rules) {
  const std::vector<bool> nullable = Deriving(rules, /*empty_only=*/true);
  std::vector<std::set<int>> corners(rules.size());
  for (size_t rule = 0; rule < rules.size(); ++rule) AddLeftCorners(rules[rule], nullable, corners[rule]);
  std::vector<bool> recursive(rules.size(), false);
  for (size_t rule = 0; rule < rules.size(); ++rule) {
    std::vector<bool> seen(rules.size(), false);
    std::vector<int> pending(corners[rule].begin(), corners[rule].end());
    while (!pending.empty() && !seen[rule]) {
      const int next = pending.back();
      pending.pop_back();
      if (seen[next]) continue;
      seen[next] = true;
      pending.insert(pending.end(), corners[next].begin(), corners[next].end());
    }
    recursive[rule] = seen[rule];
  }
  return recursive;
}

// Decides which rules stay and puts the others in their places.
class Inliner {
 public:
  explicit Inliner(const Grammar& grammar)
      : grammar_(grammar),
        productive_(Deriving(grammar.rules, /*empty_only=*/false)),
        left_recursive_(LeftRecursive(grammar.rules)),
        state_(grammar.rules.size(), State::kNew),
        num_names_(grammar.rules.size(), 0),
        stays_(grammar.rules.size(), false),
        inlined_(grammar.rules.size(), Inlined{Pattern::Empty(), 0, 0}) {}

  absl::Status Run() {
    if (!productive_[grammar_.root]) return absl::InvalidArgumentError("nothing can match: root derives no text");
    for (const Pattern& rule : grammar_.rules) {
      ForEachRule(rule, [this](int named) { ++num_names_[named]; });
    }
    Visit(grammar_.root);
    stays_[grammar_.root] = true;
    for (const int rule : order_) {
      inlined_[rule] = Inline(grammar_.rules[rule]);
      if (inlined_[rule].depth > 4 * kMaxPatternDepth ||
          (inlined_[rule].depth > kMaxPatternDepth && left_recursive_[rule])) {
        return absl::InvalidArgumentError(absl::StrCat("rule ", grammar_.names[rule], " is nested too deeply"));
      }
      if (inlined_[rule].num_parts > kMaxParts) {
        return absl::ResourceExhaustedError(
            absl::StrCat("rule ", grammar_.names[rule], " needs more than ", kMaxParts, " parts"));
      }
      const bool is_large = inlined_[rule].num_parts > kMaxCopiedParts && num_names_[rule] > 1;
      if ((is_large || inlined_[rule].depth > kMaxPatternDepth) && !left_recursive_[rule]) stays_[rule] = true;
    }
    return absl::OkStatus();
  }

  bool stays(int rule) const { return stays_[rule]; }
  const Pattern& pattern(int rule) const { return inlined_[rule].pattern; }

 private:
  enum class State { kNew, kOpen, kDone };
  struct Inlined {
    Pattern pattern;
    int64_t num_parts;
    int depth;
  };

  // Depth first: a rule that is met again while it is open closes a cycle, and stays.
  void Visit(int rule) {
    state_[rule] = State::kOpen;
    std::set<int> named;
    ForEachRule(grammar_.rules[rule], [&named](int other) { named.insert(other); });
    for (const int other : named) {
      if (!productive_[other]) continue;
      if (state_[other] == State::kNew) Visit(other);
      if (state_[other] == State::kOpen) stays_[other] = true;
    }
    state_[rule] = State::kDone;
    order_.push_back(rule);
  }

  Inlined Inline(const Pattern& pattern) const {
    if (pattern.kind() == Kind::kRule) {
      if (!productive_[pattern.rule()]) return {Pattern::Alternate({}), 1, 1};
      return stays_[pattern.rule()] ? Inlined{pattern, 1, 1} : inlined_[pattern.rule()];
    }
    if (pattern.kind() == Kind::kBytes) return {pattern, static_cast<int64_t>(pattern.bytes().size()), 1};
    if (pattern.kind() == Kind::kChars) return {pattern, 1 + static_cast<int64_t>(pattern.chars().size()), 1};
    std::vector<Pattern> parts;
    int64_t num_parts = 1;
    int depth = 0;
    for (const Pattern& part : pattern.parts()) {
      Inlined inlined = Inline(part);
      parts.push_back(std::move(inlined.pattern));
      num_parts = std::min(num_parts + inlined.num_parts, kMaxParts + 1);
      depth = std::max(depth, inlined.depth);
    }
    if (pattern.kind() == Kind::kConcat) return {Pattern::Concat(std::move(parts)), num_parts, depth + 1};
    if (pattern.kind() == Kind::kAlternate) return {Pattern::Alternate(std::move(parts)), num_parts, depth + 1};
    const int64_t times = std::max({pattern.min(), pattern.max(), 1});
    return {Pattern::Repeat(std::move(parts.front()), pattern.min(), pattern.max()),
            std::min(num_parts * times, kMaxParts + 1), depth + 1};
  }

  const Grammar& grammar_;
  const std::vector<bool> productive_;
  const std::vector<bool> left_recursive_;
  std::vector<State> state_;
  std::vector<int> num_names_;
  std::vector<bool> stays_;
  std::vector<Inlined> inlined_;
  std::vector<int> order_;  // a rule behind those it names, but for those that stay
};

// rule = rule a | b, the same as rule = b a*: finds the a and b of a pattern.
class LeftSplitter {
 public:
  explicit LeftSplitter(int rule) : rule_(rule) {}

  absl::StatusOr<Pattern> Run(const Pattern& pattern) {
    RETURN_IF_ERROR(Split(pattern, tails_, starts_));
    if (tails_.empty()) return pattern;
    return Pattern::Concat({Pattern::Alternate(std::move(starts_)),
                            Pattern::Repeat(Pattern::Alternate(std::move(tails_)), 0, Pattern::kUnbounded)});
  }

 private:
  using Patterns = std::vector<Pattern>;

  absl::Status Split(const Pattern& pattern, Patterns& tails, Patterns& starts) {
    if (++num_looked_at_ > kMaxLeftParts) {
      return absl::ResourceExhaustedError(absl::StrCat("needs more than ", kMaxLeftParts, " alternatives"));
    }
    if (pattern.kind() == Kind::kRule && pattern.rule() == rule_) {
      tails.push_back(Pattern::Empty());
      return absl::OkStatus();
    }
    if (pattern.kind() == Kind::kAlternate) {
      for (const Pattern& part : pattern.parts()) RETURN_IF_ERROR(Split(part, tails, starts));
      return absl::OkStatus();
    }
    const bool has_first = pattern.kind() == Kind::kConcat ? !pattern.parts().empty()
                                                           : pattern.kind() == Kind::kRepeat && pattern.max() != 0;
    Patterns first_tails, first_starts;
    if (has_first) RETURN_IF_ERROR(Split(pattern.parts().front(), first_tails, first_starts));
    if (first_tails.empty()) {
      starts.push_back(pattern);
      return absl::OkStatus();
    }
    const Pattern rest = Rest(pattern);
    for (Pattern& tail : first_tails) tails.push_back(Pattern::Concat({std::move(tail), rest}));
    for (Pattern& start : first_starts) starts.push_back(Pattern::Concat({std::move(start), rest}));
    if (pattern.kind() == Kind::kRepeat && pattern.min() == 0) starts.push_back(Pattern::Empty());
    return absl::OkStatus();
  }

  // What is left of a sequence or repetition behind its first part.
  static Pattern Rest(const Pattern& pattern) {
    if (pattern.kind() == Kind::kConcat) return Pattern::Concat({pattern.parts().begin() + 1, pattern.parts().end()});
    const int max = pattern.max() == Pattern::kUnbounded ? Pattern::kUnbounded : pattern.max() - 1;
    return Pattern::Repeat(pattern.parts().front(), std::max(pattern.min() - 1, 0), max);
  }

  const int rule_;
  int num_looked_at_ = 0;
  Patterns tails_, starts_;
};

Pattern Renumber(const Pattern& pattern, const std::vector<int>& new_index) {
  if (pattern.kind() == Kind::kRule) return Pattern::Rule(new_index[pattern.rule()]);
  if (pattern.parts().empty()) return pattern;
  std::vector<Pattern> parts;
  parts.reserve(pattern.parts().size());
  for (const Pattern& part : pattern.parts()) parts.push_back(Renumber(part, new_index));
  if (pattern.kind() == Kind::kConcat) return Pattern::Concat(std::move(parts));
  if (pattern.kind() == Kind::kAlternate) return Pattern::Alternate(std::move(parts));
  return Pattern::Repeat(std::move(parts.front()), pattern.min(), pattern.max());
}

}  // namespace

absl::StatusOr<GrammarRules> ReduceGrammar(const Grammar& grammar) {
  Inliner inliner(grammar);
  RETURN_IF_ERROR(inliner.Run());
  std::vector<int> new_index(grammar.rules.size(), -1);
  GrammarRules rules;
  std::vector<int> old_index;
  const auto add = [&](int rule) {
    new_index[rule] = static_cast<int>(old_index.size());
    old_index.push_back(rule);
  };
  add(grammar.root);
  for (size_t rule = 0; rule < grammar.rules.size(); ++rule) {
    if (inliner.stays(static_cast<int>(rule)) && static_cast<int>(rule) != grammar.root) add(static_cast<int>(rule));
  }
  for (const int rule : old_index) {
    ASSIGN_OR_RETURN(const Pattern pattern, LeftSplitter(rule).Run(inliner.pattern(rule)));
    rules.names.push_back(grammar.names[rule]);
    rules.patterns.push_back(Renumber(pattern, new_index));
  }
  return rules;
}

}  // namespace minitron::server::constraint
