// Prompts of a run: made from a seed, or read from a file. A file is input: whatever is in it, it is read or refused.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace minitron::bench {

struct Prompt {
  std::string text;  // used when there are no ids
  std::vector<uint32_t> ids;
  uint32_t input_tokens = 0;   // as far as known; 0: not
  uint32_t output_tokens = 0;  // to ask for
  double arrival_s = -1;       // in the trace, from its first request; negative: the dataset has no times
};

struct DatasetError {
  enum class Code { kCannotRead, kTooLarge, kBadJson, kMissingField, kOutOfRange, kEmpty };
  Code code;
  std::string message;  // "trace.jsonl:3: input_length: missing"
};

struct DatasetOptions {
  size_t count = 0;  // prompts wanted; a file with fewer gives fewer
  uint64_t seed = 0;
  uint32_t vocab_size = 0;        // 0: prompts are text, about one word per token
  uint32_t input_tokens = 128;    // made prompts; the part of its own with a shared prefix
  uint32_t output_tokens = 64;    // made prompts, and records that do not say
  double range_ratio = 0;         // lengths are uniform in [(1 - r), (1 + r)] times the wanted one; in [0, 1)
  uint32_t num_prefixes = 1;      // shared prefix: how many different ones
  uint32_t prefix_tokens = 128;   // shared prefix: its length
  uint32_t trace_block = 512;     // Mooncake: tokens per hash id
  uint32_t max_input_tokens = 0;  // longer prompts of a file are cut (ids, Mooncake) or left out (text); 0: no limit
  bool fixed_output = false;      // output_tokens also where a record says something else
};

// Tokens in a text; set when the server can be asked. Unset: a token is taken for four bytes.
using TokenCounter = std::function<uint32_t(const std::string&)>;

std::vector<Prompt> RandomPrompts(const DatasetOptions& options);
// Prompt i starts with prefix i modulo num_prefixes.
std::vector<Prompt> SharedPrefixPrompts(const DatasetOptions& options);

// [{"conversations": [{"value": PROMPT}, {"value": ANSWER}, ...]}, ...]: the answer's length is what is asked for.
// Conversations without two turns are left out.
std::optional<DatasetError> ReadShareGpt(const std::string& path, const DatasetOptions& options,
                                         const TokenCounter& count_tokens, std::vector<Prompt>* prompts);
// One object per line: {"prompt": TEXT or [ID, ...], "output_tokens": N, "timestamp": MS}; the last two may be left
// out.
std::optional<DatasetError> ReadJsonLines(const std::string& path, const DatasetOptions& options,
                                          const TokenCounter& count_tokens, std::vector<Prompt>* prompts);
// One object per line: {"timestamp": MS, "input_length": N, "output_length": N, "hash_ids": [ID, ...]}; equal hash ids
// become equal blocks of tokens, so that prefixes are shared as in the trace.
std::optional<DatasetError> ReadMooncake(const std::string& path, const DatasetOptions& options,
                                         std::vector<Prompt>* prompts);

}  // namespace minitron::bench
