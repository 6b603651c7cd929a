// From parsed options to the requests of the generation service. Pure functions but for reading the prompt.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "clients/cpp/options.h"
#include "minitron/v1/generation.pb.h"

namespace minitron::client {

// Options of `generate` (without the common ones).
std::vector<OptionSpec> GenerateOptions();

// The prompt comes from exactly one of --prompt, --prompt-file, --prompt-ids and the positional argument; `text` is
// what ReadPrompt returned. Ranges are left to the server, which names the limit.
std::optional<UsageError> BuildTask(const Arguments& arguments, const std::optional<std::string>& text,
                                    v1::GenerationTask* task);

// The text named by --prompt, --prompt-file ("-": standard input) or the positional argument ("-" too); unset with
// --prompt-ids.
std::optional<UsageError> ReadPrompt(const Arguments& arguments, std::optional<std::string>* text);

// A whole file, or standard input for "-".
std::optional<UsageError> ReadFile(const std::string& path, std::string* text);

// --add-bos, --no-bos and --parse-special, where given.
void SetTokenizeOptions(const Arguments& arguments, v1::TokenizeOptions* options);

}  // namespace minitron::client
