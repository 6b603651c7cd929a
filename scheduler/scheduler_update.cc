// Scheduler, second half of a step: what the results mean for the sequences and for the world.
#include <algorithm>
#include <utility>

#include "engine/base/check.h"
#include "scheduler/scheduler.h"

namespace minitron::scheduler {
namespace {

bool Contains(const std::vector<TokenId>& tokens, TokenId token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

}  // namespace

StepOutput Scheduler::Update(const SchedulerOutput& plan, const engine::StepResult& result, TimePoint now,
                             StepOutput recycled) {
  StepOutput output = std::move(recycled);
  output.Clear();
  if (!plan.sequences.empty()) --num_steps_in_flight_;
  const std::span<const engine::ResultRowOutput> rows(result.rows);
  size_t next_row = 0;
  for (const ScheduledSequence& scheduled : plan.sequences) {
    const size_t num_rows = scheduled.num_result_rows();
    CHECK(next_row + num_rows <= rows.size());
    ApplyResult(scheduled, rows.subspan(next_row, num_rows), now, output);
    next_row += num_rows;
  }
  CHECK(next_row == rows.size());
  std::swap(output.finished, pending_finished_);
  output.stats.num_running = static_cast<int>(running_.size());
  output.stats.num_waiting = waiting_.size();
  output.stats.num_blocks_used = kv_cache_.num_used_blocks();
  output.stats.num_blocks_cached = kv_cache_.num_cached_blocks();
  output.stats.num_blocks = kv_cache_.num_blocks();
  output.stats.num_batch_sequences = static_cast<int>(plan.sequences.size());
  output.stats.num_batch_tokens = plan.num_tokens;
  output.stats.num_prompt_tokens = plan.num_prompt_tokens;
  output.stats.num_preemptions = static_cast<int>(plan.preempted.size());
  output.stats.num_prefix_query_tokens = plan.num_prefix_query_tokens;
  output.stats.num_prefix_hit_tokens = plan.num_prefix_hit_tokens;
  output.stats.time = now;
  return output;
}

void Scheduler::DropResult(const std::shared_ptr<Sequence>& sequence) {
  sequence->DropStep();
  if (sequence->state() != SequenceState::kFinished || sequence->num_steps_in_flight() > 0) return;
  // It ended while this step ran, which was the last to touch its blocks.
  const auto position = std::find(retiring_.begin(), retiring_.end(), sequence);
  CHECK(position != retiring_.end());
  retiring_.erase(position);
  ReleaseResources(*sequence);
  sequence->ReleaseSlot();
}

void Scheduler::ApplyResult(const ScheduledSequence& scheduled, std::span<const engine::ResultRowOutput> rows,
                            TimePoint now, StepOutput& output) {
  const std::shared_ptr<Sequence>& sequence = scheduled.sequence;
  const bool failed = std::any_of(rows.begin(), rows.end(), [this](const engine::ResultRowOutput& row) {
    return row.failed || row.token_id < 0 || row.token_id >= limits_.vocab_size;
  });
  // Whatever broke its rows may be in its blocks, also when nobody waits for them any more.
  if (failed) kv_cache_.Distrust(*sequence);
  if (sequence->state() == SequenceState::kFinished) return DropResult(sequence);
  sequence->EndStep(scheduled.num_tokens, scheduled.num_prompt_logprobs);
  // Nothing is sent after an abort was heard of or the deadline has passed.
  if (sequence->abort_requested()) return Finish(sequence, FinishReason::kCancelled);
  if (sequence->request().deadline <= now || FirstTokenIsLate(*sequence, now)) {
    return Finish(sequence, FinishReason::kDeadline);
  }
  if (failed) return Finish(sequence, FinishReason::kError);
  kv_cache_.NoteComputed(*sequence);
  if (scheduled.num_prompt_logprobs > 0) {
    const auto prompt_rows = rows.first(scheduled.num_prompt_logprobs);
    output.prompt_logprobs.push_back({.id = sequence->id(),
                                      .first_position = scheduled.first_prompt_logprob,
                                      .positions = {prompt_rows.begin(), prompt_rows.end()}});
  }
  // Only prompts look their request up: a decode step of many sequences stays in their own memory.
  if (scheduled.first_position < sequence->num_prompt_tokens() &&
      sequence->num_computed_tokens() >= sequence->num_prompt_tokens()) {
    EmitPromptDone(*sequence, output);
  }
  if (scheduled.samples) {
    ApplySampledToken(sequence, rows.back(), now, output);
  } else if (sequence->num_computed_tokens() == sequence->num_tokens()) {
    Finish(sequence, FinishReason::kLength);  // nothing to generate was asked for
  }
}

void Scheduler::EmitPromptDone(const Sequence& sequence, StepOutput& output) {
  LiveRequest& live = requests_.at(sequence.id());
  if (std::exchange(live.prompt_done, true)) return;
  output.prompts_done.push_back({.id = sequence.id(),
                                 .num_prompt_tokens = sequence.num_prompt_tokens(),
                                 .num_cached_tokens = sequence.num_cached_tokens()});
}

void Scheduler::ApplySampledToken(const std::shared_ptr<Sequence>& sequence, const engine::ResultRowOutput& row,
                                  TimePoint now, StepOutput& output) {
  output.tokens.push_back({.id = sequence->id(),
                           .index = sequence->index(),
                           .output_position = sequence->num_output_tokens(),
                           .output = row});
  sequence->AppendOutput(row.token_id, now);
  waiting_.ChargeOutput(*sequence, 1);
  const Request& request = sequence->request();
  if (Contains(request.eos_token_ids, row.token_id)) {
    Finish(sequence, FinishReason::kEosToken, row.token_id);
  } else if (Contains(request.stop_token_ids, row.token_id)) {
    Finish(sequence, FinishReason::kStopToken, row.token_id);
  } else if (sequence->num_output_tokens() >= request.max_tokens) {
    Finish(sequence, FinishReason::kLength);  // the context length cannot come first: CheckFits
  }
}

}  // namespace minitron::scheduler
