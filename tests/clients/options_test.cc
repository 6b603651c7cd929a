#include "clients/cpp/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "clients/cpp/commands.h"
#include "clients/cpp/generate_request.h"

namespace minitron::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

const CommandSpec kSpec = {"generate", "[PROMPT]", "Generates.", 1, GenerateOptions()};

Arguments Parsed(const std::vector<std::string>& args) {
  Arguments arguments;
  const auto error = Arguments::Parse(kSpec, args, &arguments);
  EXPECT_FALSE(error.has_value()) << error->message;
  return arguments;
}

std::string ParseError(const std::vector<std::string>& args) {
  Arguments arguments;
  const auto error = Arguments::Parse(kSpec, args, &arguments);
  return error.has_value() ? error->message : "";
}

std::string TaskError(const std::vector<std::string>& args) {
  v1::GenerationTask task;
  const auto error = BuildTask(Parsed(args), "x", &task);
  return error.has_value() ? error->message : "";
}

TEST(OptionsTest, BothSpellingsOfAValueAndRepetitionsAreRead) {
  const Arguments arguments =
      Parsed({"--top-k", "5", "--seed=7", "--stop", "a", "--stop=b=c", "--seed", "8", "prompt"});
  EXPECT_EQ(arguments.Get("top-k"), "5");
  EXPECT_EQ(arguments.Get("seed"), "8");
  EXPECT_THAT(arguments.All("stop"), ElementsAre("a", "b=c"));
  EXPECT_THAT(arguments.positionals(), ElementsAre("prompt"));
  EXPECT_FALSE(arguments.Has("top-p"));
}

TEST(OptionsTest, DashesInValuesAndPromptsAreNotOptions) {
  EXPECT_EQ(Parsed({"--presence-penalty", "-1.5"}).Get("presence-penalty"), "-1.5");
  EXPECT_THAT(Parsed({"-"}).positionals(), ElementsAre("-"));
  EXPECT_THAT(Parsed({"--", "--top-k"}).positionals(), ElementsAre("--top-k"));
}

TEST(OptionsTest, WrongCommandLinesAreNamed) {
  EXPECT_THAT(ParseError({"--temprature", "1"}), HasSubstr("did you mean --temperature?"));
  EXPECT_THAT(ParseError({"--temp", "1"}), HasSubstr("did you mean --temperature?"));
  EXPECT_EQ(ParseError({"--zzzzzzzz"}), "unknown option --zzzzzzzz of generate");
  EXPECT_EQ(ParseError({"--top-k"}), "--top-k needs a value: N");
  EXPECT_EQ(ParseError({"--ignore-eos=1"}), "--ignore-eos takes no value");
  EXPECT_EQ(ParseError({"one", "two"}), "unexpected argument \"two\" of generate");
  EXPECT_THAT(ParseError({"-t"}), HasSubstr("options start with --"));
}

TEST(OptionsTest, NumbersAreWholeStringsInRange) {
  uint64_t value = 9;
  EXPECT_TRUE(ParseUint("18446744073709551615", UINT64_MAX, &value));
  EXPECT_EQ(value, UINT64_MAX);
  for (const char* text : {"", "-1", "1x", " 1", "1.0", "18446744073709551616"}) {
    EXPECT_FALSE(ParseUint(text, UINT64_MAX, &value)) << text;
  }
  EXPECT_FALSE(ParseUint("4294967296", UINT32_MAX, &value));
  std::vector<uint32_t> ids;
  EXPECT_TRUE(ParseIds("1, 2 3\n4", &ids));
  EXPECT_THAT(ids, ElementsAre(1u, 2u, 3u, 4u));
  EXPECT_FALSE(ParseIds("1,a", &ids));
}

TEST(OptionsTest, EscapesBecomeBytes) {
  EXPECT_EQ(Unescape("a\\nb\\t\\\\n\\x41\\xzz\\q\\"), "a\nb\t\\nA\\xzz\\q\\");
  EXPECT_EQ(Unescape("\\x4"), "\\x4");
}

TEST(OptionsTest, OnlyWellFormedUtf8IsSent) {
  for (const char* text :
       {"", "a", "\xC3\xA9", "\xED\x9F\xBF", "\xEE\x80\x80", "\xF0\x9F\x98\x80", "\xF4\x8F\xBF\xBF"}) {
    EXPECT_TRUE(IsUtf8(text)) << text;
  }
  for (const char* text : {"\x80", "\xC0\x80", "\xC3", "\xE0\x9F\x80", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF",
                           "\xF4\x90\x80\x80", "\xFF", "\xF5\x80\x80\x80", "\xE2\x82", "\xC3(", "a\xF0\x9F\x98"}) {
    EXPECT_FALSE(IsUtf8(text));
  }
  v1::GenerationTask task;
  EXPECT_EQ(BuildTask(Parsed({}), "caf\xE9", &task)->message, "the prompt is not valid UTF-8");
  EXPECT_EQ(TaskError({"--stop=\\xff"}), "--stop \"\\xff\" is not valid UTF-8");
}

