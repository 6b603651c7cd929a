// Structured output: regular expressions and JSON schemas as automata over bytes, and as sets of tokens.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/base/check.h"
#include "server/constraint/constraint_compiler.h"
#include "server/constraint/json_schema.h"
#include "server/constraint/regex_parser.h"
#include "server/grpc_status.h"

namespace minitron::server::constraint {
namespace {

using ::testing::HasSubstr;

bool Matches(const ByteAutomaton& automaton, std::string_view text) {
  ByteAutomaton::State state = ByteAutomaton::kStart;
  for (const char byte : text) state = automaton.Next(state, static_cast<unsigned char>(byte));
  return automaton.IsEnd(state);
}

struct Case {
  const char* pattern;
  std::vector<const char*> matching;
  std::vector<const char*> other;
};

void ExpectMatches(const Case& c, const absl::StatusOr<Pattern>& pattern) {
  ASSERT_TRUE(pattern.ok()) << c.pattern << ": " << pattern.status();
  const auto automaton = ByteAutomaton::Compile(*pattern, {});
  ASSERT_TRUE(automaton.ok()) << c.pattern << ": " << automaton.status();
  for (const char* text : c.matching) EXPECT_TRUE(Matches(*automaton, text)) << c.pattern << " on " << text;
  for (const char* text : c.other) EXPECT_FALSE(Matches(*automaton, text)) << c.pattern << " on " << text;
}

TEST(RegexTest, TheWholeTextMatchesOrNot) {
  const std::vector<Case> cases = {
      {"abc", {"abc"}, {"", "ab", "abcd", "xabc"}},
      {"a|bc|", {"a", "bc", ""}, {"b", "abc"}},
      {"^(?:ab)*$", {"", "ab", "abab"}, {"a", "aba"}},
      {"a+b?c{2}d{1,3}e{2,}", {"accdee", "aabccdddeee"}, {"ccdee", "accdddddee", "acdee", "accde"}},
      {"a+?b*?", {"a", "aabb"}, {"b"}},
      {"(?<name>x)y", {"xy"}, {"x"}},
      {"[a-c_-]+", {"a-_c"}, {"d", ""}},
      {"[^a-c]", {"d", "é", "東", "\xF0\x9F\x98\x80"}, {"a", "dd", "\xC3", "\xED\xA0\x80"}},
      {"[\\]\\\\]", {"]", "\\"}, {"["}},
      {"\\d\\D\\w\\W\\s\\S", {"1a_- x", "1-a\xC3\xA9\t\xE6\x9D\xB1"}, {"aa_- x"}},
      {".", {"a", "é", "\xF0\x9F\x98\x80"}, {"\n", "\xE2\x80\xA8", "\xFF", "\xC3\x28"}},
      {"\\x41\\u00e9\\u6771\\n", {"Aé東\n"}, {"A"}},
      {"[\\u0000-\\uffff]", {"a", "\xEF\xBF\xBF"}, {"\xF0\x90\x80\x80"}},
      {"\\.\\*\\(\\{\\/", {".*({/"}, {"a"}},
      {"é+", {"é", "éé"}, {"\xC3", "é\xC3"}},
  };
  for (const Case& c : cases) ExpectMatches(c, ParseRegex(c.pattern));
}

TEST(RegexTest, EveryBorderOfUtf8IsInItsClass) {
  for (const uint32_t c : {0x0u, 0x7Fu, 0x80u, 0x7FFu, 0x800u, 0xD7FFu, 0xE000u, 0xFFFFu, 0x10000u, 0x10FFFFu}) {
    const auto only = ByteAutomaton::Compile(Pattern::Chars({{c, c}}), {});
    const auto others = ByteAutomaton::Compile(Pattern::Chars(Complement({{c, c}})), {});
    ASSERT_TRUE(only.ok() && others.ok());
    std::string text;
    if (c < 0x80) {
      text = {static_cast<char>(c)};
    } else {
      const int more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
      text = {static_cast<char>((more == 1 ? 0xC0 : more == 2 ? 0xE0 : 0xF0) | (c >> (6 * more)))};
      for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80 | (c >> (6 * i) & 0x3F));
    }
    EXPECT_TRUE(Matches(*only, text)) << c;
    EXPECT_FALSE(Matches(*others, text)) << c;
  }
}

TEST(RegexTest, WhatIsNotRegularOrNotWellFormedIsRefusedWithItsPlace) {
  const std::pair<const char*, const char*> kCases[] = {
      {"(?=a)", "look-around"}, {"(?<!a)b", "look-around"}, {"(?i)a", "flags"},        {"(a)\\1", "\\1"},
      {"\\bfoo", "\\b"},        {"a**", "nothing to"},      {"*a", "nothing to"},      {"(a", "( without )"},
      {"a)", "unmatched )"},    {"[a", "[ without ]"},      {"[b-a]", "before it"},    {"a{3,2}", "n below m"},
      {"a{", "number"},         {"a{10001}", "10000"},      {"a\\", "at the end"},     {"\\xG0", "hexadecimal"},
      {"a^b", "ends only"},     {"a$b", "ends only"},       {"[a-\\d]", "cannot end"}, {"\xC3", "not UTF-8"},
      {"(?<a", "without >"},    {"{2}", "nothing to"},      {"\xFFx", "not UTF-8"}};
  for (const auto& [text, why] : kCases) {
    const auto pattern = ParseRegex(text);
    ASSERT_FALSE(pattern.ok()) << text;
    EXPECT_THAT(std::string(pattern.status().message()), HasSubstr(why)) << text;
    EXPECT_THAT(std::string(pattern.status().message()), HasSubstr("at byte")) << text;
  }
  EXPECT_FALSE(ParseRegex(std::string(200, '(') + std::string(200, ')')).ok()) << "depth";
}

TEST(AutomatonTest, BombsAreRefusedByTheLimitTheyPass) {
  for (const char* bomb : {"((((a{100}){100}){100}){100}){100}", "(((){10000}){10000}){10000}", "(.*a){30}.{20}b",
                           "(a|b)*a(a|b){12}", "[^x]{9999}"}) {
    const auto pattern = ParseRegex(bomb);
    ASSERT_TRUE(pattern.ok()) << bomb;
    const auto automaton = ByteAutomaton::Compile(*pattern, {});
    ASSERT_FALSE(automaton.ok()) << bomb;
    EXPECT_THAT(std::string(automaton.status().message()), HasSubstr("needs more than")) << bomb;
  }
  EXPECT_EQ(ByteAutomaton::Compile(Pattern::Alternate({}), {}).status().message(), "nothing can match");
  EXPECT_EQ(ByteAutomaton::Compile(*ParseRegex("a[^\\s\\S]"), {}).status().message(), "nothing can match");
}

TEST(JsonSchemaTest, WhatMatchesIsValidAndInTheCompactForm) {
  const std::vector<Case> cases = {
      {R"({"type":"integer"})", {"0", "-7", "123456789012345"}, {"01", "1.0", "", "+1", "1234567890123456"}},
      {R"({"type":"integer","minimum":-3,"maximum":12})", {"-3", "0", "9", "10", "12"}, {"-4", "13", "-0", "00"}},
      {R"({"type":"integer","exclusiveMinimum":98,"exclusiveMaximum":1001})",
       {"99", "100", "999", "1000"},
       {"98", "1001"}},
      {R"({"type":"number"})", {"1", "-0.5", "1e9", "2.5E-3"}, {".5", "1.", "1e", "e1"}},
      {R"({"type":["string","null"],"maxLength":2})", {"null", R"("")", R"("ab")", R"("é\n")"}, {R"("abc")", "ab"}},
      {R"({"type":"string","minLength":1})", {R"("a")", R"("\"")"}, {R"("")", "\"\n\"", R"("\x")", R"(")"}},
      {R"({"type":"string","pattern":"^a.c$"})", {R"("abc")"}, {R"("ac")", R"("a"c")", R"("a\c")"}},
      {R"({"type":"string","pattern":"b"})", {R"("abc")", R"("b")"}, {R"("ac")"}},
      {R"({"enum":[1,"a\"b",null,[1,{"k":2}]]})",
       {"1", R"("a\"b")", "null", R"([1,{"k":2}])", R"([1, {"k": 2}])"},
       {"2"}},
      {R"({"type":"string","enum":["a",1]})", {R"("a")"}, {"1"}},
      {R"({"const":true})", {"true"}, {"false"}},
      {R"({"type":"array","items":{"type":"boolean"},"minItems":1,"maxItems":2})",
       {"[true]", "[true,false]", "[true, false]"},
       {"[]", "[true,true,true]", "[true ,true]"}},
      {R"({"type":"array","maxItems":0})", {"[]"}, {"[1]"}},
      {R"({"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"null"},"c":{"const":1}},"required":["b"]})",
       {R"({"b":null})", R"({"a":1, "b": null,"c":1})", R"({"b":null,"c":1})", R"({"a":1,"b":null})"},
       {"{}", R"({"a":1})", R"({"b":null,"a":1})", R"({,"b":null})", R"({"b":null,})", R"({"c":1})"}},
      {R"({"type":"object","properties":{"a":{"type":"null"}}})", {"{}", R"({"a":null})"}, {R"({"b":1})"}},
      {R"({"type":"object","additionalProperties":{"type":"integer"}})", {"{}", R"({"x":1,"y":2})"}, {R"({"x":"y"})"}},
      {R"({"type":"object","additionalProperties":false})", {"{}"}, {R"({"x":1})"}},
      {R"({"type":"object","required":["z"]})", {R"({"z":[1,"w"]})"}, {"{}", R"({"z":[[1]]})"}},
      {R"({"anyOf":[{"type":"integer"},{"type":"null"}]})", {"3", "null"}, {"true"}},
      {R"({"oneOf":[{"type":"integer"},{"type":"string"}]})", {"3", R"("3")"}, {"true"}},
      {R"({"$ref":"#/$defs/p","$defs":{"p":{"$ref":"#/definitions/q"}},"definitions":{"q":{"const":5}}})",
       {"5"},
       {"6"}},
      {R"({"title":"t","description":"d"})", {"1", R"([{"a":1}])"}, {"", "[1", "nul"}},
      {"true", {"null"}, {""}},
  };
  for (const Case& c : cases) ExpectMatches(c, ParseJsonSchema(c.pattern));
}

