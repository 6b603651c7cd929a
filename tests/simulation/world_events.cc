// World, what it expects of the events it is told.
#include <algorithm>

#include "tests/simulation/world.h"

namespace minitron::simulation {

using engine::ResultRowOutput;
using scheduler::FinishReason;
using scheduler::Request;
using scheduler::StepOutput;
using scheduler::TimePoint;

void World::ExpectSame(const ResultRowOutput& actual, const ResultRowOutput& expected) {
  const bool same = actual.token_id == expected.token_id && actual.failed == expected.failed &&
                    actual.chosen == expected.chosen && actual.top == expected.top;
  violations_->Expect(same, "tokens and logprobs equal the unbatched run:", actual.token_id, expected.token_id);
  Hash(actual.token_id);
}

void World::OnStep(StepOutput output) {
  violations_->Expect(!failed_, "nothing comes after the engine's failure");
  if (!output.engine_error.empty()) {
    violations_->Expect(options_.runner.fail_at_step >= 0 || options_.runner.fail_at_submit >= 0,
                        "the engine runs on:", output.engine_error);
    failed_ = true;
    marks_->Hit("engine failed");
  }
  violations_->Expect(output.stats.num_prefix_hit_tokens <= output.stats.num_prefix_query_tokens,
                      "no more tokens are found than looked up");
  for (const auto& event : output.prompt_logprobs) OnPromptLogprobs(event);
  for (const auto& event : output.prompts_done) {
    LiveRequest& live = requests_.at(event.id);
    violations_->Expect(!live.prompt_done, "PromptDone comes once:", event.id);
    violations_->Expect(event.num_prompt_tokens == static_cast<int>(live.request.prompt_token_ids.size()),
                        "PromptDone counts the prompt:", event.id);
    live.prompt_done = true;
  }
  for (const auto& event : output.tokens) {
    order_.OnToken(event);
    OnToken(event);
  }
  for (const auto& event : output.finished) {
    order_.OnFinish(event);
    OnFinish(event);
  }
  meanwhile_(false);
}

void World::OnPromptLogprobs(const scheduler::PromptLogprobsEvent& event) {
  LiveRequest& live = requests_.at(event.id);
  violations_->Expect(!live.prompt_done && !live.sequences[0].finished,
                      "prompt logprobs come before PromptDone:", event.id);
  violations_->Expect(event.first_position ==
                          std::max(1, live.request.prompt_logprobs_start) + static_cast<int>(live.num_prompt_logprobs),
                      "prompt logprobs have no gaps:", event.id, event.first_position);
  if (++live.num_prompt_logprob_chunks == 2) marks_->Hit("prompt logprobs in several chunks");
  const std::vector<ResultRowOutput>& expected = live.sequences[0].expected.prompt_logprobs;
  for (const ResultRowOutput& row : event.positions) {
    if (live.num_prompt_logprobs >= expected.size()) {
      return violations_->Expect(false, "no more prompt logprobs than asked for:", event.id);
    }
    ExpectSame(row, expected[live.num_prompt_logprobs++]);
  }
}

void World::OnToken(const scheduler::TokenEvent& event) {
  LiveRequest& live = requests_.at(event.id);
  LiveSequence& sequence = live.sequences.at(event.index);
  violations_->Expect(live.prompt_done, "no token before PromptDone:", event.id);
  violations_->Expect(!sequence.finished, "no token after the end:", event.id, event.index);
  violations_->Expect(!sequence.abort_sent, "no token after the abort:", event.id, event.index);
  violations_->Expect(live.request.deadline > now_, "no token after the deadline:", event.id, event.index);
  violations_->Expect(sequence.num_tokens > 0 || event.index > 0 || live.request.first_token_deadline > now_,
                      "no first token after its timeout:", event.id);
  const bool in_order = event.output_position == static_cast<int>(sequence.num_tokens) &&
                        sequence.num_tokens < sequence.expected.tokens.size();
  violations_->Expect(in_order, "tokens come in order, once, and not too many:", event.id, event.output_position);
  if (in_order) ExpectSame(event.output, sequence.expected.tokens[sequence.num_tokens++]);
}

void World::OnFinish(const scheduler::FinishEvent& event) {
  LiveRequest& live = requests_.at(event.id);
  LiveSequence& sequence = live.sequences.at(event.index);
  violations_->Expect(!sequence.finished, "a sequence ends once:", event.id, event.index);
  sequence.finished = true;
  Hash(event.id * 64 + event.index * 8 + static_cast<int>(event.reason));
  violations_->Expect(event.num_output_tokens == static_cast<int>(sequence.num_tokens) &&
                          event.num_prompt_tokens == static_cast<int>(live.request.prompt_token_ids.size()),
                      "usage counts what was sent:", event.id, event.num_output_tokens, sequence.num_tokens);
  violations_->Expect(
      event.num_cached_tokens % options_.runner.block_size == 0 && event.num_cached_tokens < event.num_prompt_tokens,
      "cached are whole blocks, and never all of the prompt:", event.id, event.num_cached_tokens);
  if (event.index > 0 && event.num_cached_tokens > 0) marks_->Hit("follower shared prefix");
  const bool never_ran = event.first_scheduled == TimePoint{};
  switch (event.reason) {
    case FinishReason::kCancelled:
      return violations_->Expect(sequence.abort_sent, "only the cancelled end as cancelled:", event.id);
    case FinishReason::kDeadline:
      return CheckDeadline(live, sequence, never_ran);
    default:
      CheckOutcome(live, sequence, event);
  }
}

void World::CheckDeadline(const LiveRequest& live, const LiveSequence& sequence, bool never_ran) {
  const Request& request = live.request;
  if (request.deadline <= now_) {
    if (never_ran) marks_->Hit("deadline in queue");
    if (sequence.num_tokens > 0) marks_->Hit("deadline after tokens");
    return;
  }
  violations_->Expect(!live.prompt_done, "only the expired end by deadline:", request.id);
  if (request.first_token_deadline <= now_) return marks_->Hit("first token too late");
  // Given up before it started: even with a step for each of its tokens it must have been close.
  // What passes between two calls counts as well: when steps overlap, a step is seen to last from before the one to
  // after the other, so it may hold two such times.
  const auto longest_step =
      options_.step_time + core_.scheduler().max_step_tokens() * options_.token_time + 2 * longest_advance_;
  const auto left = std::min(request.deadline, request.first_token_deadline) - now_;
  violations_->Expect(never_ran && left < (request.prompt_token_ids.size() + 2) * longest_step,
                      "only who cannot make it is given up before it starts:", request.id);
  marks_->Hit("given up before it started");
}

void World::CheckOutcome(const LiveRequest& live, const LiveSequence& sequence, const scheduler::FinishEvent& event) {
  if (event.reason == FinishReason::kError && runner_.MayHaveFailed(event.id, event.index)) {
    return marks_->Hit("row broken by accident");
  }
  violations_->Expect(event.reason == sequence.expected.reason, "the finish reason is the oracle's:", event.id);
  if (event.reason == FinishReason::kError) return marks_->Hit("row broken");
  violations_->Expect(live.prompt_done, "PromptDone comes before the end:", event.id);
  violations_->Expect(sequence.num_tokens == sequence.expected.tokens.size(), "all tokens are sent:", event.id);
  if (event.index == 0) {
    violations_->Expect(live.num_prompt_logprobs == sequence.expected.prompt_logprobs.size(),
                        "all prompt logprobs are sent:", event.id);
  }
  if (live.request.max_tokens == 0) marks_->Hit("scored only");
  if (event.reason != FinishReason::kLength && !sequence.expected.tokens.empty()) {
    marks_->Hit("stopped by token");
    violations_->Expect(event.stop_token == sequence.expected.tokens.back().token_id,
                        "the stop token is named:", event.id);
  }
  marks_->Hit("finished unharmed");
}

}  // namespace minitron::simulation
