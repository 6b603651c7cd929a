// minitron: the command-line client. Start-up order: options, signals, client, command.
#include <pthread.h>
#include <termios.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "clients/cpp/commands.h"
#include "clients/cpp/security.h"

namespace minitron::client {
namespace {

const char kOverview[] =
    "usage: minitron COMMAND [options]\n\nCommand line client of minitron-server. `minitron COMMAND --help` shows a "
    "command's options.\n\n";
std::string Overview() {
  std::string text = kOverview;
  for (const Command& command : Commands()) {
    std::string name = "  " + command.spec.name;
    name.resize(14, ' ');
    text += name + command.spec.summary + "\n";
  }
  return text + "\n" + kExitCodesText;
}

// Turns Ctrl-C into a cancellation, and the second one into an exit at once. A thread waits for the signal, because
// cancelling a call is not allowed inside a signal handler.
class InterruptThread {
 public:
  // Blocks the signals in the calling thread and in all it starts later: make it before the first gRPC object.
  explicit InterruptThread(Cancellation* cancellation) {
    has_terminal_ = tcgetattr(STDIN_FILENO, &terminal_) == 0;
    sigemptyset(&signals_);
    sigaddset(&signals_, SIGINT);
    sigaddset(&signals_, SIGTERM);
    sigaddset(&signals_, SIGUSR1);  // from the destructor
    pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
    thread_ = std::thread([this, cancellation] {
      int signal = 0;
      while (sigwait(&signals_, &signal) == 0 && signal != SIGUSR1) {
        if (cancellation->cancelled()) {
          if (has_terminal_) tcsetattr(STDIN_FILENO, TCSANOW, &terminal_);  // a line may be under the editor
          _exit(kExitInterrupted);
        }
        cancellation->Cancel();
      }
    });
  }

  ~InterruptThread() {
    pthread_kill(thread_.native_handle(), SIGUSR1);
    thread_.join();
  }

 private:
  termios terminal_{};
  bool has_terminal_ = false;
  sigset_t signals_;
  std::thread thread_;
};

std::optional<UsageError> MakeClientOptions(const Arguments& arguments, ClientOptions* options) {
  const char* const environment = std::getenv("MINITRON_SERVER");
  if (environment != nullptr && *environment != '\0') options->target = environment;
  options->target = arguments.Get("server", options->target);
  if (options->target.empty()) return UsageError{"--server \"\" is no address; HOST:PORT is needed"};
  for (const char* scheme : {"http://", "https://", "grpc://"}) {
    if (options->target.compare(0, std::strlen(scheme), scheme) == 0) {
      return UsageError{"--server \"" + options->target + "\": HOST:PORT is needed, without " + scheme};
    }
  }
  if (arguments.Has("timeout")) {
    float seconds = 0;
    if (!ParseFloat(arguments.Get("timeout"), &seconds) || !(seconds > 0) || seconds > 1e6f) {
      return UsageError{"--timeout \"" + arguments.Get("timeout") + "\" is not a number of seconds in (0, 1000000]"};
    }
    options->timeout = std::chrono::milliseconds(static_cast<int64_t>(seconds * 1e3f) + 1);
  }
  if (auto error = ReadMetadata(arguments, &options->metadata)) return error;
  return ReadSecurity(arguments, std::getenv("MINITRON_TLS_CA"), std::getenv("MINITRON_TOKEN_FILE"), &options->tls,
                      &options->metadata);
}

int Run(std::vector<std::string> args) {
  if (args.size() == 2 && args[0] == "help") args = {args[1], "--help"};
  if (args.empty() || args[0] == "--help" || args[0] == "-h" || args[0] == "help") {
    std::fputs(Overview().c_str(), args.empty() ? stderr : stdout);
    return args.empty() ? kExitUsage : kExitOk;
  }
  if (args[0] == "--version") return Print("minitron " MINITRON_VERSION "\n") ? kExitOk : kExitOutput;
  const Command* command = nullptr;
  std::vector<std::string> names;
  for (const Command& candidate : Commands()) {
    names.push_back(candidate.spec.name);
    if (candidate.spec.name == args[0]) command = &candidate;
  }
  if (command == nullptr) {
    const auto near = DidYouMean(args[0], names);
    std::fprintf(stderr, "minitron: no command \"%s\"%s; see minitron --help\n", args[0].c_str(),
                 near.has_value() ? ("; did you mean " + *near + "?").c_str() : "");
    return kExitUsage;
  }
  Cancellation cancellation;
  Session session{nullptr, &cancellation, "", {}, false};
  if (const auto error = Arguments::Parse(command->spec, {args.begin() + 1, args.end()}, &session.arguments)) {
    return FailUsage(session, *error);
  }
  if (session.arguments.Has("help")) {
    return Print(Help(command->spec) + "\n" + kExitCodesText) ? kExitOk : kExitOutput;
  }
  ClientOptions options;
  if (const auto error = MakeClientOptions(session.arguments, &options)) return FailUsage(session, *error);
  session.target = options.target;
  session.json = session.arguments.Has("json");

  const InterruptThread interrupt(&cancellation);
  Client client(options);
  session.client = &client;
  return command->run(session);
}

}  // namespace
}  // namespace minitron::client

int main(int argc, char** argv) {
  setenv("GRPC_VERBOSITY", "NONE", 0);  // an error is told once, by us; set it to see gRPC's own lines
  std::signal(SIGPIPE, SIG_IGN);        // a closed pipe is a failed write, and exit code 1
  return minitron::client::Run({argv + 1, argv + argc});
}
