// The subcommands of `minitron`. Each gets its parsed options and a client, prints, and returns the exit code.
#pragma once

#include <string>
#include <vector>

#include "clients/cpp/client.h"
#include "clients/cpp/options.h"

namespace minitron::client {

inline constexpr int kExitOk = 0;
inline constexpr int kExitOutput = 1;      // the output or an input could not be written or read
inline constexpr int kExitUsage = 2;       // wrong command line
inline constexpr int kExitNotServing = 3;  // only of `health`
inline constexpr int kExitInterrupted = 130;

// For --help and the man page.
inline constexpr char kExitCodesText[] =
    "Exit codes: 0 success; 1 output or input failed; 2 wrong command line; 3 `health`: not serving; 130 interrupted;\n"
    "10 + gRPC status code for an error of the call: 11 CANCELLED, 13 INVALID_ARGUMENT, 14 DEADLINE_EXCEEDED,\n"
    "15 NOT_FOUND, 16 ALREADY_EXISTS, 17 PERMISSION_DENIED, 18 RESOURCE_EXHAUSTED, 22 UNIMPLEMENTED, 23 INTERNAL,\n"
    "24 UNAVAILABLE, 26 UNAUTHENTICATED.\n";

// What a command works with.
struct Session {
  Client* client;              // owned by main
  Cancellation* cancellation;  // owned by main; Ctrl-C sets it
  std::string target;
  Arguments arguments;
  bool json;
};

struct Command {
  CommandSpec spec;
  int (*run)(const Session& session);
};

// All subcommands, in the order of --help; options include the common ones (--server, --timeout, ...).
const std::vector<Command>& Commands();

// Prints the error on stderr and returns its exit code; kExitInterrupted after Ctrl-C.
int Fail(const Session& session, const Error& error);
int FailUsage(const Session& session, const UsageError& error);
// Writes and flushes standard output; false when it is closed.
bool Print(const std::string& text);

int RunGenerate(const Session& session);
int RunScore(const Session& session);
int RunTokenize(const Session& session);
int RunDetokenize(const Session& session);
int RunModels(const Session& session);
int RunHealth(const Session& session);
int RunLoad(const Session& session);
int RunInfo(const Session& session);
int RunCancel(const Session& session);
int RunDrain(const Session& session);
int RunChat(const Session& session);
int RunCompletion(const Session& session);
int RunMan(const Session& session);

}  // namespace minitron::client
