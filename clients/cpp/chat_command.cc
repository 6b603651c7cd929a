// minitron chat.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "clients/cpp/chat.h"
#include "clients/cpp/commands.h"
#include "clients/cpp/format.h"
#include "clients/cpp/generate_request.h"
#include "clients/cpp/line_reader.h"

namespace minitron::client {
namespace {

constexpr char kChatHelp[] =
    "/undo forgets the last turn, /reset all of them, /save FILE writes what was said, /quit or Ctrl-D ends, Ctrl-C\n"
    "stops an answer. A line that starts with // is sent with one slash.\n";
constexpr char kSave[] = "/save ";

// One conversation with the user; `Read` returns at its end.
class Chat {
 public:
  Chat(const Session& session, Conversation conversation, const v1::GenerationTask& task)
      : session_(session), conversation_(std::move(conversation)), task_(task), terminal_(isatty(STDOUT_FILENO) != 0) {}

  int Read() {
    // A script that pipes its lines in sees answers only.
    const bool prompts = isatty(STDIN_FILENO) != 0;
    if (prompts) std::fputs(kChatHelp, stderr);
    LineReader reader(prompts);
    std::string line;
    while (reader.Read(&line)) {
      if (line == "/quit" || line == "/exit") break;
      if (line.empty() || RunsCommand(line)) continue;
      if (line.rfind("//", 0) == 0) line.erase(0, 1);
      if (!Answer(line)) return kExitOutput;
    }
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
    } else if (line.rfind(kSave, 0) == 0) {
      Save(line.substr(sizeof(kSave) - 1));
    } else if (line == "/help") {
      std::fputs(kChatHelp, stderr);
    } else {
      std::fprintf(stderr, "minitron: no command %s; /help lists them\n", ForTerminal(line).c_str());
    }
    return true;
  }

  // Never over another file.
  void Save(const std::string& path) const {
    std::FILE* const file = std::fopen(path.c_str(), "wx");
    const std::string text = conversation_.Transcript();
    bool ok = file != nullptr && std::fwrite(text.data(), 1, text.size(), file) == text.size();
    if (file != nullptr) ok = std::fclose(file) == 0 && ok;
    const std::string shown = ForTerminal(path);
    if (ok) {
      std::fprintf(stderr, "minitron: wrote %zu turn%s to %s\n", conversation_.num_turns(),
                   conversation_.num_turns() == 1 ? "" : "s", shown.c_str());
    } else {
      std::fprintf(stderr, "minitron: cannot write %s: %s\n", shown.c_str(), std::strerror(errno));
    }
  }

  // How many tokens a prompt may have, so that an answer has room behind it; 0 when the server does not say.
  int64_t PromptTokens() {
    if (model_.max_context_tokens() == 0 && session_.client->GetModel(task_.model(), &model_)) return 0;
    const int64_t context = model_.max_context_tokens();
    // An answer without a limit of its own takes what is left of the context.
    const int64_t answer = task_.stopping().has_max_tokens()
                               ? task_.stopping().max_tokens()
                               : std::min<int64_t>(model_.default_max_tokens(), context / 2);
    return context - answer;
  }

  void ForgetWhatDoesNotFit(const std::string& line) {
    const int64_t max_tokens = conversation_.num_turns() == 0 ? 0 : PromptTokens();
    if (max_tokens <= 0) return;
    const size_t gone = conversation_.Fit(line, max_tokens, [&](const std::string& prompt) -> std::optional<int64_t> {
      v1::TokenizeRequest request;
      request.set_model(task_.model());
      request.set_text(prompt);
      *request.mutable_options() = task_.tokenize_options();
      v1::TokenizeResponse response;
      // What fails here fails again in the answer's call, which says it.
      if (session_.client->Tokenize(request, &response).has_value()) return std::nullopt;
      return response.token_ids_size();
    });
    if (gone == 0) return;
    std::fprintf(stderr, "minitron: the oldest %zu turn%s no longer fit%s into the context of %u tokens\n", gone,
                 gone == 1 ? "" : "s", gone == 1 ? "s" : "", model_.max_context_tokens());
  }

  // Streams the answer. A failed call is said and leaves the conversation as it was. False when the output is closed.
  bool Answer(const std::string& line) {
    ForgetWhatDoesNotFit(line);
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
  v1::Model model_;  // empty until it is asked for
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
