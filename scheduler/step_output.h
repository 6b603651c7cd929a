// StepOutput: what one step produced, for the output thread. Values only.
#pragma once

#include <string>
#include <vector>

#include "engine/batch.h"
#include "scheduler/request.h"

namespace minitron::scheduler {

// The prompt of a request is computed. Comes before any token of the request and, with prompt logprobs, after all of
// its PromptLogprobsEvents. Exactly once per request that produces anything.
struct PromptDoneEvent {
  RequestId id = 0;
  int num_prompt_tokens = 0;
  int num_cached_tokens = 0;
};

// Logprobs of some prompt positions; chunks arrive in ascending order without gaps.
struct PromptLogprobsEvent {
  RequestId id = 0;
  int first_position = 0;
  std::vector<engine::ResultRowOutput> positions;
};

struct TokenEvent {
  RequestId id = 0;
  int index = 0;            // which sequence
  int output_position = 0;  // 0, 1, 2, ... without gaps, also across preemption
  engine::ResultRowOutput output;
};

// The last event of a sequence.
struct FinishEvent {
  RequestId id = 0;
  int index = 0;
  FinishReason reason = FinishReason::kLength;
  TokenId stop_token = 0;  // for kEosToken and kStopToken
  int num_prompt_tokens = 0;
  int num_cached_tokens = 0;
  int num_output_tokens = 0;
  int num_preemptions = 0;
  TimePoint arrival;
  TimePoint first_scheduled;  // TimePoint{} when it never ran
  TimePoint first_token;      // TimePoint{} when there is none
  TimePoint last_token;
};

// The state after a step, for metrics and GetLoad.
struct StepStats {
  int num_running = 0;
  int num_waiting = 0;
  int num_blocks_used = 0;
  int num_blocks = 0;
  int num_batch_sequences = 0;
  int num_batch_tokens = 0;
  int num_prompt_tokens = 0;            // of num_batch_tokens, those of prompts computed for the first time or again
  int num_preemptions = 0;              // in this step
  int num_blocks_cached = 0;            // of the blocks not used, those that keep a prefix
  int64_t num_prefix_query_tokens = 0;  // looked up in the prefix cache by sequences that started in this step
  int64_t num_prefix_hit_tokens = 0;    // of these, found and not computed
  Duration step_duration{};             // schedule to collected
  TimePoint time;                       // when the results were read
};

struct StepOutput {
  std::vector<PromptLogprobsEvent> prompt_logprobs;
  std::vector<PromptDoneEvent> prompts_done;
  std::vector<TokenEvent> tokens;
  std::vector<FinishEvent> finished;
  StepStats stats;
  // Set once, in the last StepOutput ever, when the runner failed: every live request is lost.
  std::string engine_error;

  // Empty again, with its memory.
  void Clear() {
    prompt_logprobs.clear();
    prompts_done.clear();
    tokens.clear();
    finished.clear();
    stats = {};
    engine_error.clear();
  }
};

}  // namespace minitron::scheduler