TEST(JsonSchemaTest, WhatCannotBeKeptIsRefusedWithItsPlace) {
  const std::pair<const char*, const char*> kCases[] = {
      {"{", "is not JSON"},
      {"3", "no schema"},
      {"false", "allows no value"},
      {R"({"type":"date"})", "no type \"date\""},
      {R"({"type":"object","patternProperties":{}})", "patternProperties"},
      {R"({"type":"object","properties":{"a":{"not":{}}}})", "/properties/a"},
      {R"({"type":"number","minimum":1})", "minimum"},
      {R"({"type":"string","minLength":3,"maxLength":2})", "below"},
      {R"({"type":"string","maxLength":-1})", "outside [0, 10000]"},
      {R"j({"type":"string","pattern":"(?=x)"})j", "/pattern: look-around"},
      {R"({"type":"integer","minimum":5,"maximum":4})", "no integer"},
      {R"({"type":"integer","minimum":1e300})", "15 digits"},
      {R"({"type":"array","uniqueItems":true})", "uniqueItems"},
      {R"({"enum":[]})", "/enum"},
      {R"({"type":"string","enum":[1]})", "no value"},
      {R"({"oneOf":[{"type":"integer"},{"type":"number"}]})", "oneOf"},
      {R"({"allOf":[{"type":"integer"},{"type":"integer"}]})", "allOf"},
      {R"({"$ref":"#/$defs/a"})", "names no definition"},
      {R"({"$ref":"#/$defs/a","$defs":{"a":{"type":"array","items":{"$ref":"#/$defs/a"}}}})", "comes back to itself"},
      {R"({"type":"object","required":["a"],"additionalProperties":false})", "required but no property"},
  };
  for (const auto& [text, why] : kCases) {
    const auto pattern = ParseJsonSchema(text);
    ASSERT_FALSE(pattern.ok()) << text;
    EXPECT_THAT(std::string(pattern.status().message()), HasSubstr(why)) << text;
  }
}

class CompilerTest : public ::testing::Test {
 protected:
  CompilerTest() {
    auto loaded = Tokenizer::Load(std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny", 2048);
    CHECK(loaded.ok());
    tokenizer_ = *std::move(loaded);
    compiler_ = std::make_unique<ConstraintCompiler>(tokenizer_.get(), std::vector<TokenId>{3});
  }
  absl::StatusOr<std::shared_ptr<const TokenAutomaton>> Compile(const std::string& regex) const {
    v1::OutputConstraint constraint;
    constraint.set_regex(regex);
    auto compiled = compiler_->Compile(constraint);
    if (!compiled.ok()) return compiled.status();
    return std::static_pointer_cast<const TokenAutomaton>(*compiled);
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<ConstraintCompiler> compiler_;
};

bool Has(const TokenAutomaton& automaton, TokenAutomaton::State state, TokenId id) {
  return automaton.Allowed(state)[id / 64] >> (id % 64) & 1;
}

TEST_F(CompilerTest, ATokenIsAllowedExactlyWhereItsBytesAre) {
  const std::string regex = "[a-z ]*(the|東京| [0-9]{2})+[.!]?";
  const auto automaton = Compile(regex);
  ASSERT_TRUE(automaton.ok()) << automaton.status();
  const auto bytes = ByteAutomaton::Compile(*ParseRegex(regex), {});
  for (ByteAutomaton::State state = ByteAutomaton::kStart; state < static_cast<uint32_t>(bytes->num_states());
       ++state) {
    for (TokenId id = 0; id < tokenizer_->vocab_size(); ++id) {
      const std::string text = tokenizer_->TokenBytes(id, /*skip_special=*/true);
      ByteAutomaton::State next = state;
      for (const char byte : text) next = bytes->Next(next, static_cast<unsigned char>(byte));
      const bool is_text = !text.empty() && !tokenizer_->IsSpecial(id) && id != tokenizer_->spm().unk_id();
      const bool expected = id == 3 ? bytes->IsEnd(state) : is_text && next != ByteAutomaton::kDead;
      ASSERT_EQ(Has(**automaton, state, id), expected) << "state " << state << " token " << id;
      if (expected && id != 3) {
        ASSERT_EQ((*automaton)->Advance(state, id), next);
      }
    }
  }
}

TEST_F(CompilerTest, SomethingIsAlwaysAllowed) {
  for (const char* regex : {"a", "é東\\u0001", "(yes|no)", "[^a-z]{3}"}) {
    const auto automaton = Compile(regex);
    ASSERT_TRUE(automaton.ok()) << regex;
    const auto bytes = ByteAutomaton::Compile(*ParseRegex(regex), {});
    for (uint32_t state = ByteAutomaton::kStart; state < static_cast<uint32_t>(bytes->num_states()); ++state) {
      const auto allowed = (*automaton)->Allowed(state);
      EXPECT_TRUE(std::any_of(allowed.begin(), allowed.end(), [](uint64_t word) { return word != 0; })) << regex;
    }
  }
}

TEST_F(CompilerTest, EqualConstraintsAreCompiledOnce) {
  const auto first = Compile("a+");
  const auto second = Compile("b+");
  const auto again = Compile("a+");
  ASSERT_TRUE(first.ok() && second.ok() && again.ok());
  EXPECT_EQ(*first, *again);
  EXPECT_NE(*first, *second);
}

TEST_F(CompilerTest, ErrorsNameTheField) {
  EXPECT_EQ(GetField(Compile("(").status()), "constraint.regex");
  EXPECT_EQ(Compile("(").status().code(), absl::StatusCode::kInvalidArgument);
  v1::OutputConstraint schema;
  schema.set_json_schema("[");
  EXPECT_EQ(GetField(compiler_->Compile(schema).status()), "constraint.json_schema");
}

}  // namespace
}  // namespace minitron::server::constraint
