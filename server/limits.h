// Limits of requests: every bound a client can run into, in one table. request_builder enforces it, tests walk it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/sampling_params.h"

namespace minitron::server {

// A real-valued field, finite and inside [min, max] (or (min, max] with min_exclusive).
struct FloatLimit {
  const char* field;
  double min;
  double max;
  bool min_exclusive = false;
};

// An integer field inside [min, max].
struct IntLimit {
  const char* field;
  int64_t min;
  int64_t max;
};

namespace limits {

inline constexpr FloatLimit kTemperature{"sampling.temperature", 0, 2};
inline constexpr FloatLimit kTopP{"sampling.top_p", 0, 1, /*min_exclusive=*/true};
inline constexpr FloatLimit kMinP{"sampling.min_p", 0, 1};
inline constexpr FloatLimit kRepetitionPenalty{"sampling.repetition_penalty", 0.01, 10};
inline constexpr FloatLimit kPresencePenalty{"sampling.presence_penalty", -2, 2};
inline constexpr FloatLimit kFrequencyPenalty{"sampling.frequency_penalty", -2, 2};
inline constexpr FloatLimit kLogitBias{"sampling.logit_bias", -100, 100};

inline constexpr IntLimit kNumSequences{"sampling.num_sequences", 0, 16};  // 0 means 1
inline constexpr IntLimit kLogitBiasEntries{"sampling.logit_bias", 0, engine::kMaxLogitBiases};
inline constexpr IntLimit kStopTokenIds{"stopping.stop_token_ids", 0, engine::kMaxStopTokens};
inline constexpr IntLimit kStopSequences{"stopping.stop_sequences", 0, 16};
inline constexpr IntLimit kStopSequenceBytes{"stopping.stop_sequences", 1, 256};
inline constexpr IntLimit kLogprobs{"output.logprobs", 0, 20};
inline constexpr IntLimit kPromptLogprobs{"output.prompt_logprobs", 0, 20};
inline constexpr IntLimit kTopLogprobs{"top_logprobs", 0, 20};
inline constexpr IntLimit kPriority{"priority", -100, 100};
inline constexpr IntLimit kRequestIdBytes{"request_id", 0, 128};
inline constexpr IntLimit kCacheSaltBytes{"cache_salt", 0, 128};
inline constexpr IntLimit kTenantBytes{"x-minitron-tenant", 0, 64};
inline constexpr IntLimit kModelNameBytes{"model", 0, 256};
inline constexpr IntLimit kRegexBytes{"constraint.regex", 1, 4096};
inline constexpr IntLimit kJsonSchemaBytes{"constraint.json_schema", 1, 65536};
inline constexpr IntLimit kGrammarBytes{"constraint.grammar", 1, 65536};
inline constexpr IntLimit kChoices{"constraint.choices", 1, 256};
inline constexpr IntLimit kChoiceBytes{"constraint.choices", 1, 1024};
inline constexpr IntLimit kFirstTokenTimeoutNs{"first_token_timeout", 1, int64_t{86400} * 1000000000};

// Text is measured before it is tokenized. 256 KiB holds any prompt of 64 k tokens of English; tokenizing it takes
// tens of milliseconds, which bounds the time a gRPC thread spends on one call.
inline constexpr int64_t kMaxTextBytes = int64_t{256} << 10;
// Ids a call may name before they are looked at one by one (prompts are then bounded by the context).
inline constexpr int64_t kMaxTokenIds = int64_t{256} << 10;
inline constexpr int64_t kMaxCancelIds = 1024;

// A streamed message is closed for coalescing once it carries this many tokens: with 20 alternatives each that is
// under 512 KiB, far from the 4 MiB a client accepts by default.
inline constexpr int kMaxTokensPerDelta = 512;

}  // namespace limits
}  // namespace minitron::server
