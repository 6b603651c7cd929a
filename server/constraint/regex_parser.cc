#include "server/constraint/regex_parser.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace minitron::server::constraint {
namespace {

constexpr int kMaxDepth = 100;      // of groups
constexpr int kMaxRepeat = 10'000;  // in {m,n}; how large the whole may get is the automaton's limit

CharRanges Digits() { return {{'0', '9'}}; }
CharRanges WordChars() { return {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}}; }
CharRanges Spaces() {
  return {{'\t', '\r'},     {' ', ' '},       {0xA0, 0xA0},     {0x1680, 0x1680}, {0x2000, 0x200A},
          {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000}, {0xFEFF, 0xFEFF}};
}
CharRanges LineEnds() { return {{'\n', '\n'}, {'\r', '\r'}, {0x2028, 0x2029}}; }

class RegexParser {
 public:
  RegexParser(std::string_view text, const RegexOptions& options) : text_(text), options_(options) {}

  absl::StatusOr<Pattern> Parse() {
    ASSIGN_OR_RETURN(Pattern pattern, ParseAlternatives(/*is_top=*/true));
    if (at_ < text_.size()) return Error("unmatched )");
    return pattern;
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

  Pattern Anything() const { return Pattern::Repeat(Chars(Complement({})), 0, Pattern::kUnbounded); }

  // A class as it is when the excluded characters cannot be.
  Pattern Chars(CharRanges ranges) const {
    if (options_.excluded.empty()) return Pattern::Chars(std::move(ranges));
    CharRanges outside = Complement(std::move(ranges));
    outside.insert(outside.end(), options_.excluded.begin(), options_.excluded.end());
    return Pattern::Chars(Complement(std::move(outside)));
  }

  absl::StatusOr<Pattern> ParseAlternatives(bool is_top) {
    if (++depth_ > kMaxDepth) return Error(absl::StrCat("groups deeper than ", kMaxDepth));
    std::vector<Pattern> alternatives;
    do {
      ASSIGN_OR_RETURN(Pattern alternative, ParseSequence(is_top));
      alternatives.push_back(std::move(alternative));
    } while (Take("|"));
    --depth_;
    return alternatives.size() == 1 ? std::move(alternatives.front()) : Pattern::Alternate(std::move(alternatives));
  }

  absl::StatusOr<Pattern> ParseSequence(bool is_top) {
    std::vector<Pattern> parts;
    const bool starts = is_top && Take("^");
    if (is_top && options_.search && !starts) parts.push_back(Anything());
    bool ends = false;
    while (!AtEnd() && Peek() != '|' && Peek() != ')') {
      if (is_top && Peek() == '$' && (at_ + 1 == text_.size() || text_[at_ + 1] == '|')) {
        ++at_;
        ends = true;
        break;
      }
      ASSIGN_OR_RETURN(Pattern part, ParseRepeated());
      parts.push_back(std::move(part));
    }
    if (is_top && options_.search && !ends) parts.push_back(Anything());
    return Pattern::Concat(std::move(parts));
  }

  absl::StatusOr<Pattern> ParseRepeated() {
    ASSIGN_OR_RETURN(Pattern part, ParseAtom());
    while (!AtEnd()) {
      int min = 0;
      int max = Pattern::kUnbounded;
      if (Take("+")) {
        min = 1;
      } else if (Take("?")) {
        max = 1;
      } else if (!Take("*")) {
        if (Peek() != '{') break;
        ASSIGN_OR_RETURN(const auto counts, ParseCounts());
        std::tie(min, max) = counts;
      }
      Take("?");  // lazy: the same language
      part = Pattern::Repeat(std::move(part), min, max);
      if (++num_repeats_ > kMaxRepeat) return Error("too many repetitions");
      if (!AtEnd() && (Peek() == '*' || Peek() == '+' || Peek() == '{')) return Error("nothing to repeat");
    }
    return part;
  }

  absl::StatusOr<int> ParseCount() {
    if (AtEnd() || Peek() < '0' || Peek() > '9') return Error("a number is missing");
    int value = 0;
    for (; !AtEnd() && Peek() >= '0' && Peek() <= '9'; ++at_) {
      value = value * 10 + (Peek() - '0');
      if (value > kMaxRepeat) return Error(absl::StrCat("a repetition above ", kMaxRepeat));
    }
    return value;
  }

  absl::StatusOr<std::pair<int, int>> ParseCounts() {
    ++at_;  // {
    ASSIGN_OR_RETURN(const int min, ParseCount());
    if (Take("}")) return std::pair(min, min);
    if (!Take(",")) return Error("{ needs , or }");
    if (Take("}")) return std::pair(min, Pattern::kUnbounded);
    ASSIGN_OR_RETURN(const int max, ParseCount());
    if (!Take("}")) return Error("{ without }");
    if (max < min) return Error("{m,n} with n below m");
    return std::pair(min, max);
  }

  absl::StatusOr<Pattern> ParseAtom() {
    switch (Peek()) {
      case '(':
        return ParseGroup();
      case '[':
        return ParseClass();
      case '.':
        ++at_;
        return Chars(Complement(LineEnds()));
      case '\\':
        return ParseEscape();
      case '*':
      case '+':
      case '?':
      case '{':
        return Error("nothing to repeat");
      case '^':
      case '$':
        return Error("^ and $ may stand at the ends only");
      default: {
        ASSIGN_OR_RETURN(const uint32_t c, TakeChar());
        return Chars({{c, c}});
      }
    }
  }

  absl::StatusOr<Pattern> ParseGroup() {
    ++at_;
    if (Take("?")) {
      if (Take("<") && !AtEnd() && Peek() != '=' && Peek() != '!') {
        const size_t end = text_.find('>', at_);
        if (end == std::string_view::npos) return Error("(?< without >");
        at_ = end + 1;
      } else if (text_[at_ - 1] != '?' || !Take(":")) {
        return Error("look-around and flags are not supported");
      }
    }
    ASSIGN_OR_RETURN(Pattern inner, ParseAlternatives(/*is_top=*/false));
    if (!Take(")")) return Error("( without )");
    return inner;
  }

  // The next character of the text, as a code point.
  absl::StatusOr<uint32_t> TakeChar() {
    const auto lead = static_cast<unsigned char>(Peek());
    const int num_bytes = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    if (lead >= 0x80 && (lead < 0xC0 || at_ + num_bytes > text_.size())) return Error("not UTF-8");
    uint32_t c = num_bytes == 1 ? lead : lead & (0x7F >> num_bytes);
    for (int i = 1; i < num_bytes; ++i) c = c << 6 | (static_cast<unsigned char>(text_[at_ + i]) & 0x3F);
    at_ += num_bytes;
    return c;
  }

  absl::StatusOr<uint32_t> ParseHex(int num_digits) {
    uint32_t value = 0;
    for (int i = 0; i < num_digits; ++i, ++at_) {
      const char* digits = "0123456789abcdef";
      const char* found = AtEnd() ? nullptr : std::strchr(digits, Peek() | 0x20);
      if (found == nullptr || *found == '\0') return Error(absl::StrCat(num_digits, " hexadecimal digits are needed"));
      value = value << 4 | static_cast<uint32_t>(found - digits);
    }
    return value;
  }

  // After the backslash: a class, or nothing and then the one character in `c`.
  absl::StatusOr<std::optional<CharRanges>> ParseEscaped(uint32_t& c) {
    ++at_;
    if (AtEnd()) return Error("\\ at the end");
    const char kind = Peek();
    if (kind == 'd' || kind == 'w' || kind == 's' || kind == 'D' || kind == 'W' || kind == 'S') {
      ++at_;
      CharRanges ranges = (kind | 0x20) == 'd' ? Digits() : (kind | 0x20) == 'w' ? WordChars() : Spaces();
      return kind < 'a' ? Complement(std::move(ranges)) : std::move(ranges);
    }
    if (kind == 'x' || kind == 'u') {
      ++at_;
      ASSIGN_OR_RETURN(c, ParseHex(kind == 'x' ? 2 : 4));
      return std::nullopt;
    }
    constexpr std::string_view kNames = "nrtfv0";
    if (const size_t found = kNames.find(kind); found != std::string_view::npos) {
      ++at_;
      c = static_cast<unsigned char>("\n\r\t\f\v\0"[found]);
      return std::nullopt;
    }
    const bool is_letter = (kind >= 'a' && kind <= 'z') || (kind >= 'A' && kind <= 'Z') || (kind >= '1' && kind <= '9');
    if (is_letter) return Error(absl::StrCat("\\", std::string(1, kind), " is not supported"));
    ASSIGN_OR_RETURN(c, TakeChar());
    return std::nullopt;
  }

  absl::StatusOr<Pattern> ParseEscape() {
    uint32_t c = 0;
    ASSIGN_OR_RETURN(std::optional<CharRanges> ranges, ParseEscaped(c));
    return ranges.has_value() ? Chars(*std::move(ranges)) : Chars({{c, c}});
  }

  absl::StatusOr<Pattern> ParseClass() {
    ++at_;
    const bool negated = Take("^");
    CharRanges ranges;
    while (true) {
      if (AtEnd()) return Error("[ without ]");
      if (Take("]")) break;
      uint32_t first = 0;
      ASSIGN_OR_RETURN(const std::optional<CharRanges> escaped, ParseClassChar(first));
      if (escaped.has_value()) {
        ranges.insert(ranges.end(), escaped->begin(), escaped->end());
        continue;
      }
      uint32_t last = first;
      if (at_ + 1 < text_.size() && Peek() == '-' && text_[at_ + 1] != ']') {
        ++at_;
        ASSIGN_OR_RETURN(const std::optional<CharRanges> bad, ParseClassChar(last));
        if (bad.has_value()) return Error("a class cannot end a range");
        if (last < first) return Error("a range that ends before it starts");
      }
      ranges.emplace_back(first, last);
    }
    return Chars(negated ? Complement(std::move(ranges)) : std::move(ranges));
  }

  absl::StatusOr<std::optional<CharRanges>> ParseClassChar(uint32_t& c) {
    if (!AtEnd() && Peek() == '\\') {
      if (at_ + 1 < text_.size() && text_[at_ + 1] == 'b') {
        at_ += 2;
        c = '\b';
        return std::nullopt;
      }
      return ParseEscaped(c);
    }
    if (AtEnd()) return Error("[ without ]");
    ASSIGN_OR_RETURN(c, TakeChar());
    return std::nullopt;
  }

  const std::string_view text_;
  const RegexOptions& options_;
  size_t at_ = 0;
  int depth_ = 0;
  int num_repeats_ = 0;
};

}  // namespace

absl::StatusOr<Pattern> ParseRegex(std::string_view text, const RegexOptions& options) {
  return RegexParser(text, options).Parse();
}

}  // namespace minitron::server::constraint
