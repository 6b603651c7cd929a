// Scheduler, first half of a step: who runs, how many tokens, in which blocks.
#include <algorithm>
#include <tuple>
#include <utility>

#include "engine/base/check.h"
#include "scheduler/scheduler.h"

namespace minitron::scheduler {

SchedulerOutput Scheduler::Schedule(TimePoint now, SchedulerOutput recycled) {
  SchedulerOutput plan = std::move(recycled);
  plan.Clear();
  plan.block_size = limits_.block_size;
  wants_drain_ = false;
  expects_light_tenant_ = waiting_.ExpectsLightTenant(now);
  EndAbortedAndExpired(now);
  PlanDecodes(now, plan);
  // A step that had to preempt, or will have to, has no room to hand out; admitting would take the blocks just won.
  const bool may_admit = plan.preempted.empty() && !wants_drain_;
  CollectPrompts();
  if (may_admit && !prompts_.empty()) AdmitWaiting(now, prompts_.front(), plan);
  for (Sequence* const prompt : prompts_) PlanPrompt(*prompt, plan);
  if (may_admit) AdmitWaiting(now, nullptr, plan);
  for (const ScheduledSequence& scheduled : plan.sequences) kv_cache_.NotePlanned(*scheduled.sequence);
  if (!plan.sequences.empty()) ++num_steps_in_flight_;
  CHECK(num_steps_in_flight_ > 0 || num_live_sequences() == 0);
  return plan;
}

void Scheduler::EndAbortedAndExpired(TimePoint now) {
  const auto look = [this, now](const std::shared_ptr<Sequence>& sequence) {
    if (sequence->abort_requested()) {
      ended_.emplace_back(sequence, FinishReason::kCancelled);
    } else if (sequence->request().deadline <= now || FirstTokenIsLate(*sequence, now)) {
      ended_.emplace_back(sequence, FinishReason::kDeadline);
    }
  };
  for (const auto& sequence : running_) look(sequence);
  waiting_.ForEach(look);
  for (const auto& [sequence, reason] : ended_) Finish(sequence, reason);
  ended_.clear();
}

bool Scheduler::MayRunAhead(const Sequence& sequence) {
  if (sequence.num_unread_tokens() == 0) return true;
  const Request& request = sequence.request();
  return !request.WaitsForEachToken() &&
         sequence.num_output_tokens() + sequence.num_unread_tokens() < request.max_tokens;
}

void Scheduler::PlanDecodes(TimePoint now, SchedulerOutput& plan) {
  for (size_t i = 0; i < running_.size(); ++i) {
    const std::shared_ptr<Sequence> sequence = running_[i];
    if (!sequence->is_decoding() || !MayRunAhead(*sequence)) continue;
    if (GrowOrPreempt(i, now, plan)) {
      AddToPlan(sequence, 1, plan);
      ++plan.num_decodes;
    } else if (sequence->state() != SequenceState::kRunning) {
      --i;  // it was taken away; those behind it, if any, moved up
    }
  }
  if (options_.itl_target > Duration::zero()) plan.decode_seconds = step_time_model_.PredictSeconds(plan.shape);
}

bool Scheduler::GrowOrPreempt(size_t position, TimePoint now, SchedulerOutput& plan) {
  Sequence& sequence = *running_[position];
  while (!kv_cache_.TryGrow(sequence.num_planned_tokens() + 1, sequence)) {
    // The last of the order that may be preempted. It is this one or behind it, because this one would need no room
    // if it could not be; and not in the plan yet, because decodes are planned from the front.
    size_t victim = running_.size() - 1;
    while (ReservesToCompletion(*running_[victim])) {
      CHECK(victim > position);
      --victim;
    }
    if (running_[victim]->num_steps_in_flight() > 0) {
      wants_drain_ = true;
      return false;
    }
    Preempt(victim, now, plan);
    if (victim == position) return false;
  }
  return true;
}

void Scheduler::Preempt(size_t position, TimePoint now, SchedulerOutput& plan) {
  const std::shared_ptr<Sequence> victim = running_[position];
  running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(position));
  ReleaseResources(*victim);
  victim->Preempt();
  plan.preempted.push_back(victim->id());
  waiting_.Add(victim, now);
}

