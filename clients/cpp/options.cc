#include "clients/cpp/options.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include "absl/strings/numbers.h"

namespace minitron::client {
namespace {

const OptionSpec* Find(const CommandSpec& spec, const std::string& name) {
  for (const OptionSpec& option : spec.options) {
    if (option.name == name) return &option;
  }
  return nullptr;
}

// A program without subcommands needs no name in its errors.
std::string Of(const CommandSpec& spec) { return spec.name.empty() ? "" : " of " + spec.name; }

UsageError UnknownOption(const CommandSpec& spec, const std::string& name) {
  std::vector<std::string> names = {"help"};
  for (const OptionSpec& option : spec.options) names.push_back(option.name);
  UsageError error{"unknown option --" + name + Of(spec)};
  if (const auto near = DidYouMean(name, names)) error.message += "; did you mean --" + *near + "?";
  return error;
}

size_t EditDistance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

}  // namespace

std::optional<UsageError> Arguments::Parse(const CommandSpec& spec, const std::vector<std::string>& args,
                                           Arguments* out) {
  bool options_ended = false;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    if (options_ended || arg.size() < 2 || arg[0] != '-') {
      if (out->positionals_.size() == spec.max_positionals) {
        return UsageError{"unexpected argument \"" + arg + "\"" + Of(spec)};
      }
      out->positionals_.push_back(arg);
      continue;
    }
    if (arg == "--") {
      options_ended = true;
      continue;
    }
    if (arg == "-h" || arg == "--help") {
      out->values_["help"].push_back("");
      continue;
    }
    if (arg[1] != '-') return UsageError{"unknown option " + arg + Of(spec) + "; options start with --"};
    const size_t equals = arg.find('=');
    const std::string name = arg.substr(2, equals == std::string::npos ? equals : equals - 2);
    const OptionSpec* option = Find(spec, name);
    if (option == nullptr) return UnknownOption(spec, name);
    std::string value;
    if (option->value.empty()) {
      if (equals != std::string::npos) return UsageError{"--" + name + " takes no value"};
    } else if (equals != std::string::npos) {
      value = arg.substr(equals + 1);
    } else if (i + 1 < args.size()) {
      value = args[++i];
    } else {
      return UsageError{"--" + name + " needs a value: " + option->value};
    }
    out->values_[name].push_back(value);
  }
  return std::nullopt;
}

std::string Arguments::Get(const std::string& name, const std::string& fallback) const {
  const auto found = values_.find(name);
  return found == values_.end() ? fallback : found->second.back();
}

std::vector<std::string> Arguments::All(const std::string& name) const {
  const auto found = values_.find(name);
  return found == values_.end() ? std::vector<std::string>() : found->second;
}

bool ParseUint(const std::string& text, uint64_t max, uint64_t* value) {
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (text.empty() || error != std::errc() || end != text.data() + text.size() || number > max) return false;
  *value = number;
  return true;
}

bool ParseInt(const std::string& text, int64_t min, int64_t max, int64_t* value) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (text.empty() || error != std::errc() || end != text.data() + text.size() || number < min || number > max) {
    return false;
  }
  *value = number;
  return true;
}

bool ParseFloat(const std::string& text, float* value) { return absl::SimpleAtof(text, value); }

bool ParseIds(const std::string& text, std::vector<uint32_t>* ids) {
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find_first_of(", \t\r\n", begin), text.size());
    uint64_t id = 0;
    if (end > begin) {
      if (!ParseUint(text.substr(begin, end - begin), std::numeric_limits<uint32_t>::max(), &id)) return false;
      ids->push_back(static_cast<uint32_t>(id));
    }
    begin = end + 1;
  }
  return true;
}

std::string Unescape(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const char next = text[i] == '\\' && i + 1 < text.size() ? text[i + 1] : '\0';
    unsigned byte = 0;
    if (next == 'n' || next == 't' || next == 'r' || next == '\\') {
      out.push_back(next == 'n' ? '\n' : next == 't' ? '\t' : next == 'r' ? '\r' : '\\');
      i += 1;
    } else if (next == 'x' && i + 3 < text.size() &&
               std::from_chars(&text[i + 2], &text[i] + 4, byte, 16).ptr == &text[i] + 4) {
      out.push_back(static_cast<char>(byte));
      i += 3;
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

bool IsUtf8(const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const size_t length = lead < 0x80 ? 1 : lead >= 0xC2 && lead < 0xE0 ? 2 : lead >= 0xE0 && lead < 0xF0 ? 3 : 4;
    if ((lead >= 0x80 && lead < 0xC2) || lead > 0xF4 || i + length > text.size()) return false;
    uint32_t point = length == 1 ? lead : lead & (0x7Fu >> length);
    for (size_t k = 1; k < length; ++k) {
      const auto byte = static_cast<unsigned char>(text[i + k]);
      if ((byte & 0xC0) != 0x80) return false;
      point = point << 6 | (byte & 0x3F);
    }
    // Neither longer than needed, nor a surrogate, nor past the last code point.
    if ((length == 3 && (point < 0x800 || (point >= 0xD800 && point < 0xE000))) ||
        (length == 4 && (point < 0x10000 || point > 0x10FFFF))) {
      return false;
    }
    i += length;
  }
  return true;
}

std::optional<std::string> DidYouMean(const std::string& word, const std::vector<std::string>& candidates) {
  std::optional<std::string> nearest;
  size_t limit = std::max<size_t>(2, word.size() / 3) + 1;
  for (const std::string& candidate : candidates) {
    const size_t distance = EditDistance(word, candidate);
    // An abbreviation counts as near, whatever is missing.
    const size_t effective = word.size() >= 3 && candidate.rfind(word, 0) == 0 ? 1 : distance;
    if (effective >= limit) continue;
    limit = effective;
    nearest = candidate;
  }
  return nearest;
}

std::optional<UsageError> ReadMetadata(const Arguments& arguments,
                                       std::vector<std::pair<std::string, std::string>>* metadata) {
  for (const std::string& entry : arguments.All("metadata")) {
    const size_t equals = entry.find('=');
    if (equals == std::string::npos || equals == 0) return UsageError{"--metadata \"" + entry + "\" is not KEY=VALUE"};
    std::string key = entry.substr(0, equals);
    for (char& c : key) {
      // gRPC aborts on keys it cannot send.
      if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
      if (!((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.')) {
        return UsageError{"--metadata key \"" + key + "\" has a character outside a-z 0-9 - _ ."};
      }
    }
    const std::string value = entry.substr(equals + 1);
    const bool binary = key.size() > 4 && key.compare(key.size() - 4, 4, "-bin") == 0;
    for (const char c : value) {
      if (!binary && (c < 32 || c > 126)) {
        return UsageError{"--metadata " + key + ": its value has a character that is not printable ASCII"};
      }
    }
    metadata->emplace_back(key, value);
  }
  return std::nullopt;
}

std::string Help(const CommandSpec& spec, const std::string& program) {
  std::string text = "usage: " + program + (spec.name.empty() ? "" : " " + spec.name) + " [options]";
  if (!spec.arguments.empty()) text += " " + spec.arguments;
  text += "\n\n" + spec.summary + "\n\n";
  size_t width = 0;
  const auto left = [](const OptionSpec& option) {
    return "  --" + option.name + (option.value.empty() ? "" : " " + option.value);
  };
  for (const OptionSpec& option : spec.options) width = std::max(width, left(option).size());
  for (const OptionSpec& option : spec.options) {
    std::string line = left(option);
    line.resize(width + 2, ' ');
    text += line + option.help + "\n";
  }
  return text;
}

}  // namespace minitron::client
