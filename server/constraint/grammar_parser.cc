#include "server/constraint/grammar_parser.h"

#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/constraint/regex_parser.h"
#include "server/utf8.h"

namespace minitron::server::constraint {
namespace {

constexpr int kMaxGroupDepth = 100;      // of groups
constexpr int kMaxRepeatsOfOne = 10;     // x{2}{3}...
constexpr int kMaxRepeatCount = 10'000;  // in {m,n}; how large the whole may get is the automaton's limit

bool IsNameChar(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
}

class GrammarParser {
 public:
  explicit GrammarParser(std::string_view text) : text_(text) {}

  absl::StatusOr<Grammar> Parse() {
    if (!IsValidUtf8(text_)) return absl::InvalidArgumentError("is not UTF-8");
    for (SkipSpace(); !AtEnd(); SkipSpace()) {
      const std::string name(TakeName());
      if (name.empty()) return Error("the name of a rule is missing");
      SkipSpace();
      if (!Take("::=")) return Error("::= is missing");
      ASSIGN_OR_RETURN(const int rule, IndexOf(name));
      if (is_defined_[rule]) return Error(absl::StrCat("rule ", name, " is defined twice"));
      is_defined_[rule] = true;
      ASSIGN_OR_RETURN(grammar_.rules[rule], ParseAlternatives());
      if (!AtEnd() && Peek() == ')') return Error("unmatched )");
    }
    for (size_t rule = 0; rule < is_defined_.size(); ++rule) {
      if (!is_defined_[rule]) {
        return absl::InvalidArgumentError(absl::StrCat("rule ", grammar_.names[rule], " is not defined"));
      }
    }
    const auto root = indices_.find("root");
    if (root == indices_.end()) return absl::InvalidArgumentError("there is no rule root");
    grammar_.root = root->second;
    return std::move(grammar_);
  }

 private:
  absl::Status Error(const std::string& what) const {
    return absl::InvalidArgumentError(absl::StrCat(what, " at byte ", at_));
  }

  bool AtEnd() const { return at_ >= text_.size(); }
  char Peek() const { return text_[at_]; }
  bool Take(std::string_view wanted) {
    if (text_.substr(at_, wanted.size()) != wanted) return false;
    at_ += wanted.size();
    return true;
  }

  void SkipSpace() {
    for (; !AtEnd(); ++at_) {
      if (Peek() == '#') {
        while (!AtEnd() && Peek() != '\n') ++at_;
        if (AtEnd()) return;
      }
      if (Peek() != ' ' && Peek() != '\t' && Peek() != '\r' && Peek() != '\n') return;
    }
  }

  std::string_view TakeName() {
    const size_t start = at_;
    while (!AtEnd() && IsNameChar(Peek())) ++at_;
    return text_.substr(start, at_ - start);
  }

  absl::StatusOr<int> IndexOf(const std::string& name) {
    const auto [found, is_new] = indices_.emplace(name, static_cast<int>(grammar_.names.size()));
    if (is_new) {
      if (grammar_.names.size() >= kMaxGrammarRules)
        return Error(absl::StrCat("more than ", kMaxGrammarRules, " rules"));
      grammar_.names.push_back(name);
      grammar_.rules.push_back(Pattern::Empty());
      is_defined_.push_back(false);
    }
    return found->second;
  }

  // Whether the next rule starts here.
  bool AtDefinition() {
    const size_t start = at_;
    TakeName();
    SkipSpace();
    const bool found = at_ > start && text_.substr(at_, 3) == "::=";
    at_ = start;
    return found;
  }

  absl::StatusOr<Pattern> ParseAlternatives() {
    if (++depth_ > kMaxGroupDepth) return Error(absl::StrCat("groups deeper than ", kMaxGroupDepth));
    std::vector<Pattern> alternatives;
    do {
      ASSIGN_OR_RETURN(Pattern alternative, ParseSequence());
      alternatives.push_back(std::move(alternative));
    } while (Take("|"));
    --depth_;
    return alternatives.size() == 1 ? std::move(alternatives.front()) : Pattern::Alternate(std::move(alternatives));
  }

  absl::StatusOr<Pattern> ParseSequence() {
    std::vector<Pattern> parts;
    for (SkipSpace(); !AtEnd() && Peek() != '|' && Peek() != ')'; SkipSpace()) {
      if (AtDefinition()) {
        if (depth_ > 1) return Error("( without )");
        break;
      }
      ASSIGN_OR_RETURN(Pattern part, ParseElement());
      ASSIGN_OR_RETURN(part, ParseRepeats(std::move(part)));
      parts.push_back(std::move(part));
    }
    return parts.size() == 1 ? std::move(parts.front()) : Pattern::Concat(std::move(parts));
  }