// Running prompts in the order in which they go on: by class, then by what their tenant had received when they started,
// so that a prompt of a tenant within its share is not held up by those of a flood.
void Scheduler::CollectPrompts() {
  prompts_.clear();
  for (const auto& sequence : running_) {
    if (!sequence->is_decoding() && sequence->num_wanted_tokens() > 0) prompts_.push_back(sequence.get());
  }
  std::sort(prompts_.begin(), prompts_.end(), [](const Sequence* a, const Sequence* b) {
    const auto key = [](const Sequence* s) {
      return std::make_tuple(-int64_t{s->request().priority}, s->start_tag(), s->order(), s->index());
    };
    return key(a) < key(b);
  });
}

void Scheduler::PlanPrompt(Sequence& sequence, SchedulerOutput& plan) {
  const int num_tokens = ChunkLength(sequence, plan);
  if (num_tokens > 0) AddToPlan(sequence.shared_from_this(), num_tokens, plan);
}

void Scheduler::AdmitWaiting(TimePoint now, const Sequence* before, SchedulerOutput& plan) {
  // Prompts go on one at a time while decoding takes too much of the target.
  int num_allowed = HasRoomForNewSequences(plan) ? max_running_sequences_ : prompts_.empty() ? 1 : 0;
  while (static_cast<int>(running_.size()) < max_running_sequences_ && plan.num_tokens < max_step_tokens_ &&
         HasRoomForPrompts(Seconds(options_.itl_target), plan)) {
    if (before != nullptr) {
      const Sequence* const next = waiting_.Peek(now);
      if (next == nullptr || !FairQueue::GoesBefore(*next, *before)) break;
    }
    const std::shared_ptr<Sequence> sequence = waiting_.Pop(now);
    if (sequence == nullptr) break;
    if ((num_allowed <= 0 && !waiting_.IsBehindOthers(*sequence)) || !HasRoomForPrompts(StepTarget(*sequence), plan)) {
      set_aside_.push_back(sequence);
      break;
    }
    if (CannotMakeIt(*sequence, plan, now)) {
      set_aside_.push_back(sequence);
      given_up_.push_back(sequence->id());
      continue;
    }
    const Admission admission = TryStart(sequence, now, plan);
    if (admission != Admission::kStarted) {
      set_aside_.push_back(sequence);
      // Nobody overtakes a sequence that lacks blocks: a long prompt would starve behind short ones.
      if (admission == Admission::kLacksBlocks) break;
      continue;
    }
    --num_allowed;
    InsertInOrder(sequence, running_);
    AddToPlan(sequence, ChunkLength(*sequence, plan), plan);
  }
  for (const auto& sequence : set_aside_) waiting_.PutBack(sequence);
  set_aside_.clear();
  EndGivenUp();
}

void Scheduler::EndGivenUp() {
  for (const RequestId id : given_up_) {
    const auto live = requests_.find(id);
    if (live == requests_.end()) continue;  // with a sibling
    const std::vector<std::shared_ptr<Sequence>> sequences = live->second.sequences;
    for (const auto& sequence : sequences) {
      if (sequence->state() != SequenceState::kFinished) Finish(sequence, FinishReason::kDeadline);
    }
  }
  given_up_.clear();
}

bool Scheduler::WaitsForPromptLogprobs(const Sequence& sequence) const {
  if (sequence.is_leader()) return false;
  const Sequence& leader = *requests_.at(sequence.id()).sequences[0];
  return leader.state() != SequenceState::kFinished && leader.prompt_logprobs_pending();
}

