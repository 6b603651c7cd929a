// Made prompts.
#include "clients/bench/dataset.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "clients/bench/token_source.h"

namespace minitron::bench {
namespace {

// Lengths are drawn by a generator of their own, so that prompts keep their words when the lengths change.
uint32_t DrawLength(uint32_t wanted, double range_ratio, std::mt19937_64* generator) {
  const auto low = static_cast<uint32_t>(std::lround(std::floor(wanted * (1 - range_ratio))));
  const auto high = static_cast<uint32_t>(std::lround(std::ceil(wanted * (1 + range_ratio))));
  return std::max(1u, low + static_cast<uint32_t>((*generator)() % (high - low + 1)));
}

}  // namespace

std::vector<Prompt> RandomPrompts(const DatasetOptions& options) {
  std::mt19937_64 lengths(options.seed);
  std::vector<Prompt> prompts(options.count);
  for (size_t i = 0; i < prompts.size(); ++i) {
    const uint32_t length = DrawLength(options.input_tokens, options.range_ratio, &lengths);
    TokenSource(options.seed * 0x9E3779B97F4A7C15u + i + 1, options.vocab_size).Append(length, &prompts[i]);
    prompts[i].output_tokens = DrawLength(options.output_tokens, options.range_ratio, &lengths);
  }
  return prompts;
}

std::vector<Prompt> SharedPrefixPrompts(const DatasetOptions& options) {
  std::vector<Prompt> prompts = RandomPrompts(options);
  for (size_t i = 0; i < prompts.size(); ++i) {
    Prompt prompt;
    const uint64_t prefix = i % std::max(1u, options.num_prefixes);
    TokenSource(~options.seed - prefix, options.vocab_size).Append(options.prefix_tokens, &prompt);
    prompt.ids.insert(prompt.ids.end(), prompts[i].ids.begin(), prompts[i].ids.end());
    prompt.text += prompts[i].text;
    prompt.input_tokens += prompts[i].input_tokens;
    prompt.output_tokens = prompts[i].output_tokens;
    prompts[i] = std::move(prompt);
  }
  return prompts;
}

}  // namespace minitron::bench
