// Shell completions and the man page, made from the table of commands. Pure functions.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "clients/cpp/commands.h"

namespace minitron::client {

// For "bash", "zsh" or "fish"; nothing for another shell.
std::optional<std::string> CompletionScript(const std::string& shell, const std::vector<Command>& commands);

// minitron(1) in roff.
std::string ManPage(const std::vector<Command>& commands);

}  // namespace minitron::client
