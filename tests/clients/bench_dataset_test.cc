#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "clients/bench/dataset.h"

namespace minitron::bench {
namespace {

using ::testing::ElementsAre;
using Code = DatasetError::Code;

// A file of this process, written anew for each input.
std::string Written(const std::string& text) {
  const std::string path = testing::TempDir() + "bench_dataset_test_" + std::to_string(getpid());
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

constexpr DatasetOptions kTen{.count = 10, .seed = 1};

TEST(DatasetTest, RandomPromptsHaveTheLengthsAskedFor) {
  DatasetOptions options{.count = 200, .seed = 3, .vocab_size = 1000, .input_tokens = 50, .output_tokens = 8};
  for (const Prompt& prompt : RandomPrompts(options)) {
    EXPECT_EQ(prompt.ids.size(), 50u);
    EXPECT_EQ(prompt.input_tokens, 50u);
    EXPECT_EQ(prompt.output_tokens, 8u);
    EXPECT_LT(*std::max_element(prompt.ids.begin(), prompt.ids.end()), 1000u);
  }
  options.range_ratio = 0.5;
  uint32_t shortest = 1000;
  uint32_t longest = 0;
  for (const Prompt& prompt : RandomPrompts(options)) {
    shortest = std::min(shortest, prompt.input_tokens);
    longest = std::max(longest, prompt.input_tokens);
  }
  EXPECT_GE(shortest, 25u);
  EXPECT_LT(shortest, 30u);
  EXPECT_LE(longest, 75u);
  EXPECT_GT(longest, 70u);
}

TEST(DatasetTest, PromptsAreAFunctionOfTheSeed) {
  const DatasetOptions options{.count = 3, .seed = 5, .vocab_size = 5000, .input_tokens = 20};
  DatasetOptions other = options;
  other.seed = 6;
  EXPECT_EQ(RandomPrompts(options)[2].ids, RandomPrompts(options)[2].ids);
  EXPECT_NE(RandomPrompts(options)[2].ids, RandomPrompts(options)[1].ids);
  EXPECT_NE(RandomPrompts(options)[2].ids, RandomPrompts(other)[2].ids);
}

TEST(DatasetTest, WithoutAVocabularyPromptsAreWords) {
  const Prompt prompt = RandomPrompts({.count = 1, .input_tokens = 7})[0];
  EXPECT_TRUE(prompt.ids.empty());
  EXPECT_EQ(std::count(prompt.text.begin(), prompt.text.end(), ' '), 7);
}

TEST(DatasetTest, PrefixesAreSharedInTurn) {
  const std::vector<Prompt> prompts = SharedPrefixPrompts(
      {.count = 4, .seed = 1, .vocab_size = 9000, .input_tokens = 5, .num_prefixes = 2, .prefix_tokens = 30});
  const auto prefix = [&](size_t i) { return std::vector(prompts[i].ids.begin(), prompts[i].ids.begin() + 30); };
  EXPECT_EQ(prefix(0), prefix(2));
  EXPECT_EQ(prefix(1), prefix(3));
  EXPECT_NE(prefix(0), prefix(1));
  EXPECT_NE(prompts[0].ids, prompts[2].ids);
  EXPECT_EQ(prompts[0].input_tokens, 35u);
}

TEST(DatasetTest, JsonLinesAreTextsOrIds) {
  const std::string path = Written(
      "{\"prompt\": \"one two\", \"output_tokens\": 3, \"timestamp\": 1000}\n\n"
      "{\"prompt\": [5, 6, 7], \"timestamp\": 2500, \"more\": true}\n");
  std::vector<Prompt> prompts;
  const auto count = [](const std::string& text) { return static_cast<uint32_t>(text.size()); };
  ASSERT_FALSE(ReadJsonLines(path, kTen, count, &prompts).has_value());
  ASSERT_EQ(prompts.size(), 2u);
  EXPECT_EQ(prompts[0].text, "one two");
  EXPECT_EQ(prompts[0].input_tokens, 7u);
  EXPECT_EQ(prompts[0].output_tokens, 3u);
  EXPECT_EQ(prompts[0].arrival_s, 0);
  EXPECT_THAT(prompts[1].ids, ElementsAre(5, 6, 7));
  EXPECT_EQ(prompts[1].output_tokens, 64u);
  EXPECT_EQ(prompts[1].arrival_s, 1.5);
}

TEST(DatasetTest, MooncakeBlocksOfOneIdAreTheSameTokens) {
  const std::string path = Written(
      "{\"timestamp\": 0, \"input_length\": 700, \"output_length\": 4, \"hash_ids\": [9, 1]}\n"
      "{\"timestamp\": 27, \"input_length\": 900, \"output_length\": 5, \"hash_ids\": [9, 2]}\n");
  DatasetOptions options = kTen;
  options.vocab_size = 8192;
  std::vector<Prompt> prompts;
  ASSERT_FALSE(ReadMooncake(path, options, &prompts).has_value());
  ASSERT_EQ(prompts.size(), 2u);
  EXPECT_EQ(prompts[0].ids.size(), 700u);
  EXPECT_EQ(prompts[1].ids.size(), 900u);
  EXPECT_TRUE(std::equal(prompts[0].ids.begin(), prompts[0].ids.begin() + 512, prompts[1].ids.begin()));
  EXPECT_NE(prompts[0].ids[513], prompts[1].ids[513]);
  EXPECT_DOUBLE_EQ(prompts[1].arrival_s, 0.027);
  options.max_input_tokens = 100;
  prompts.clear();
  ASSERT_FALSE(ReadMooncake(path, options, &prompts).has_value());
  EXPECT_EQ(prompts[1].ids.size(), 100u);
}

TEST(DatasetTest, ShareGptTakesTheFirstTwoTurns) {
  const std::string path = Written(
      R"([{"conversations": [{"from": "human", "value": "question"}, {"from": "gpt", "value": "an answer"}]},
          {"conversations": [{"from": "human", "value": "alone"}]},
          {"conversations": [{"value": "q2"}, {"value": "a2"}, {"value": "q3"}]}])");
  std::vector<Prompt> prompts;
  const auto count = [](const std::string& text) { return static_cast<uint32_t>(text.size()); };
  ASSERT_FALSE(ReadShareGpt(path, kTen, count, &prompts).has_value());
  ASSERT_EQ(prompts.size(), 2u);
  EXPECT_EQ(prompts[0].text, "question");
  EXPECT_EQ(prompts[0].output_tokens, 9u);
  EXPECT_EQ(prompts[1].text, "q2");
}

TEST(DatasetTest, OnlyAsManyAsAskedForAreRead) {
  const std::string path = Written("{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}\nnot json\n");
  std::vector<Prompt> prompts;
  EXPECT_FALSE(ReadJsonLines(path, {.count = 2}, nullptr, &prompts).has_value());
  EXPECT_EQ(prompts.size(), 2u);
}

struct BadInput {
  const char* text;
  Code code;
  const char* message;  // what follows the path
};

TEST(DatasetTest, BadJsonLinesAreNamedByPlaceFieldAndLimit) {
  const BadInput kInputs[] = {
      {"", Code::kEmpty, ": no usable record"},
      {"{\"prompt\": ", Code::kBadJson, ":1: not a JSON object"},
      {"{\"prompt\": \"a\"}\n[1]", Code::kBadJson, ":2: not a JSON object"},
      {"{}", Code::kMissingField, ":1: prompt: missing"},
      {"{\"prompt\": \"\"}", Code::kOutOfRange, ":1: prompt: neither a text nor a list of ids"},
      {"{\"prompt\": []}", Code::kOutOfRange, ":1: prompt: neither a text nor a list of ids"},
      {"{\"prompt\": [-1]}", Code::kOutOfRange, ":1: prompt: an item is not in [0, 4294967295]"},
      {"{\"prompt\": [4294967296]}", Code::kOutOfRange, ":1: prompt: an item is not in [0, 4294967295]"},
      {"{\"prompt\": \"a\", \"output_tokens\": 0}", Code::kOutOfRange,
       ":1: output_tokens: not a whole number in [1, 1048576]"},
      {"{\"prompt\": \"a\", \"output_tokens\": \"5\"}", Code::kOutOfRange,
       ":1: output_tokens: not a whole number in [1, 1048576]"},
      {"{\"prompt\": \"a\", \"timestamp\": -1}", Code::kOutOfRange, ":1: timestamp: not in [0, 1e10] ms"},
      {"{\"prompt\": \"a\", \"timestamp\": 5}\n{\"prompt\": \"a\"}", Code::kMissingField,
       ":2: timestamp: in some records only"},
      {"{\"prompt\": \"a\", \"timestamp\": 5}\n{\"prompt\": \"a\", \"timestamp\": 4}", Code::kOutOfRange,
       ":2: timestamp: earlier than the line before"},
  };
  for (const BadInput& input : kInputs) {
    const std::string path = Written(input.text);
    std::vector<Prompt> prompts;
    const auto error = ReadJsonLines(path, kTen, nullptr, &prompts);
    ASSERT_TRUE(error.has_value()) << input.text;
    EXPECT_EQ(error->code, input.code) << input.text;
    EXPECT_EQ(error->message, path + input.message);
  }
}

TEST(DatasetTest, BadTracesAreNamedByPlaceFieldAndLimit) {
  const BadInput kInputs[] = {
      {"{\"input_length\": 1}", Code::kMissingField, ":1: timestamp: missing"},
      {"{\"timestamp\": 1}", Code::kMissingField, ":1: input_length: missing"},
      {"{\"timestamp\": 1, \"input_length\": 9999999, \"output_length\": 1}", Code::kOutOfRange,
       ":1: input_length: not a whole number in [1, 1048576]"},
      {"{\"timestamp\": 1, \"input_length\": 1, \"output_length\": 1}", Code::kMissingField, ":1: hash_ids: no list"},
      {"{\"timestamp\": 1, \"input_length\": 513, \"output_length\": 1, \"hash_ids\": [1]}", Code::kOutOfRange,
       ":1: hash_ids: 1 blocks of 512 do not hold input_length 513"},
  };
  for (const BadInput& input : kInputs) {
    const std::string path = Written(input.text);
    std::vector<Prompt> prompts;
    const auto error = ReadMooncake(path, kTen, &prompts);
    ASSERT_TRUE(error.has_value()) << input.text;
    EXPECT_EQ(error->code, input.code) << input.text;
    EXPECT_EQ(error->message, path + input.message);
  }
}

TEST(DatasetTest, BadConversationsAreNamedByPlaceAndField) {
  const BadInput kInputs[] = {
      {"{}", Code::kBadJson, ": not a JSON list"},
      {"[1]", Code::kMissingField, "[0]: conversations: no list"},
      {"[{\"conversations\": [{\"value\": \"a\"}, 7]}]", Code::kMissingField, "[0]: conversations[1].value: no text"},
      {"[{\"conversations\": []}]", Code::kEmpty, ": no usable conversation"},
  };
  for (const BadInput& input : kInputs) {
    const std::string path = Written(input.text);
    std::vector<Prompt> prompts;
    const auto error = ReadShareGpt(path, kTen, nullptr, &prompts);
    ASSERT_TRUE(error.has_value()) << input.text;
    EXPECT_EQ(error->code, input.code) << input.text;
    EXPECT_EQ(error->message, path + input.message);
  }
}

TEST(DatasetTest, FilesThatAreNoneAreRefused) {
  std::vector<Prompt> prompts;
  for (const char* path : {"/nowhere", "/"}) {
    const auto error = ReadMooncake(path, kTen, &prompts);
    ASSERT_TRUE(error.has_value()) << path;
    EXPECT_EQ(error->code, Code::kCannotRead) << path << ": " << error->message;
  }
}

}  // namespace
}  // namespace minitron::bench
