// How the next token is chosen from a row of logits. Values are validated by server/ before they get here;
// engine/ CHECKs the ranges.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "engine/token_constraint.h"

namespace minitron::engine {

using TokenId = int32_t;

// What a backend reserves memory for; server/ refuses requests with more.
inline constexpr int kMaxLogitBiases = 1024;  // per request
inline constexpr int kMaxStopTokens = 64;     // per request; banned, like the model's own end tokens, before min_tokens

// Order of work: banned tokens and those the constraint does not allow, penalties, logit bias, temperature, top-k,
// top-p, min-p, draw.
struct SamplingParams {
  float temperature = 1.0f;         // [0, 2]; 0 is greedy, ties to the lowest id
  int32_t top_k = 0;                // [0, vocab]; 0 keeps all
  float top_p = 1.0f;               // (0, 1]
  float min_p = 0.0f;               // [0, 1]; fraction of the most likely token's probability
  float repetition_penalty = 1.0f;  // [0.01, 10]; tokens of prompt and output
  float presence_penalty = 0.0f;    // [-2, 2]; tokens of the output
  float frequency_penalty = 0.0f;   // [-2, 2]; times the count in the output
  std::vector<std::pair<TokenId, float>> logit_bias =
      {};             // at most kMaxLogitBiases; ids unique, in [0, vocab); values in [-100, 100]
  uint64_t seed = 0;  // with the output position the only source of randomness

  // What the output may be; null: anything. Goes with min_tokens == 0 and an end-of-sequence token.
  std::shared_ptr<const TokenConstraint> constraint = nullptr;

  bool HasPenalties() const {
    return repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f;
  }
  // Whether the runner has to keep the tokens of prompt and output for this sequence.
  bool NeedsHistory() const { return HasPenalties() || constraint != nullptr; }
};

}  // namespace minitron::engine