Scheduler::Admission Scheduler::TryStart(const std::shared_ptr<Sequence>& held, TimePoint now, SchedulerOutput& plan) {
  Sequence& sequence = *held;
  if (WaitsForPromptLogprobs(sequence)) return Admission::kWaitsForOthers;
  const KvCacheManager::Prefix prefix = kv_cache_.FindPrefix(sequence);
  // Waiting for somebody else's work must not take more steps than doing it would.
  const int max_block_waits = sequence.num_tokens() / options_.max_prefill_chunk + 1;
  if (prefix.next_is_computing && sequence.num_block_waits() < max_block_waits) {
    sequence.CountBlockWait();
    return Admission::kWaitsForOthers;
  }
  const int num_tokens = ReservesToCompletion(sequence) ? sequence.num_prompt_tokens() + sequence.request().max_tokens
                                                        : sequence.num_tokens();
  const int num_new_blocks = kv_cache_.NumBlocksFor(num_tokens) - prefix.num_blocks;
  if (num_new_blocks + prefix.num_idle_blocks > kv_cache_.num_unreserved_blocks()) return Admission::kLacksBlocks;
  const int num_cached = kv_cache_.Start(prefix, num_tokens, sequence);
  int slot = engine::kNone;
  if (sequence.params().NeedsHistory()) {
    CHECK(!free_history_slots_.empty());
    slot = free_history_slots_.back();
    free_history_slots_.pop_back();
  }
  // What is computed again after a preemption was paid for the first time.
  const int num_charged = sequence.ever_scheduled() ? 0 : sequence.num_prompt_tokens() - num_cached;
  if (!sequence.ever_scheduled()) left_queue_.push_back(held);
  sequence.Start(num_cached, slot, now);
  waiting_.Started(sequence, num_charged, now);
  plan.num_prefix_query_tokens += sequence.num_tokens();
  plan.num_prefix_hit_tokens += num_cached;
  return Admission::kStarted;
}

int Scheduler::ChunkLength(const Sequence& sequence, const SchedulerOutput& plan) const {
  int num_tokens =
      std::min({sequence.num_wanted_tokens(), options_.max_prefill_chunk, max_step_tokens_ - plan.num_tokens});
  num_tokens = PacedRows(sequence, num_tokens, plan);
  if (!sequence.wants_prompt_logprobs()) return num_tokens;
  // Row p reports prompt position p + 1; rows from first_row on report, up to the last but one of the prompt.
  const int first_row = sequence.next_planned_prompt_logprob() - 1;
  const int end_row = first_row + options_.max_logprob_rows_per_step;
  if (end_row < sequence.num_prompt_tokens() - 1) {
    num_tokens = std::min(num_tokens, end_row - sequence.num_planned_tokens());
  }
  return num_tokens;
}

void Scheduler::AddToPlan(const std::shared_ptr<Sequence>& sequence, int num_tokens, SchedulerOutput& plan) const {
  ScheduledSequence& scheduled = plan.sequences.emplace_back();
  scheduled.sequence = sequence;
  scheduled.first_position = sequence->num_planned_tokens();
  scheduled.num_tokens = num_tokens;
  const int end = scheduled.first_position + num_tokens;
  const int num_prompt = sequence->num_prompt_tokens();
  if (sequence->wants_prompt_logprobs()) {
    scheduled.first_prompt_logprob = sequence->next_planned_prompt_logprob();
    scheduled.num_prompt_logprobs = std::max(0, std::min(end + 1, num_prompt) - scheduled.first_prompt_logprob);
  }
  scheduled.samples = num_tokens == sequence->num_wanted_tokens() && sequence->request().max_tokens > 0;
  scheduled.resets_history = sequence->history_reset_due();
  scheduled.output_position = sequence->num_output_tokens() + sequence->num_unread_tokens();
  if (sequence->num_unread_tokens() > 0) scheduled.previous_result_row = sequence->unread_row();
  plan.num_tokens += num_tokens;
  plan.shape.Add(scheduled.first_position, num_tokens);
  plan.num_prompt_tokens += std::max(0, std::min(end, num_prompt) - scheduled.first_position);
  plan.num_result_rows += scheduled.num_result_rows();
  sequence->BeginStep(num_tokens, scheduled.num_prompt_logprobs,
                      scheduled.samples ? plan.num_result_rows - 1 : engine::kNone);
}

}  // namespace minitron::scheduler
