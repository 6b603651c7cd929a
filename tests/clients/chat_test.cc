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
