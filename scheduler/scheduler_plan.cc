// Scheduler, first half of a step: who runs, how many tokens, in which blocks.
#include <algorithm>
#include <utility>

#include "engine/base/check.h"
#include "scheduler/scheduler.h"

namespace minitron::scheduler {

SchedulerOutput Scheduler::Schedule(TimePoint now) {
  EndAbortedAndExpired(now);
  SchedulerOutput plan;
  plan.block_size = limits_.block_size;
  PlanDecodes(now, plan);
  PlanPrefills(plan);
  // A step that had to preempt has no room to hand out; admitting now would take the blocks just won.
  if (plan.preempted.empty()) AdmitWaiting(now, plan);
  CHECK(plan.sequences.empty() == (num_live_sequences() == 0));
  return plan;
}

void Scheduler::EndAbortedAndExpired(TimePoint now) {
  std::vector<std::pair<std::shared_ptr<Sequence>, FinishReason>> ended;
  const auto look = [&ended, now](const std::shared_ptr<Sequence>& sequence) {
    if (sequence->abort_requested()) {
      ended.emplace_back(sequence, FinishReason::kCancelled);
    } else if (sequence->request().deadline <= now) {
      ended.emplace_back(sequence, FinishReason::kDeadline);
    }
  };
  for (const auto& sequence : running_) look(sequence);
  waiting_.ForEach(look);
  for (const auto& [sequence, reason] : ended) Finish(sequence, reason);
}

void Scheduler::PlanDecodes(TimePoint now, SchedulerOutput& plan) {
  for (size_t i = 0; i < running_.size(); ++i) {
    const std::shared_ptr<Sequence> sequence = running_[i];
    if (!sequence->is_decoding()) continue;
    if (GrowOrPreempt(i, now, plan)) AddToPlan(sequence, 1, plan);
  }
}

bool Scheduler::GrowOrPreempt(size_t position, TimePoint now, SchedulerOutput& plan) {
  Sequence& sequence = *running_[position];
  // Victims come from the back, so none of them is in the plan yet: decodes are planned from the front.
  while (!kv_cache_.Grow(sequence.num_tokens(), sequence).ok()) {
    const bool is_last = position + 1 == running_.size();
    PreemptLast(now, plan);
    if (is_last) return false;
  }
  return true;
}

void Scheduler::PreemptLast(TimePoint now, SchedulerOutput& plan) {
  const std::shared_ptr<Sequence> victim = running_.back();
  running_.pop_back();
  ReleaseResources(*victim);
  victim->Preempt();
  plan.preempted.push_back(victim->id());
  waiting_.Add(victim, now);
}

void Scheduler::PlanPrefills(SchedulerOutput& plan) {
  for (const auto& sequence : running_) {
    if (sequence->is_decoding()) continue;
    const int num_tokens = ChunkLength(*sequence, max_step_tokens_ - plan.num_tokens);
    if (num_tokens > 0) AddToPlan(sequence, num_tokens, plan);
  }
}

void Scheduler::AdmitWaiting(TimePoint now, SchedulerOutput& plan) {
  while (static_cast<int>(running_.size()) < max_running_sequences_ && plan.num_tokens < max_step_tokens_) {
    const std::shared_ptr<Sequence> sequence = waiting_.Pop(now);
    if (sequence == nullptr) break;
    if (WaitsForSibling(*sequence)) {
      set_aside_.push_back(sequence);
      continue;
    }
    if (!TryStart(*sequence, now)) {
      // Nobody overtakes a sequence that lacks blocks: a long prompt would starve behind short ones.
      set_aside_.push_back(sequence);
      break;
    }
    InsertInOrder(sequence, running_);
    AddToPlan(sequence, ChunkLength(*sequence, max_step_tokens_ - plan.num_tokens), plan);
  }
  for (const auto& sequence : set_aside_) waiting_.PutBack(sequence);
  set_aside_.clear();
}

const Sequence* Scheduler::FindPrefixOwner(const Sequence& sequence) const {
  const int num_shareable = kv_cache_.NumShareableTokens(sequence.request());
  if (num_shareable == 0 || sequence.request().num_sequences == 1) return nullptr;
  for (const auto& sibling : requests_.at(sequence.id()).sequences) {
    if (sibling->state() == SequenceState::kRunning && sibling->num_computed_tokens() >= num_shareable) {
      return sibling.get();
    }
  }
  return nullptr;
}

bool Scheduler::WaitsForSibling(const Sequence& sequence) const {
  if (sequence.request().num_sequences == 1) return false;
  const std::vector<std::shared_ptr<Sequence>>& siblings = requests_.at(sequence.id()).sequences;
  const Sequence& leader = *siblings[0];
  // No token before the last prompt logprob.
  if (!sequence.is_leader() && leader.state() != SequenceState::kFinished && leader.prompt_logprobs_pending()) {
    return true;
  }
  if (kv_cache_.NumShareableTokens(sequence.request()) == 0 || FindPrefixOwner(sequence) != nullptr) return false;
  // A sibling that runs is on its way to owning the prefix. If the leader is gone, the next in line takes its part.
  return std::any_of(siblings.begin(), siblings.end(),
                     [](const auto& sibling) { return sibling->state() == SequenceState::kRunning; });
}

bool Scheduler::TryStart(Sequence& sequence, TimePoint now) {
  const Sequence* owner = FindPrefixOwner(sequence);
  const int num_shareable = owner == nullptr ? 0 : kv_cache_.NumShareableTokens(sequence.request());
  const int num_new_blocks = kv_cache_.NumBlocksFor(sequence.num_tokens()) - kv_cache_.NumBlocksFor(num_shareable);
  if (num_new_blocks > kv_cache_.num_free_blocks()) return false;
  const int num_cached = owner == nullptr ? 0 : kv_cache_.ShareComputedPrefix(*owner, sequence);
  CHECK(kv_cache_.Grow(sequence.num_tokens(), sequence).ok());
  int slot = engine::kNone;
  if (sequence.params().NeedsHistory()) {
    CHECK(!free_history_slots_.empty());
    slot = free_history_slots_.back();
    free_history_slots_.pop_back();
  }
  // What is computed again after a preemption was paid for the first time.
  const int num_charged = sequence.ever_scheduled() ? 0 : sequence.num_prompt_tokens() - num_cached;
  if (!sequence.ever_scheduled()) --num_queued_;
  sequence.Start(num_cached, slot, now);
  waiting_.Started(sequence, num_charged, now);
  return true;
}

int Scheduler::ChunkLength(const Sequence& sequence, int budget) const {
  int num_tokens = std::min({sequence.num_wanted_tokens(), options_.max_prefill_chunk, budget});
  if (!sequence.prompt_logprobs_pending()) return num_tokens;
  // Row p reports prompt position p + 1; rows from first_row on report, up to the last but one of the prompt.
  const int first_row = sequence.next_prompt_logprob() - 1;
  const int end_row = first_row + options_.max_logprob_rows_per_step;
  if (end_row < sequence.num_prompt_tokens() - 1) {
    num_tokens = std::min(num_tokens, end_row - sequence.num_computed_tokens());
  }
  return num_tokens;
}

void Scheduler::AddToPlan(const std::shared_ptr<Sequence>& sequence, int num_tokens, SchedulerOutput& plan) const {
  ScheduledSequence scheduled;
  scheduled.sequence = sequence;
  scheduled.first_position = sequence->num_computed_tokens();
  scheduled.num_tokens = num_tokens;
  const int end = scheduled.first_position + num_tokens;
  const int num_prompt = sequence->num_prompt_tokens();
  if (sequence->prompt_logprobs_pending()) {
    scheduled.first_prompt_logprob = sequence->next_prompt_logprob();
    scheduled.num_prompt_logprobs = std::max(0, std::min(end + 1, num_prompt) - scheduled.first_prompt_logprob);
  }
  scheduled.samples = end == sequence->num_tokens() && sequence->request().max_tokens > 0;
  scheduled.resets_history = sequence->history_reset_due();
  plan.num_tokens += num_tokens;
  plan.num_prompt_tokens += std::max(0, std::min(end, num_prompt) - scheduled.first_position);
  plan.sequences.push_back(std::move(scheduled));
}

}  // namespace minitron::scheduler
