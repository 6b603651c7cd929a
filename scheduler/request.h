// Request: what a caller wants, in token ids. Immutable once submitted. Also the names of time and of outcomes.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/sampling_params.h"

namespace minitron::scheduler {

using engine::SamplingParams;
using engine::TokenId;

// One monotonic clock for everything; always an argument, never read in this room.
using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;
using Duration = Clock::duration;
inline double Seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

// Unique for the life of the process; made by EngineCore's caller.
using RequestId = uint64_t;

struct Request {
  RequestId id = 0;
  std::vector<TokenId> prompt_token_ids;  // at least one
  SamplingParams params;                  // sequence i draws with SequenceSeed(params.seed, i)
  int num_sequences = 1;                  // completions of the prompt
  int max_tokens = 1;                     // per sequence; 0 only together with prompt_logprobs (scoring)
  int min_tokens = 0;
  std::vector<TokenId> eos_token_ids;  // empty when end of sequence is ignored
  std::vector<TokenId> stop_token_ids;
  int num_top_logprobs = -1;         // of generated tokens; -1 none, 0 chosen only
  int num_prompt_top_logprobs = -1;  // of prompt tokens; -1 none, 0 chosen only
  int prompt_logprobs_start = 1;     // first prompt position to report; position 0 has no logprob
  // The row after each token depends on what the host makes of it: never planned ahead of it. A constraint implies it.
  bool waits_for_each_token = false;
  bool WaitsForEachToken() const { return waits_for_each_token || params.constraint != nullptr; }
  int priority = 0;  // higher first
  std::string tenant;
  std::string cache_salt;  // cached prefixes are shared between equal salts only; see PrefixSharing
  TimePoint arrival;
  TimePoint deadline = TimePoint::max();
  TimePoint first_token_deadline = TimePoint::max();  // of the first token of any sequence, or of a score
};

// Sequence 0 uses the request's seed itself, so n = 1 equals the first of n.
uint64_t SequenceSeed(uint64_t seed, int index);

enum class FinishReason {
  kEosToken,
  kStopToken,
  kLength,     // max_tokens reached (or 0 was asked for)
  kCancelled,  // Abort
  kDeadline,
  kError,  // this request's own failure (logits not finite)
};

}  // namespace minitron::scheduler
