#include "clients/cpp/commands.h"

#include <cstdio>

#include "clients/cpp/format.h"
#include "clients/cpp/generate_request.h"
#include "clients/cpp/security.h"

namespace minitron::client {
namespace {

const std::vector<OptionSpec> kTokenizeOptions = {
    {"model", "NAME", "the model; default: the served one"},
    {"add-bos", "", "put the BOS token in front"},
    {"no-bos", "", "do not, whatever the model's default"},
    {"parse-special", "", "turn spellings such as </s> into those tokens"},
};

std::vector<OptionSpec> Join(std::vector<OptionSpec> options, const std::vector<OptionSpec>& more) {
  options.insert(options.end(), more.begin(), more.end());
  return options;
}

// What of `generate` makes sense for one answer after the other.
std::vector<OptionSpec> ChatOptions() {
  std::vector<OptionSpec> options;
  for (const OptionSpec& option : GenerateOptions()) {
    for (const char* const name : {"model", "max-tokens", "temperature", "top-k", "top-p", "min-p", "seed", "stop",
                                   "repetition-penalty", "presence-penalty", "frequency-penalty"}) {
      if (option.name == name) options.push_back(option);
    }
  }
  return options;
}

std::vector<Command> MakeCommands() {
  std::vector<Command> commands = {
      {{"generate", "[PROMPT]", "Streams a completion to standard output; figures go to standard error.", 1,
        GenerateOptions()},
       RunGenerate},
      {{"chat", "", "A conversation: reads lines, streams answers; /help lists its commands.", 0,
        Join({{"template", "NAME", "none (continue the text) or nemotron-mini; default none"},
              {"system", "TEXT", "what stands in front of the conversation"}},
             ChatOptions())},
       RunChat},
      {{"score", "TEXT", "Log-probability of a text, after a context.", 1,
        Join({{"context", "TEXT", "what stands in front"},
              {"context-ids", "IDS", "the same as token ids"},
              {"target-ids", "IDS", "what is scored as token ids, instead of TEXT"},
              {"logprobs", "N", "N most likely alternatives per token"}},
             kTokenizeOptions)},
       RunScore},
      {{"tokenize", "TEXT", "Text to token ids.", 1,
        Join({{"pieces", "", "one token per line, with its bytes"}}, kTokenizeOptions)},
       RunTokenize},
      {{"detokenize",
        "IDS...",
        "Token ids to text.",
        1u << 16,
        {{"model", "NAME", "the model; default: the served one"},
         {"keep-special", "", "leave special tokens in the text"}}},
       RunDetokenize},
      {{"models", "[NAME]", "The served models, or one of them.", 1, {}}, RunModels},
      {{"health", "[SERVICE]", "Whether requests are taken: exit code 0 when SERVING, 3 when not.", 1, {}}, RunHealth},
      {{"load", "", "Current load.", 0, {}}, RunLoad},
      {{"info", "", "Version, limits and settings of the server.", 0, {}}, RunInfo},
      {{"cancel", "REQUEST_ID...", "Ends live requests by name.", 1024, {}}, RunCancel},
      {{"drain", "", "Makes the server refuse new requests, finish the running ones and exit.", 0, {}}, RunDrain},
      {{"completion", "SHELL", "Prints completions for bash, zsh or fish.", 1, {}}, RunCompletion},
      {{"man", "", "Prints the manual page: minitron man > minitron.1", 0, {}}, RunMan},
  };
  const std::vector<OptionSpec> common = {
      {"server", "HOST:PORT", "the server; default $MINITRON_SERVER or localhost:50051"},
      {"timeout", "SECONDS", "give up after this long; default: never"},
      {"metadata", "KEY=VALUE", "send this with the call (repeatable)"},
      {"json", "", "one JSON object per line"},
      {"help", "", "this text"},
  };
  for (Command& command : commands) {
    command.spec.options = Join(Join(command.spec.options, common), SecurityOptions());
  }
  return commands;
}

}  // namespace

const std::vector<Command>& Commands() {
  static const std::vector<Command> kCommands = MakeCommands();
  return kCommands;
}

int Fail(const Session& session, const Error& error) {
  if (session.cancellation->cancelled()) {
    std::fprintf(stderr, "minitron: interrupted\n");
    return kExitInterrupted;
  }
  std::fprintf(stderr, "minitron: %s\n", FormatError(error, session.target).c_str());
  return ExitCode(error);
}

int FailUsage(const Session&, const UsageError& error) {
  std::fprintf(stderr, "minitron: %s\n", error.message.c_str());
  return kExitUsage;
}

bool Print(const std::string& text) {
  return std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
}

}  // namespace minitron::client
