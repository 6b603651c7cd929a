// Grammars: what the walk lets through against a recognizer that knows nothing of automata, stacks or tokens.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>

#include "engine/base/check.h"
#include "server/constraint/constraint_compiler.h"
#include "server/constraint/grammar_automaton.h"
#include "server/constraint/grammar_parser.h"
#include "server/constraint/grammar_rules.h"
#include "server/grpc_status.h"
#include "tests/server/constraint/grammar_oracle.h"

namespace minitron::server::constraint {
namespace {

using ::testing::HasSubstr;

class GrammarTest : public ::testing::Test {
 protected:
  static constexpr TokenId kEnd = 3;

  GrammarTest() {
    auto loaded = Tokenizer::Load(std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny", 2048);
    CHECK(loaded.ok());
    tokenizer_ = *std::move(loaded);
    compiler_ = std::make_unique<ConstraintCompiler>(tokenizer_.get(), std::vector<TokenId>{kEnd});
    for (TokenId id = 0; id < tokenizer_->num_pieces(); ++id) {
      if (tokenizer_->IsSpecial(id) || id == tokenizer_->spm().unk_id()) continue;
      bytes_.emplace_back(tokenizer_->TokenBytes(id, /*skip_special=*/true), id);
    }
  }

  absl::StatusOr<std::shared_ptr<const CompiledConstraint>> Compile(const std::string& grammar) const {
    v1::OutputConstraint constraint;
    constraint.set_grammar(grammar);
    return compiler_->Compile(constraint);
  }

  static std::vector<TokenId> AllowedIn(engine::TokenWalk& walk) {
    std::vector<TokenId> ids;
    const absl::Span<const uint64_t> allowed = walk.Allowed();
    for (size_t id = 0; id < allowed.size() * 64; ++id) {
      if ((allowed[id / 64] >> (id % 64) & 1) != 0) ids.push_back(static_cast<TokenId>(id));
    }
    return ids;
  }

  // Some token that `text` starts with; long and short ones in turn.
  std::pair<std::string, TokenId> SomeToken(std::string_view text, Numbers& numbers) const {
    std::vector<std::pair<std::string, TokenId>> fitting;
    for (const auto& token : bytes_) {
      if (!token.first.empty() && text.substr(0, token.first.size()) == token.first) fitting.push_back(token);
    }
    return fitting.at(numbers.Below(static_cast<int>(fitting.size())));
  }

  // Whether a walk takes the text, cut into tokens in some way, and may end there. Nothing: it had too many parses.
  std::optional<bool> Takes(const engine::TokenConstraint& constraint, std::string_view text, Numbers& numbers) const {
    const std::unique_ptr<engine::TokenWalk> walk = constraint.NewWalk();
    while (!text.empty()) {
      const auto [bytes, id] = SomeToken(text, numbers);
      const std::vector<TokenId> allowed = AllowedIn(*walk);
      if (allowed.empty()) return std::nullopt;
      if (!std::binary_search(allowed.begin(), allowed.end(), id)) return false;
      walk->Advance(id);
      text.remove_prefix(bytes.size());
    }
    const std::vector<TokenId> allowed = AllowedIn(*walk);
    if (allowed.empty()) return std::nullopt;
    return std::binary_search(allowed.begin(), allowed.end(), kEnd);
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<ConstraintCompiler> compiler_;
  std::vector<std::pair<std::string, TokenId>> bytes_;
};

struct Case {
  const char* grammar;
  std::vector<const char*> matching;
  std::vector<const char*> other;
};

TEST_F(GrammarTest, TheNotationMeansWhatItSays) {
  const std::vector<Case> cases = {
      {"root ::= \"a\" | \"bc\" |", {"a", "bc", ""}, {"b", "abc"}},
      {"root ::= x y\nx ::= [a-c]+ # and a comment\ny ::= (\"1\" | \"2\"){2}", {"a12", "abc21"}, {"a1", "d12", "12"}},
      {"root ::= \"(\" root \")\" | \"x\"", {"x", "((x))"}, {"((x)", "", "()"}},
      {"root ::= list\nlist ::= list \",\" [0-9] | [0-9]", {"1", "1,2,3"}, {",1", "1,", "12"}},
      {"root ::= \"a\" root | \"\"", {"", "aaaa"}, {"b"}},
      {"root ::= e\ne ::= e \"+\" t | t\nt ::= t \"*\" f | f\nf ::= \"(\" e \")\" | [0-9]+",
       {"1", "1+2*3", "(1+2)*(3)", "((((7))))"},
       {"1+", "(1", "*1", "1)"}},
      {"root ::= v\nv ::= call | [a-z]\ncall ::= v \"(\" v? \")\"", {"f", "f()", "f(x)(y)", "f(g(x))"}, {"(", "f("}},
      {"root ::= \"\\\"\\x41\\u00e9\\n\" [\\]\\\\] .", {"\"Aé\n]z", "\"Aé\n\\東"}, {"\"Aé\n[z"}},
      {"root::=a-b{2,}a-b::=\"x\"|\n\"y\"", {"xy", "xxyy"}, {"x"}},
      {"root ::= \"if\" (\" \" root){0,2} \"fi\"", {"iffi", "if iffi if iffififi"}, {"if", "if iffi iffi iffifi"}},
      {"root ::= never | \"x\"\nnever ::= \"y\" never", {"x"}, {"y", "yx"}},
      {"root ::= \"x\" empty root | empty\nempty ::= \"\" | empty", {"", "xx"}, {"y"}},
  };
  Numbers numbers(1);
  for (const Case& c : cases) {
    const auto compiled = Compile(c.grammar);
    ASSERT_TRUE(compiled.ok()) << c.grammar << ": " << compiled.status();
    for (int round = 0; round < 3; ++round) {  // cut into tokens differently
      for (const char* text : c.matching)
        EXPECT_EQ(Takes(**compiled, text, numbers), true) << c.grammar << " on " << text;
      for (const char* text : c.other)
        EXPECT_EQ(Takes(**compiled, text, numbers), false) << c.grammar << " on " << text;
    }
  }
}

TEST_F(GrammarTest, RandomGrammarsLetThroughWhatTheyDeriveAndNothingElse) {
  int num_compiled = 0, num_ended = 0, num_derived = 0, num_refused = 0, num_ambiguous = 0;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    const std::string text = RandomGrammar(seed);
    const auto grammar = ParseGrammar(text);
    ASSERT_TRUE(grammar.ok()) << text << grammar.status();
    const auto compiled = Compile(text);
    if (!compiled.ok()) {
      const std::string why(compiled.status().message());
      const bool is_known = why.find("starts with itself") != std::string::npos ||
                            why.find("derives no text") != std::string::npos ||
                            why.find("needs more than") != std::string::npos;
      EXPECT_TRUE(is_known) << text << why;
      ++num_refused;
      continue;
    }
    ++num_compiled;
    Numbers numbers(1000 + seed);
    for (int round = 0; round < 4; ++round) {  // what is allowed is derived
      const std::unique_ptr<engine::TokenWalk> walk = (*compiled)->NewWalk();
      std::string output;
      bool ended = false;
      while (output.size() < 40 && !ended) {
        const std::vector<TokenId> allowed = AllowedIn(*walk);
        if (allowed.empty()) break;  // too many parses
        const TokenId id = allowed[numbers.Below(static_cast<int>(allowed.size()))];
        ended = id == kEnd || (std::binary_search(allowed.begin(), allowed.end(), kEnd) && numbers.Below(3) == 0);
        if (ended) break;
        output += tokenizer_->TokenBytes(id, /*skip_special=*/true);
        walk->Advance(id);
      }
      if (!ended) continue;
      ++num_ended;
      EXPECT_TRUE(Recognizer(*grammar, output).Accepts()) << text << output;
    }
    for (int round = 0; round < 4; ++round) {  // what is derived is allowed
      std::string derived;
      Derive(*grammar, grammar->rules[grammar->root], numbers, 0, derived);
      if (derived.size() > kMaxText) continue;
      ++num_derived;
      ASSERT_TRUE(Recognizer(*grammar, derived).Accepts()) << "the test is wrong: " << text << derived;
      const std::optional<bool> takes = Takes(**compiled, derived, numbers);
      num_ambiguous += takes.has_value() ? 0 : 1;
      EXPECT_TRUE(takes.value_or(true)) << text << derived;
    }
    if (HasFailure()) return;
  }
  EXPECT_GE(num_compiled, 200) << num_refused;
  EXPECT_GE(num_ended, 300);
  EXPECT_GE(num_derived, 300);
  EXPECT_LE(num_ambiguous, 10);
}

// Every token of the vocabulary, at every place of a text: allowed exactly where some text goes on with its bytes.
TEST_F(GrammarTest, ATokenIsAllowedExactlyWhereItsBytesAre) {
  const std::string text = "root ::= v\nv ::= \"(\" v (\", \" v)* \")\" | [a-z]+ | \"'\" [^']* \"'\"";
  const auto compiled = Compile(text);
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  const auto* automaton = static_cast<const GrammarAutomaton*>(compiled->get());
  const std::unique_ptr<engine::TokenWalk> walk = automaton->NewWalk();
  Stacks stacks;
  Parses parses = automaton->pushdown().Start(stacks);
  std::string_view rest = "(the, (a, 'it, was)', ((x))), not)";
  Numbers numbers(5);
  while (!rest.empty()) {
    const std::vector<TokenId> allowed = AllowedIn(*walk);
    for (const auto& [bytes, id] : bytes_) {
      Parses after = parses;
      for (const char byte : bytes) {
        after = automaton->pushdown().Step(after, static_cast<unsigned char>(byte), stacks);
      }
      ASSERT_EQ(std::binary_search(allowed.begin(), allowed.end(), id), !bytes.empty() && !after.empty())
          << rest << " token " << bytes;
    }
    EXPECT_EQ(std::binary_search(allowed.begin(), allowed.end(), kEnd), parses.ended);
    const auto [bytes, id] = SomeToken(rest, numbers);
    walk->Advance(id);
    for (const char byte : bytes) parses = automaton->pushdown().Step(parses, static_cast<unsigned char>(byte), stacks);
    rest.remove_prefix(bytes.size());
  }
}

TEST_F(GrammarTest, NestingHasNoLimitAndForgetsWhatWasClosed) {
  const auto compiled = Compile("root ::= \"(\" root \")\" root | \"\"");
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  const std::unique_ptr<engine::TokenWalk> walk = (*compiled)->NewWalk();
  Numbers numbers(1);
  const TokenId open = SomeToken("(", numbers).second, close = SomeToken(")", numbers).second;
  const auto allows = [&](TokenId id) {
    const std::vector<TokenId> allowed = AllowedIn(*walk);
    return std::binary_search(allowed.begin(), allowed.end(), id);
  };
  for (int round = 0; round < 3; ++round) {
    for (int depth = 0; depth < 5000; ++depth) walk->Advance(open);
    EXPECT_TRUE(allows(close) && !allows(kEnd));
    for (int depth = 0; depth < 5000; ++depth) walk->Advance(close);
    EXPECT_TRUE(allows(kEnd) && allows(open) && !allows(close));
  }
}

// 2^n parses after n letters: the walk ends with nothing allowed, and the sampler with a failed row.
TEST_F(GrammarTest, TooManyParsesAllowNothing) {
  const auto compiled =
      Compile("root ::= p\np ::= \"a\" p \"b\" | \"a\" q \"b\" | \"x\"\nq ::= \"a\" q \"c\" | \"a\" p \"c\" | \"x\"");
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  const std::unique_ptr<engine::TokenWalk> walk = (*compiled)->NewWalk();
  Numbers numbers(1);
  const auto is_a = [](const auto& token) { return token.first == "a"; };
  const TokenId a = std::find_if(bytes_.begin(), bytes_.end(), is_a)->second;
  for (int i = 0; i < 40; ++i) walk->Advance(a);
  EXPECT_TRUE(AllowedIn(*walk).empty());
}

TEST_F(GrammarTest, WhatIsNotWellFormedIsRefusedWithItsPlace) {
  EXPECT_EQ(ParseGrammar("root ::= \"\xFF\"").status().message(), "is not UTF-8");
  const std::pair<std::string, const char*> cases[] = {
      {"root", "::= is missing at byte 4"},
      {"::= \"a\"", "the name of a rule is missing at byte 0"},
      {"start ::= \"a\"", "there is no rule root"},
      {"root ::= a", "rule a is not defined"},
      {"root ::= \"a\"\nroot ::= \"b\"", "rule root is defined twice"},
      {"root ::= (\"a\"", "( without )"},
      {"root ::= \"a\")", "unmatched )"},
      {"root ::= (\"a\"\nb ::= \"c\"", "( without )"},
      {"root ::= \"a", "\" without \""},
      {"root ::= \"\\q\"", "escape"},
      {"root ::= \"\\x4\"", "hexadecimal"},
      {"root ::= [a", "[ without ]"},
      {"root ::= [b-a]", "before it"},
      {"root ::= \"a\"{3,2}", "n below m"},
      {"root ::= \"a\"{3", "{ without }"},
      {"root ::= \"a\"{10001}", "10000"},
      {"root ::= *", "is missing at byte 9"},
      {"root ::= \"a\" root", "derives no text"},
      {"root ::= [^\\s\\S]", "derives no text"},
      {"root ::= p\np ::= p \"1\" | q \"2\" | \"x\"\nq ::= q \"3\" | p \"4\" | \"y\"", "starts with itself"},
  };
  for (const auto& [text, why] : cases) {
    const absl::Status status = Compile(text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_EQ(GetField(status), "constraint.grammar") << text;
    EXPECT_THAT(std::string(status.message()), HasSubstr(why)) << text;
  }
}

std::string Chain(int length, const std::string& of_each, const std::string& last) {
  std::string text = "root ::= r0\n";
  for (int i = 0; i < length; ++i) {
    std::string next = of_each;
    for (size_t at = next.find('@'); at != std::string::npos; at = next.find('@')) {
      next.replace(at, 1, "r" + std::to_string(i + 1));
    }
    text += "r" + std::to_string(i) + " ::= " + next + "\n";
  }
  return text + "r" + std::to_string(length) + " ::= " + last + "\n";
}

std::string Repeated(const std::string& part, int times) {
  std::string text;
  for (int i = 0; i < times; ++i) text += part;
  return text;
}

TEST_F(GrammarTest, BombsAreRefusedByTheLimitTheyPass) {
  const std::pair<std::string, const char*> bombs[] = {
      {"root ::= ((((\"a\"{100}){100}){100}){100}){100}", "needs more than"},
      {"root ::= ((\"\"{10000}){10000}){10000}", "needs more than"},
      {Chain(900, "@ @ \"x\"", "\"a\" | root"), "needs more than"},
      {Chain(40, "@ @", "root \"x\" | \"a\""), "needs more than"},
      {Chain(900, "\"a\" @ \"b\" | \"a\" @ \"c\" | @", "\"a\" root \"d\" | \"x\""), "needs more than"},
      {"root ::= [a-z]* \"a\" ([a-z]{14} root?)", "needs more than"},
      {"root ::= " + Repeated("(", 200) + "\"a\"" + Repeated(")", 200), "groups deeper than"},
      {"root ::= \"a\"" + Repeated("*", 200), "too many repetitions"},
      {Repeated("a", 60000), "::= is missing"},
      {Chain(1001, "@", "\"a\""), "more than 1000 rules"},
  };
  for (const auto& [text, why] : bombs) {
    const auto compiled = Compile(text);
    ASSERT_FALSE(compiled.ok()) << text.substr(0, 80);
    EXPECT_THAT(std::string(compiled.status().message()), HasSubstr(why)) << text.substr(0, 80);
  }
}

}  // namespace
}  // namespace minitron::server::constraint