  absl::StatusOr<Pattern> ParseElement() {
    if (Take("(")) {
      ASSIGN_OR_RETURN(Pattern inner, ParseAlternatives());
      if (!Take(")")) return Error("( without )");
      return inner;
    }
    if (Take("\"")) return ParseLiteral();
    if (Peek() == '[') return ParseClass();
    if (Take(".")) return Pattern::Chars(Complement({}));
    const std::string name(TakeName());
    if (name.empty()) return Error("a literal, a class, a group or the name of a rule is missing");
    ASSIGN_OR_RETURN(const int rule, IndexOf(name));
    return Pattern::Rule(rule);
  }

  // Behind the first quote.
  absl::StatusOr<Pattern> ParseLiteral() {
    std::vector<Pattern> parts;
    std::string bytes;
    while (!Take("\"")) {
      if (AtEnd() || Peek() == '\n') return Error("\" without \"");
      if (Peek() != '\\') {
        bytes += text_[at_++];
        continue;
      }
      const char kind = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
      if (std::string_view("nrt\\\"'[]/xu").find(kind) == std::string_view::npos || kind == '\0') {
        return Error("an escape that is not supported");
      }
      parts.push_back(Pattern::Bytes(std::exchange(bytes, {})));
      ASSIGN_OR_RETURN(Pattern escaped, TakeRegex(kind == 'x' ? 4 : kind == 'u' ? 6 : 2));
      parts.push_back(std::move(escaped));
    }
    if (parts.empty()) return Pattern::Bytes(std::move(bytes));
    parts.push_back(Pattern::Bytes(std::move(bytes)));
    return Pattern::Concat(std::move(parts));
  }

  absl::StatusOr<Pattern> ParseClass() {
    size_t end = at_ + 1;
    while (end < text_.size() && text_[end] != ']') end += text_[end] == '\\' ? 2 : 1;
    if (end >= text_.size()) return Error("[ without ]");
    return TakeRegex(end + 1 - at_);
  }

  // Escapes and classes are those of regular expressions.
  absl::StatusOr<Pattern> TakeRegex(size_t length) {
    absl::StatusOr<Pattern> pattern = ParseRegex(text_.substr(at_, length));
    if (!pattern.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(pattern.status().message(), " of what starts at byte ", at_));
    }
    at_ += length;
    return pattern;
  }

  absl::StatusOr<Pattern> ParseRepeats(Pattern part) {
    int num_repeats = 0;
    for (SkipSpace(); !AtEnd(); SkipSpace()) {
      int min = 0;
      int max = Pattern::kUnbounded;
      if (Take("+")) {
        min = 1;
      } else if (Take("?")) {
        max = 1;
      } else if (Take("{")) {
        ASSIGN_OR_RETURN(min, ParseCount());
        max = min;
        if (Take(",")) {
          max = Pattern::kUnbounded;
          SkipSpace();
          if (!AtEnd() && Peek() != '}') {
            ASSIGN_OR_RETURN(max, ParseCount());
          }
        }
        if (!Take("}")) return Error("{ without }");
        if (max != Pattern::kUnbounded && max < min) return Error("{m,n} with n below m");
      } else if (!Take("*")) {
        break;
      }
      if (++num_repeats > kMaxRepeatsOfOne) return Error("too many repetitions of one part");
      part = Pattern::Repeat(std::move(part), min, max);
    }
    return part;
  }

  absl::StatusOr<int> ParseCount() {
    SkipSpace();
    if (AtEnd() || Peek() < '0' || Peek() > '9') return Error("a number is missing");
    int value = 0;
    for (; !AtEnd() && Peek() >= '0' && Peek() <= '9'; ++at_) {
      value = value * 10 + (Peek() - '0');
      if (value > kMaxRepeatCount) return Error(absl::StrCat("a repetition above ", kMaxRepeatCount));
    }
    SkipSpace();
    return value;
  }

  const std::string_view text_;
  size_t at_ = 0;
  int depth_ = 0;
  std::map<std::string, int, std::less<>> indices_;
  std::vector<bool> is_defined_;
  Grammar grammar_;
};

}  // namespace

absl::StatusOr<Grammar> ParseGrammar(std::string_view text) { return GrammarParser(text).Parse(); }

}  // namespace minitron::server::constraint
