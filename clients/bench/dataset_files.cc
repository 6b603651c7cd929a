// Prompts from files.
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "clients/bench/dataset.h"
#include "clients/bench/token_source.h"
#include "clients/cpp/options.h"

namespace minitron::bench {
namespace {

using Json = nlohmann::json;
using Code = DatasetError::Code;

constexpr uintmax_t kMaxFileBytes = uintmax_t{4} << 30;
constexpr size_t kMaxRecordBytes = 64u << 20;
constexpr uint64_t kMaxTokens = 1u << 20;
constexpr double kMaxTimestampMs = 1e10;  // about four months

std::optional<DatasetError> Open(const std::string& path, std::ifstream* file) {
  std::error_code none;
  // A folder would open, and then have a size that means nothing.
  if (std::filesystem::is_regular_file(path, none)) file->open(path, std::ios::binary);
  if (!file->is_open()) return DatasetError{Code::kCannotRead, absl::StrCat("cannot read ", path)};
  if (std::filesystem::file_size(path, none) > kMaxFileBytes) {
    return DatasetError{Code::kTooLarge, absl::StrCat(path, ": larger than 4 GiB")};
  }
  return std::nullopt;
}

// Reads a whole number of one record into *value, which is left alone when the field is not there.
std::optional<DatasetError> ReadNumber(const std::string& place, const Json& record, const char* key, uint64_t low,
                                       uint64_t high, bool required, uint32_t* value) {
  const auto found = record.find(key);
  if (found == record.end()) {
    if (!required) return std::nullopt;
    return DatasetError{Code::kMissingField, absl::StrCat(place, ": ", key, ": missing")};
  }
  if (!found->is_number_unsigned() || found->get<uint64_t>() < low || found->get<uint64_t>() > high) {
    return DatasetError{Code::kOutOfRange,
                        absl::StrCat(place, ": ", key, ": not a whole number in [", low, ", ", high, "]")};
  }
  *value = static_cast<uint32_t>(found->get<uint64_t>());
  return std::nullopt;
}

std::optional<DatasetError> ReadTimestamp(const std::string& place, const Json& record, bool required, double* s) {
  const auto found = record.find("timestamp");
  if (found == record.end() && !required) return std::nullopt;
  if (found == record.end()) return DatasetError{Code::kMissingField, absl::StrCat(place, ": timestamp: missing")};
  if (!found->is_number() || !(found->get<double>() >= 0 && found->get<double>() <= kMaxTimestampMs)) {
    return DatasetError{Code::kOutOfRange, absl::StrCat(place, ": timestamp: not in [0, 1e10] ms")};
  }
  *s = found->get<double>() / 1e3;
  return std::nullopt;
}

std::optional<DatasetError> ReadIds(const std::string& place, const std::string& key, const Json& list, uint64_t max,
                                    std::vector<uint64_t>* ids) {
  for (const Json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > max) {
      return DatasetError{Code::kOutOfRange, absl::StrCat(place, ": ", key, ": an item is not in [0, ", max, "]")};
    }
    ids->push_back(id.get<uint64_t>());
  }
  return std::nullopt;
}

using LineReader = std::function<std::optional<DatasetError>(const std::string& place, const Json& record,
                                                             Prompt* prompt, bool* skip)>;

// Calls `read` per line until there are enough prompts, then counts times from the first one.
std::optional<DatasetError> ReadLines(const std::string& path, const DatasetOptions& options, const LineReader& read,
                                      std::vector<Prompt>* prompts) {
  std::ifstream file;
  if (auto error = Open(path, &file)) return error;
  std::string line;
  for (size_t number = 1; prompts->size() < options.count && std::getline(file, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string place = absl::StrCat(path, ":", number);
    if (line.size() > kMaxRecordBytes)
      return DatasetError{Code::kTooLarge, absl::StrCat(place, ": longer than 64 MiB")};
    const Json record = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!record.is_object()) return DatasetError{Code::kBadJson, absl::StrCat(place, ": not a JSON object")};
    Prompt prompt;
    bool skip = false;
    if (auto error = read(place, record, &prompt, &skip)) return error;
    const double before = prompts->empty() ? 0 : prompts->back().arrival_s;
    if (!prompts->empty() && (prompt.arrival_s < 0) != (before < 0)) {
      return DatasetError{Code::kMissingField, absl::StrCat(place, ": timestamp: in some records only")};
    }
    if (prompt.arrival_s < before && prompt.arrival_s >= 0) {
      return DatasetError{Code::kOutOfRange, absl::StrCat(place, ": timestamp: earlier than the line before")};
    }
    if (!skip) prompts->push_back(std::move(prompt));
  }
  if (file.bad()) return DatasetError{Code::kCannotRead, absl::StrCat("cannot read ", path)};
  if (prompts->empty()) return DatasetError{Code::kEmpty, absl::StrCat(path, ": no usable record")};
  const double first = prompts->front().arrival_s;
  for (Prompt& prompt : *prompts) {
    if (first >= 0) prompt.arrival_s -= first;
  }
  return std::nullopt;
}

uint32_t Count(const TokenCounter& count_tokens, const std::string& text) {
  return count_tokens ? count_tokens(text) : static_cast<uint32_t>(text.size() / 4 + 1);
}

}  // namespace

