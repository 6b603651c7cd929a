// minitron chat.
#include <unistd.h>

#include <cstdio>
#include <iostream>

#include "absl/strings/str_cat.h"
#include "clients/cpp/chat.h"
#include "clients/cpp/commands.h"
#include "clients/cpp/format.h"
#include "clients/cpp/generate_request.h"

namespace minitron::client {
namespace {

constexpr char kChatHelp[] =
    "/undo forgets the last turn, /reset all of them, /quit or Ctrl-D ends, Ctrl-C stops an answer. A line that starts "
    "with // is sent with one slash.\n";

// One conversation with the user; `Read` returns at its end.
class Chat {
 public:
  Chat(const Session& session, Conversation conversation, const v1::GenerationTask& task)
      : session_(session), conversation_(std::move(conversation)), task_(task), terminal_(isatty(STDOUT_FILENO) != 0) {}

  int Read() {
    // A script that pipes its lines in sees answers only.
    const bool prompts = isatty(STDIN_FILENO) != 0;
    if (prompts) std::fputs(kChatHelp, stderr);
    std::string line;
    while (true) {
      if (prompts) std::fputs("> ", stderr);
      if (!std::getline(std::cin, line)) break;
      if (line == "/quit" || line == "/exit") break;
      if (line.empty() || RunsCommand(line)) continue;
      if (line.rfind("//", 0) == 0) line.erase(0, 1);
      if (!Answer(line)) return kExitOutput;
    }
    if (prompts) std::fputs("\n", stderr);
    return exit_code_;
  }

 private:
  // Whether the line was for this program.
  bool RunsCommand(const std::string& line) {
    if (line[0] != '/' || line.rfind("//", 0) == 0) return false;
    if (line == "/reset") {
      conversation_.Reset();
    } else if (line == "/undo") {
      if (!conversation_.Undo()) std::fputs("minitron: nothing to forget\n", stderr);
    } else if (line == "/help") {
      std::fputs(kChatHelp, stderr);
    } else {
      std::fprintf(stderr, "minitron: no command %s; /help lists them\n", ForTerminal(line).c_str());
    }
    return true;
  }

  // Streams the answer. A failed call is said and leaves the conversation as it was. False when the output is closed.
  bool Answer(const std::string& line) {
    v1::GenerateStreamRequest request;
    *request.mutable_task() = task_;
    if (const auto error = conversation_.Prompt(line, request.mutable_task()->mutable_text())) {
      exit_code_ = FailUsage(session_, *error);
      return true;
    }
    std::string answer;
    bool printed = true;
    session_.cancellation->Reset();  // of a Ctrl-C while there was nothing to stop
    const Outcome error = session_.client->GenerateStream(
        request,
        [&](const v1::GenerateStreamResponse& event) {
          answer += event.delta().text();
          printed = printed && Print(terminal_ ? ForTerminal(event.delta().text()) : event.delta().text());
          return printed;
        },
        session_.cancellation);
    if (!printed || (!answer.empty() && !Print("\n"))) return false;
    if (!error.has_value()) {
      conversation_.Add(line, answer);
      exit_code_ = kExitOk;
    } else if (session_.cancellation->cancelled()) {
      std::fputs("minitron: stopped\n", stderr);
      conversation_.Add(line, answer);
      session_.cancellation->Reset();
    } else {
      exit_code_ = Fail(session_, *error);
    }
    return true;
  }

  const Session& session_;
  Conversation conversation_;
  const v1::GenerationTask& task_;
  const bool terminal_;
  int exit_code_ = kExitOk;  // of the last answer
};

}  // namespace

int RunChat(const Session& session) {
  const std::string name = session.arguments.Get("template", "none");
  const auto chat_template = ParseChatTemplate(name);
  if (!chat_template.has_value())
    return FailUsage(session, {"--template \"" + name + "\" is none of none, nemotron-mini"});
  v1::GenerationTask task;
  if (const auto error = BuildTask(session.arguments, std::string(), &task)) return FailUsage(session, *error);
  task.mutable_output()->set_token_ids(false);
  if (*chat_template == ChatTemplate::kNemotronMini) task.mutable_tokenize_options()->set_parse_special(true);
  return Chat(session, Conversation(*chat_template, session.arguments.Get("system")), task).Read();
}

}  // namespace minitron::client