TEST(OptionsTest, HelpListsEveryOptionOfEveryCommand) {
  for (const Command& command : Commands()) {
    const std::string help = Help(command.spec);
    EXPECT_THAT(help, HasSubstr("usage: minitron " + command.spec.name));
    for (const OptionSpec& option : command.spec.options) EXPECT_THAT(help, HasSubstr("--" + option.name));
    EXPECT_THAT(help, HasSubstr("--server"));
  }
}

TEST(GenerateRequestTest, OptionsBecomeFields) {
  v1::GenerationTask task;
  const Arguments arguments = Parsed({"--temperature=0.5", "--top-k=3", "--seed=4", "--n=2", "--logit-bias=5=-1.5",
                                      "--max-tokens=6", "--stop=\\n", "--stop-id=7,8", "--ignore-eos", "--logprobs=0",
                                      "--add-bos", "--priority=-3", "--keep-special", "--cache-salt=s"});
  ASSERT_FALSE(BuildTask(arguments, "prompt", &task).has_value());
  EXPECT_EQ(task.text(), "prompt");
  EXPECT_EQ(task.sampling().temperature(), 0.5f);
  EXPECT_EQ(task.sampling().top_k(), 3u);
  EXPECT_FALSE(task.sampling().has_top_p()) << "what is not given is left to the server";
  EXPECT_EQ(task.sampling().seed(), 4u);
  EXPECT_EQ(task.sampling().num_sequences(), 2u);
  EXPECT_EQ(task.sampling().logit_bias().at(5), -1.5f);
  EXPECT_EQ(task.stopping().max_tokens(), 6u);
  EXPECT_THAT(task.stopping().stop_sequences(), ElementsAre("\n"));
  EXPECT_THAT(task.stopping().stop_token_ids(), ElementsAre(7u, 8u));
  EXPECT_TRUE(task.stopping().ignore_eos());
  EXPECT_TRUE(task.output().has_logprobs());
  EXPECT_FALSE(task.output().skip_special_tokens());
  EXPECT_TRUE(task.tokenize_options().add_bos());
  EXPECT_FALSE(task.tokenize_options().has_parse_special());
  EXPECT_EQ(task.priority(), -3);
  EXPECT_EQ(task.cache_salt(), "s");
}

TEST(GenerateRequestTest, AtMostOneConstraintIsGiven) {
  v1::GenerationTask task;
  ASSERT_FALSE(BuildTask(Parsed({"--choice=yes", "--choice=no"}), "prompt", &task).has_value());
  EXPECT_THAT(task.constraint().choices().options(), ElementsAre("yes", "no"));
  ASSERT_FALSE(BuildTask(Parsed({"--regex=[0-9]+"}), "prompt", &task).has_value());
  EXPECT_EQ(task.constraint().regex(), "[0-9]+");
  EXPECT_THAT(TaskError({"--regex=a", "--json-object"}), HasSubstr("give one of --regex"));
}

TEST(GenerateRequestTest, ValuesThatAreNoNumbersAreNamed) {
  EXPECT_EQ(TaskError({"--top-k=-1"}), "--top-k \"-1\" is not a whole number from 0");
  EXPECT_EQ(TaskError({"--temperature=hot"}), "--temperature \"hot\" is not a number");
  EXPECT_EQ(TaskError({"--logit-bias=5"}), "--logit-bias \"5\" is not ID=NUMBER");
  EXPECT_EQ(TaskError({"--stop-id=x"}), "--stop-id \"x\" is not a token id");
}

TEST(GenerateRequestTest, ExactlyOnePromptIsNeeded) {
  std::optional<std::string> text;
  EXPECT_THAT(ReadPrompt(Parsed({}), &text)->message, HasSubstr("no prompt"));
  EXPECT_THAT(ReadPrompt(Parsed({"--prompt=a", "b"}), &text)->message, HasSubstr("more than one prompt"));
  EXPECT_FALSE(ReadPrompt(Parsed({"b"}), &text).has_value());
  EXPECT_EQ(text, "b");
  text.reset();
  EXPECT_FALSE(ReadPrompt(Parsed({"--prompt-ids=1"}), &text).has_value());
  EXPECT_FALSE(text.has_value());
  EXPECT_THAT(ReadPrompt(Parsed({"--prompt-file=/nowhere"}), &text)->message, HasSubstr("/nowhere"));
  EXPECT_THAT(ReadPrompt(Parsed({"--prompt-file=/"}), &text)->message, HasSubstr("cannot read /"));
}

}  // namespace
}  // namespace minitron::client
