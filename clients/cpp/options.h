// Command-line options of one subcommand: a table, its parser and its help. Pure functions.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace minitron::client {

struct OptionSpec {
  std::string name;   // without dashes
  std::string value;  // what the value is called in --help; empty: the option takes none
  std::string help;
};

struct CommandSpec {
  std::string name;
  std::string arguments;  // positional arguments in --help
  std::string summary;
  size_t max_positionals = 0;
  std::vector<OptionSpec> options;
};

// A wrong command line: exit code 2.
struct UsageError {
  std::string message;
};

// The options of one command line.
class Arguments {
 public:
  // `args`: what follows the subcommand. "--name value", "--name=value"; "--" ends the options; "-" is a positional.
  static std::optional<UsageError> Parse(const CommandSpec& spec, const std::vector<std::string>& args, Arguments* out);

  bool Has(const std::string& name) const { return values_.count(name) != 0; }
  // The last value given, or `fallback`.
  std::string Get(const std::string& name, const std::string& fallback = "") const;
  // All values given, in order.
  std::vector<std::string> All(const std::string& name) const;
  const std::vector<std::string>& positionals() const { return positionals_; }

 private:
  std::map<std::string, std::vector<std::string>> values_;
  std::vector<std::string> positionals_;
};

// Whole-string numbers; false leaves *value alone.
bool ParseUint(const std::string& text, uint64_t max, uint64_t* value);
bool ParseInt(const std::string& text, int64_t min, int64_t max, int64_t* value);
bool ParseFloat(const std::string& text, float* value);

// "1,2,3" or "1 2 3"; false at the first item that is no 32-bit token id.
bool ParseIds(const std::string& text, std::vector<uint32_t>* ids);

// Replaces \n, \t, \r, \\ and \xNN; any other backslash stays.
std::string Unescape(const std::string& text);

// Whether a protobuf string can hold `text`.
bool IsUtf8(const std::string& text);

// The candidate nearest to `word` by edit distance, if it is near enough to be meant.
std::optional<std::string> DidYouMean(const std::string& word, const std::vector<std::string>& candidates);

// `program`: what stands in front of the command's name, or alone when that is empty.
std::string Help(const CommandSpec& spec, const std::string& program = "minitron");

// All of --metadata KEY=VALUE, keys in lower case.
std::optional<UsageError> ReadMetadata(const Arguments& arguments,
                                       std::vector<std::pair<std::string, std::string>>* metadata);

}  // namespace minitron::client
