#include "clients/cpp/manual.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>

namespace minitron::client {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// What bash answers to Tab after `words`; the last one is what was typed so far.
std::string Completed(const std::string& words, int index) {
  const std::string path = testing::TempDir() + "manual_test_" + std::to_string(getpid());
  std::ofstream(path) << *CompletionScript("bash", Commands()) << "COMP_WORDS=(" << words << ")\nCOMP_CWORD=" << index
                      << "\n_minitron\nprintf '%s ' \"${COMPREPLY[@]}\"\n";
  FILE* const pipe = popen(("bash --norc " + path).c_str(), "r");
  std::string output;
  char chunk[4096];
  while (pipe != nullptr && std::fgets(chunk, sizeof(chunk), pipe) != nullptr) output += chunk;
  EXPECT_EQ(pclose(pipe), 0);
  return output;
}

TEST(CompletionTest, BashCompletesCommandsAndTheirOptions) {
  EXPECT_EQ(Completed("minitron gen", 1), "generate ");
  EXPECT_EQ(Completed("minitron de", 1), "detokenize ");
  EXPECT_EQ(Completed("minitron generate --top", 2), "--top-k --top-p ");
  EXPECT_EQ(Completed("minitron load --top", 2), " ");
  EXPECT_THAT(Completed("minitron load --", 2), HasSubstr("--server "));
  EXPECT_EQ(Completed("minitron completion z", 2), "zsh ");
}

TEST(CompletionTest, EveryShellKnowsEveryOption) {
  for (const char* shell : {"bash", "zsh", "fish"}) {
    const std::string script = *CompletionScript(shell, Commands());
    for (const Command& command : Commands()) {
      EXPECT_THAT(script, HasSubstr(command.spec.name)) << shell;
      for (const OptionSpec& option : command.spec.options) {
        EXPECT_THAT(script, HasSubstr((std::string(shell) == "fish" ? "-l " : "--") + option.name)) << shell;
      }
    }
  }
  EXPECT_FALSE(CompletionScript("tcsh", Commands()).has_value());
}

TEST(CompletionTest, FilesAreOfferedWhereAnOptionTakesOne) {
  const std::vector<Command> commands = {
      {{"x", "SHELL", "X.", 1, {{"f", "FILE", "a file"}, {"n", "N", "a number"}, {"s", "", "a switch"}}}, nullptr}};
  const std::string fish = *CompletionScript("fish", commands);
  EXPECT_THAT(fish, HasSubstr(" -l f -r -F -d 'a file'"));
  EXPECT_THAT(fish, HasSubstr(" -l n -x -d 'a number'"));
  EXPECT_THAT(fish, HasSubstr(" -l s -d 'a switch'"));
  EXPECT_THAT(fish, HasSubstr("from x' -a 'bash zsh fish'"));
  EXPECT_THAT(*CompletionScript("zsh", commands),
              HasSubstr("'*--f=[a file]:FILE:_files' '*--n=[a number]:N' '*--s[a switch]' '1:shell:(bash zsh fish)'"));
}

TEST(CompletionTest, QuotesInATextDoNotEndIt) {
  const std::vector<Command> commands = {{{"x", "", "It's [a]: test", 0, {{"o", "", "don't"}}}, nullptr}};
  EXPECT_THAT(*CompletionScript("fish", commands), HasSubstr("-d 'It'\\''s [a]: test'"));
  EXPECT_THAT(*CompletionScript("zsh", commands), HasSubstr("'x:It'\\''s \\[a\\]\\: test'"));
}

TEST(ManPageTest, HasEveryCommandAndOption) {
  const std::string page = ManPage(Commands());
  for (const Command& command : Commands()) {
    EXPECT_THAT(page, HasSubstr("\n.SS " + command.spec.name));
    for (const OptionSpec& option : command.spec.options) {
      std::string name = option.name;
      for (size_t at = 0; (at = name.find('-', at)) != std::string::npos; at += 2) name.insert(at, "\\");
      EXPECT_THAT(page, HasSubstr("\n.BR \\-\\-" + name));
    }
  }
  EXPECT_THAT(page, HasSubstr("24 UNAVAILABLE"));
}

TEST(ManPageTest, TextIsNoMarkup) {
  const std::vector<Command> commands = {{{"x", "", ".so /etc/passwd", 0, {{"o", "", "'a \\n \\xNN"}}}, nullptr}};
  const std::string page = ManPage(commands);
  EXPECT_THAT(page, Not(HasSubstr("\n.so")));
  EXPECT_THAT(page, HasSubstr("\n\\&'a \\en \\exNN\n"));
}

}  // namespace
}  // namespace minitron::client
