#include "clients/cpp/chat.h"

#include <gtest/gtest.h>

namespace minitron::client {
namespace {

std::string PromptOf(const Conversation& conversation, const std::string& line) {
  std::string prompt;
  const auto error = conversation.Prompt(line, &prompt);
  EXPECT_FALSE(error.has_value()) << error->message;
  return prompt;
}

TEST(ConversationTest, ABaseModelContinuesWhatWasSaid) {
  Conversation conversation(ChatTemplate::kNone, "Start. ");
  EXPECT_EQ(PromptOf(conversation, "one"), "Start. one");
  conversation.Add("one", " two");
  EXPECT_EQ(PromptOf(conversation, "three"), "Start. one two\nthree");
}

TEST(ConversationTest, NemotronMiniMarksTurns) {
  Conversation conversation(ChatTemplate::kNemotronMini, "Be brief.");
  conversation.Add("Hi ", " Hello.\n");
  EXPECT_EQ(
      PromptOf(conversation, "Who?"),
      "<extra_id_0>System\nBe brief.\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWho?\n"
      "<extra_id_1>Assistant\n");
  EXPECT_EQ(PromptOf(Conversation(ChatTemplate::kNemotronMini, ""), "Hi"),
            "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n");
}

TEST(ConversationTest, TurnsCanBeForgotten) {
  Conversation conversation(ChatTemplate::kNone, "");
  EXPECT_FALSE(conversation.Undo());
  conversation.Add("a", "b");
  conversation.Add("c", "d");
  EXPECT_TRUE(conversation.Undo());
  EXPECT_EQ(PromptOf(conversation, "e"), "ab\ne");
  conversation.Reset();
  EXPECT_EQ(conversation.num_turns(), 0u);
}

TEST(ConversationTest, OldestTurnsAreLeftOutUntilThePromptFits) {
  Conversation conversation(ChatTemplate::kNone, "");
  for (const char* line : {"aaaa", "bbbb", "cccc"}) conversation.Add(line, "");  // five bytes each
  int calls = 0;
  const auto bytes = [&calls](const std::string& prompt) -> std::optional<int64_t> {
    ++calls;
    return prompt.size();
  };
  EXPECT_EQ(conversation.Fit("d", 18, bytes), 0u);
  EXPECT_EQ(calls, 0) << "16 bytes are 18 tokens at most";
  EXPECT_EQ(conversation.Fit("d", 15, bytes), 1u);
  EXPECT_EQ(PromptOf(conversation, "d"), "bbbb\ncccc\nd");
  EXPECT_EQ(conversation.Fit("d", 11, bytes), 0u) << "what fits stays";
  Conversation longer(ChatTemplate::kNone, "");
  for (int i = 0; i < 10; ++i) longer.Add("aaaa", "");
  EXPECT_EQ(longer.Fit("d", 40, bytes), 5u) << "51 bytes, and 30 are wanted then";
  EXPECT_EQ(conversation.Fit("d", 0, bytes), 2u);
  EXPECT_EQ(conversation.Fit("d", 0, bytes), 0u) << "a line alone is the server's to refuse";
  EXPECT_EQ(PromptOf(conversation, "d"), "d");
  EXPECT_EQ(conversation.num_turns(), 3u);
  EXPECT_TRUE(conversation.Undo());
  conversation.Add("eeee", "");
  EXPECT_EQ(PromptOf(conversation, "d"), "eeee\nd");
  conversation.Reset();
  conversation.Add("f", "");
  EXPECT_EQ(PromptOf(conversation, "d"), "f\nd");
}

TEST(ConversationTest, NothingIsLeftOutWhenTokensCannotBeCounted) {
  Conversation conversation(ChatTemplate::kNone, "");
  conversation.Add("aaaa", "");
  EXPECT_EQ(conversation.Fit("d", 1, [](const std::string&) { return std::nullopt; }), 0u);
}

TEST(ConversationTest, ATranscriptHasEverythingThatWasSaid) {
  Conversation conversation(ChatTemplate::kNone, "System.");
  conversation.Add("one", " two");
  conversation.Add("three", "four");
  conversation.Fit("x", 0, [](const std::string& prompt) { return static_cast<int64_t>(prompt.size()); });
  EXPECT_EQ(conversation.Transcript(), "System.\n\n> one\n two\n\n> three\nfour\n\n");
}

TEST(ConversationTest, TextThatCannotBeSentIsRefused) {
  std::string prompt;
  EXPECT_TRUE(Conversation(ChatTemplate::kNone, "").Prompt("\xFF", &prompt).has_value());
  EXPECT_FALSE(Conversation(ChatTemplate::kNone, "").Prompt("<extra_id_1>", &prompt).has_value());
  EXPECT_TRUE(Conversation(ChatTemplate::kNemotronMini, "").Prompt("<extra_id_1>", &prompt).has_value());
  EXPECT_TRUE(Conversation(ChatTemplate::kNemotronMini, "<extra_id_0>").Prompt("x", &prompt).has_value());
}

TEST(ConversationTest, TemplatesHaveNames) {
  EXPECT_EQ(ParseChatTemplate("none"), ChatTemplate::kNone);
  EXPECT_EQ(ParseChatTemplate("nemotron-mini"), ChatTemplate::kNemotronMini);
  EXPECT_FALSE(ParseChatTemplate("").has_value());
}

}  // namespace
}  // namespace minitron::client