std::optional<DatasetError> ReadJsonLines(const std::string& path, const DatasetOptions& options,
                                          const TokenCounter& count_tokens, std::vector<Prompt>* prompts) {
  const auto read = [&](const std::string& place, const Json& record, Prompt* prompt,
                        bool* skip) -> std::optional<DatasetError> {
    const auto found = record.find("prompt");
    if (found == record.end()) return DatasetError{Code::kMissingField, absl::StrCat(place, ": prompt: missing")};
    if (found->is_string() && !found->get_ref<const std::string&>().empty()) {
      prompt->text = found->get<std::string>();
      if (!client::IsUtf8(prompt->text)) {
        return DatasetError{Code::kOutOfRange, absl::StrCat(place, ": prompt: not valid UTF-8")};
      }
      prompt->input_tokens = Count(count_tokens, prompt->text);
      *skip = options.max_input_tokens > 0 && prompt->input_tokens > options.max_input_tokens;
    } else if (found->is_array() && !found->empty()) {
      std::vector<uint64_t> ids;
      if (auto error = ReadIds(place, "prompt", *found, UINT32_MAX, &ids)) return error;
      if (options.max_input_tokens > 0 && ids.size() > options.max_input_tokens) ids.resize(options.max_input_tokens);
      prompt->ids.assign(ids.begin(), ids.end());
      prompt->input_tokens = static_cast<uint32_t>(ids.size());
    } else {
      return DatasetError{Code::kOutOfRange, absl::StrCat(place, ": prompt: neither a text nor a list of ids")};
    }
    prompt->output_tokens = options.output_tokens;
    uint32_t output = options.output_tokens;
    if (auto error = ReadNumber(place, record, "output_tokens", 1, kMaxTokens, false, &output)) return error;
    if (!options.fixed_output) prompt->output_tokens = output;
    return ReadTimestamp(place, record, false, &prompt->arrival_s);
  };
  return ReadLines(path, options, read, prompts);
}

std::optional<DatasetError> ReadMooncake(const std::string& path, const DatasetOptions& options,
                                         std::vector<Prompt>* prompts) {
  const auto read = [&](const std::string& place, const Json& record, Prompt* prompt,
                        bool*) -> std::optional<DatasetError> {
    uint32_t input = 0;
    uint32_t output = 0;
    if (auto error = ReadTimestamp(place, record, true, &prompt->arrival_s)) return error;
    if (auto error = ReadNumber(place, record, "input_length", 1, kMaxTokens, true, &input)) return error;
    if (auto error = ReadNumber(place, record, "output_length", 1, kMaxTokens, true, &output)) return error;
    const auto found = record.find("hash_ids");
    if (found == record.end() || !found->is_array()) {
      return DatasetError{Code::kMissingField, absl::StrCat(place, ": hash_ids: no list")};
    }
    std::vector<uint64_t> blocks;
    if (auto error = ReadIds(place, "hash_ids", *found, UINT64_MAX, &blocks)) return error;
    if (blocks.size() * options.trace_block < input) {
      return DatasetError{Code::kOutOfRange, absl::StrCat(place, ": hash_ids: ", blocks.size(), " blocks of ",
                                                          options.trace_block, " do not hold input_length ", input)};
    }
    if (options.max_input_tokens > 0) input = std::min(input, options.max_input_tokens);
    for (const uint64_t block : blocks) {
      const uint32_t missing = input - prompt->input_tokens;
      if (missing == 0) break;
      TokenSource(options.seed ^ (block * 0x9E3779B97F4A7C15u + 1), options.vocab_size)
          .Append(std::min(missing, options.trace_block), prompt);
    }
    prompt->output_tokens = options.fixed_output ? options.output_tokens : output;
    return std::nullopt;
  };
  return ReadLines(path, options, read, prompts);
}

std::optional<DatasetError> ReadShareGpt(const std::string& path, const DatasetOptions& options,
                                         const TokenCounter& count_tokens, std::vector<Prompt>* prompts) {
  std::ifstream file;
  if (auto error = Open(path, &file)) return error;
  const Json list = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!list.is_array()) return DatasetError{Code::kBadJson, absl::StrCat(path, ": not a JSON list")};
  for (size_t i = 0; i < list.size() && prompts->size() < options.count; ++i) {
    const std::string place = absl::StrCat(path, "[", i, "]");
    if (!list[i].is_object() || !list[i].contains("conversations") || !list[i]["conversations"].is_array()) {
      return DatasetError{Code::kMissingField, absl::StrCat(place, ": conversations: no list")};
    }
    const Json& turns = list[i]["conversations"];
    if (turns.size() < 2) continue;
    for (size_t turn = 0; turn < 2; ++turn) {
      if (!turns[turn].is_object() || !turns[turn].contains("value") || !turns[turn]["value"].is_string()) {
        return DatasetError{Code::kMissingField, absl::StrCat(place, ": conversations[", turn, "].value: no text")};
      }
    }
    Prompt prompt;
    prompt.text = turns[0]["value"].get<std::string>();
    if (prompt.text.empty() || turns[1]["value"].get_ref<const std::string&>().empty()) continue;
    prompt.input_tokens = Count(count_tokens, prompt.text);
    if (options.max_input_tokens > 0 && prompt.input_tokens > options.max_input_tokens) continue;
    prompt.output_tokens =
        options.fixed_output ? options.output_tokens : Count(count_tokens, turns[1]["value"].get<std::string>());
    prompts->push_back(std::move(prompt));
  }
  if (prompts->empty()) return DatasetError{Code::kEmpty, absl::StrCat(path, ": no usable conversation")};
  return std::nullopt;
}

}  // namespace minitron::bench
