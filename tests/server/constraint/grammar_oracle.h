// What a grammar derives, by means that know nothing of automata, stacks or tokens: a recognizer, random grammars and
// random texts of one.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/philox.h"
#include "server/constraint/grammar_parser.h"
#include "server/constraint/pattern.h"

namespace minitron::server::constraint {

// Where each rule may end that starts at a place of a text, by repeating the definition until nothing is added. ASCII.
class Recognizer {
 public:
  Recognizer(const Grammar& grammar, std::string_view text)
      : grammar_(grammar), text_(text), ends_(grammar.rules.size(), std::vector<std::set<size_t>>(text.size() + 1)) {
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t rule = 0; rule < grammar.rules.size(); ++rule) {
        for (size_t start = 0; start <= text.size(); ++start) {
          std::set<size_t> ends = EndsOf(grammar.rules[rule], {start});
          if (ends == ends_[rule][start]) continue;
          ends_[rule][start] = std::move(ends);
          changed = true;
        }
      }
    }
  }

  bool Accepts() const { return ends_[grammar_.root][0].count(text_.size()) > 0; }

 private:
  std::set<size_t> EndsOf(const Pattern& pattern, std::set<size_t> starts) const {
    std::set<size_t> ends;
    switch (pattern.kind()) {
      case Pattern::Kind::kBytes:
        for (const size_t start : starts) {
          if (text_.substr(start, pattern.bytes().size()) == pattern.bytes())
            ends.insert(start + pattern.bytes().size());
        }
        return ends;
      case Pattern::Kind::kChars:
        for (const size_t start : starts) {
          for (const auto& [first, last] : pattern.chars()) {
            const uint32_t c = start < text_.size() ? static_cast<unsigned char>(text_[start]) : UINT32_MAX;
            if (first <= c && c <= last) ends.insert(start + 1);
          }
        }
        return ends;
      case Pattern::Kind::kRule:
        for (const size_t start : starts)
          ends.insert(ends_[pattern.rule()][start].begin(), ends_[pattern.rule()][start].end());
        return ends;
      case Pattern::Kind::kConcat:
        for (const Pattern& part : pattern.parts()) starts = EndsOf(part, std::move(starts));
        return starts;
      case Pattern::Kind::kAlternate:
        for (const Pattern& part : pattern.parts()) ends.merge(EndsOf(part, starts));
        return ends;
      case Pattern::Kind::kRepeat:
        for (int i = 0; i < pattern.min(); ++i) starts = EndsOf(pattern.parts()[0], std::move(starts));
        ends = starts;
        for (int i = pattern.min(); i < pattern.max() || pattern.max() == Pattern::kUnbounded; ++i) {
          starts = EndsOf(pattern.parts()[0], std::move(starts));
          const size_t before = ends.size();
          ends.insert(starts.begin(), starts.end());
          if (ends.size() == before) break;
        }
        return ends;
      case Pattern::Kind::kSeparated:
        break;
    }
    return ends;
  }

  const Grammar& grammar_;
  const std::string_view text_;
  std::vector<std::vector<std::set<size_t>>> ends_;  // by rule and start
};

// Numbers by counter: the n-th of a seed.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : seed_(seed) {}
  int Below(int limit) { return static_cast<int>(engine::UniformForPosition(seed_, next_++) * limit); }

 private:
  const uint64_t seed_;
  int32_t next_ = 0;
};

inline constexpr int kNumRules = 5;

// An element, a sequence or a choice over few letters, so that parses collide; rules name each other in any way.
inline std::string RandomPart(Numbers& numbers, int depth) {
  const std::string letters = "abc()";
  const int kind = numbers.Below(depth > 2 ? 4 : 7);
  std::string part;
  if (kind == 0) part = std::string("\"") + letters[numbers.Below(5)] + letters[numbers.Below(5)] + "\"";
  if (kind == 1) part = "[ab]";
  if (kind == 2) part = std::string("\"") + letters[numbers.Below(5)] + "\"";
  if (kind == 3) part = "r" + std::to_string(numbers.Below(kNumRules));
  if (kind >= 4) {
    part = "(" + RandomPart(numbers, depth + 1) + (kind == 4 ? " " : " | ") + RandomPart(numbers, depth + 1) + ")";
  }
  const char* repeats[] = {"", "", "", "", "?", "*", "+", "{2}", "{1,2}"};
  return part + repeats[numbers.Below(9)];
}

inline std::string RandomGrammar(uint64_t seed) {
  Numbers numbers(seed);
  std::string text = "root ::= r0\n";
  for (int rule = 0; rule < kNumRules; ++rule) {
    text += "r" + std::to_string(rule) + " ::= ";
    const int num_alternatives = 1 + numbers.Below(3);
    for (int i = 0; i < num_alternatives; ++i) {
      text += i > 0 ? " | " : "";
      if (numbers.Below(2) == 0) text += "\"x\" ";  // else a rule may start with itself through others
      text += RandomPart(numbers, 0) + " " + RandomPart(numbers, 0);
    }
    text += "\n";
  }
  return text;
}

// A text of the grammar, or more than kMaxText bytes of one.
inline constexpr size_t kMaxText = 24;
inline void Derive(const Grammar& grammar, const Pattern& pattern, Numbers& numbers, int depth, std::string& text) {
  if (text.size() > kMaxText || depth > 60) {
    text.resize(kMaxText + 1);
    return;
  }
  switch (pattern.kind()) {
    case Pattern::Kind::kBytes:
      text += pattern.bytes();
      break;
    case Pattern::Kind::kChars:
      text += static_cast<char>(pattern.chars()[0].first);
      break;
    case Pattern::Kind::kRule:
      Derive(grammar, grammar.rules[pattern.rule()], numbers, depth + 1, text);
      break;
    case Pattern::Kind::kConcat:
      for (const Pattern& part : pattern.parts()) Derive(grammar, part, numbers, depth + 1, text);
      break;
    case Pattern::Kind::kAlternate:
      Derive(grammar, pattern.parts()[numbers.Below(static_cast<int>(pattern.parts().size()))], numbers, depth + 1,
             text);
      break;
    case Pattern::Kind::kRepeat: {
      const int max = pattern.max() == Pattern::kUnbounded ? pattern.min() + 2 : pattern.max();
      const int times = pattern.min() + numbers.Below(max - pattern.min() + 1);
      for (int i = 0; i < times; ++i) Derive(grammar, pattern.parts()[0], numbers, depth + 1, text);
      break;
    }
    case Pattern::Kind::kSeparated:
      break;
  }
}

}  // namespace minitron::server::constraint
