#include "scheduler/scheduler.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace minitron::scheduler {
namespace {

absl::Status CheckRange(const char* name, int value, int low, int high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " ", value, " outside [", low, ", ", high, "]"));
}

int OptionOrLimit(int option, int limit) { return option == 0 ? limit : std::min(option, limit); }

bool Contains(const std::vector<TokenId>& tokens, TokenId token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

void InsertInOrder(const std::shared_ptr<Sequence>& sequence, std::vector<std::shared_ptr<Sequence>>& queue) {
  queue.insert(std::upper_bound(queue.begin(), queue.end(), sequence, ServedBefore()), sequence);
}

}  // namespace

absl::Status SchedulerOptions::Validate() const {
  RETURN_IF_ERROR(CheckRange("max_running_sequences", max_running_sequences, 0, 65536));
  RETURN_IF_ERROR(CheckRange("max_step_tokens", max_step_tokens, 0, 1048576));
  RETURN_IF_ERROR(CheckRange("max_prefill_chunk", max_prefill_chunk, 1, 1048576));
  return CheckRange("max_logprob_rows_per_step", max_logprob_rows_per_step, 1, 65536);
}

RunnerLimits RunnerLimits::Of(const engine::ModelRunner& runner) {
  return {.num_kv_blocks = runner.num_kv_blocks(),
          .block_size = runner.block_size(),
          .max_num_tokens = runner.max_num_tokens(),
          .max_num_sequences = runner.max_num_sequences(),
          .max_context_tokens = runner.model_info().max_context_tokens,
          .vocab_size = runner.model_info().vocab_size};
}

Scheduler::Scheduler(const SchedulerOptions& options, const RunnerLimits& limits)
    : options_(options),
      limits_(limits),
      max_step_tokens_(OptionOrLimit(options.max_step_tokens, limits.max_num_tokens)),
      max_running_sequences_(
          std::min(max_step_tokens_, OptionOrLimit(options.max_running_sequences, limits.max_num_sequences))),
      kv_cache_(limits.num_kv_blocks, limits.block_size) {
  CHECK(options.Validate().ok());
  CHECK(max_step_tokens_ > 0 && max_running_sequences_ > 0);
  for (int slot = 2 * limits.max_num_sequences - 1; slot >= 0; --slot) free_history_slots_.push_back(slot);
}

absl::Status Scheduler::CheckFits(const Request& request, const RunnerLimits& limits) {
  const int64_t num_prompt = static_cast<int64_t>(request.prompt_token_ids.size());
  if (num_prompt == 0) return absl::InvalidArgumentError("prompt has 0 tokens, at least 1 is needed");
  if (request.num_sequences < 1) {
    return absl::InvalidArgumentError(absl::StrCat("num_sequences ", request.num_sequences, " is below 1"));
  }
  if (request.max_tokens < 0) {
    return absl::InvalidArgumentError(absl::StrCat("max_tokens ", request.max_tokens, " is below 0"));
  }
  const int64_t num_tokens = num_prompt + request.max_tokens;
  if (num_tokens > limits.max_context_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("prompt of ", num_prompt, " tokens + max_tokens ",
                                                   request.max_tokens, " = ", num_tokens, " exceeds the context of ",
                                                   limits.max_context_tokens, " tokens"));
  }
  const int64_t num_blocks = (num_tokens + limits.block_size - 1) / limits.block_size;
  if (num_blocks > limits.num_kv_blocks) {
    return absl::InvalidArgumentError(absl::StrCat(
        "prompt of ", num_prompt, " tokens + max_tokens ", request.max_tokens, " = ", num_tokens, " needs ", num_blocks,
        " KV blocks of ", limits.block_size, " tokens, there are ", limits.num_kv_blocks));
  }
  return absl::OkStatus();
}

void Scheduler::Add(Request request) {
  CHECK(CheckFits(request, limits_).ok());
  const auto shared = std::make_shared<const Request>(std::move(request));
  const auto [it, inserted] = requests_.try_emplace(shared->id);
  CHECK(inserted);
  LiveRequest& live = it->second;
  live.num_unfinished = shared->num_sequences;
  const uint64_t order = next_order_++;
  for (int index = 0; index < shared->num_sequences; ++index) {
    live.sequences.push_back(std::make_shared<Sequence>(shared, index, order));
    InsertInOrder(live.sequences.back(), waiting_);
  }
}

void Scheduler::Abort(RequestId id) {
  const auto it = requests_.find(id);
  if (it == requests_.end()) return;
  for (const auto& sequence : it->second.sequences) sequence->RequestAbort();
}

void Scheduler::AbortSequence(RequestId id, int index) {
  const auto it = requests_.find(id);
  if (it == requests_.end()) return;
  if (index < 0 || index >= static_cast<int>(it->second.sequences.size())) return;
  it->second.sequences[index]->RequestAbort();
}

SchedulerOutput Scheduler::Schedule(TimePoint now) {
  EndAbortedAndExpired(now);
  SchedulerOutput plan;
  plan.block_size = limits_.block_size;
  PlanDecodes(plan);
  PlanPrefills(plan);
  // A step that had to preempt has no room to hand out; admitting now would take the blocks just won.
  if (plan.preempted.empty()) AdmitWaiting(now, plan);
  CHECK(plan.sequences.empty() == (num_live_sequences() == 0));
  return plan;
}

void Scheduler::EndAbortedAndExpired(TimePoint now) {
  std::vector<std::pair<std::shared_ptr<Sequence>, FinishReason>> ended;
  for (const auto* queue : {&running_, &waiting_}) {
    for (const auto& sequence : *queue) {
      if (sequence->abort_requested()) {
        ended.emplace_back(sequence, FinishReason::kCancelled);
      } else if (sequence->request().deadline <= now) {
        ended.emplace_back(sequence, FinishReason::kDeadline);
      }
    }
  }
  for (const auto& [sequence, reason] : ended) Finish(sequence, reason);
}

void Scheduler::PlanDecodes(SchedulerOutput& plan) {
  for (size_t i = 0; i < running_.size(); ++i) {
    const std::shared_ptr<Sequence> sequence = running_[i];
    if (!sequence->is_decoding()) continue;
    if (GrowOrPreempt(i, plan)) AddToPlan(sequence, 1, plan);
  }
}

bool Scheduler::GrowOrPreempt(size_t position, SchedulerOutput& plan) {
  Sequence& sequence = *running_[position];
  // Victims come from the back, so none of them is in the plan yet: decodes are planned from the front.
  while (!kv_cache_.Grow(sequence.num_tokens(), sequence).ok()) {
    const bool is_last = position + 1 == running_.size();
    PreemptLast(plan);
    if (is_last) return false;
  }
  return true;
}

void Scheduler::PreemptLast(SchedulerOutput& plan) {
  const std::shared_ptr<Sequence> victim = running_.back();
  running_.pop_back();
  ReleaseResources(*victim);
  victim->Preempt();
  plan.preempted.push_back(victim->id());
  InsertInOrder(victim, waiting_);
}

void Scheduler::PlanPrefills(SchedulerOutput& plan) {
  for (const auto& sequence : running_) {
    if (sequence->is_decoding()) continue;
    const int num_tokens = ChunkLength(*sequence, max_step_tokens_ - plan.num_tokens);
    if (num_tokens > 0) AddToPlan(sequence, num_tokens, plan);
  }
}

void Scheduler::AdmitWaiting(TimePoint now, SchedulerOutput& plan) {
  for (size_t i = 0; i < waiting_.size();) {
    if (static_cast<int>(running_.size()) >= max_running_sequences_ || plan.num_tokens >= max_step_tokens_) return;
    const std::shared_ptr<Sequence> sequence = waiting_[i];
    if (WaitsForSibling(*sequence)) {
      ++i;
      continue;
    }
    // Nobody overtakes a sequence that lacks blocks: a long prompt would starve behind short ones.
    if (!TryStart(*sequence, now)) return;
    waiting_.erase(waiting_.begin() + i);
    InsertInOrder(sequence, running_);
    AddToPlan(sequence, ChunkLength(*sequence, max_step_tokens_ - plan.num_tokens), plan);
  }
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
  sequence.Start(num_cached, slot, now);
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

StepOutput Scheduler::Update(const SchedulerOutput& plan, const engine::StepResult& result, TimePoint now) {
  StepOutput output;
  const std::span<const engine::ResultRowOutput> rows(result.rows);
  size_t next_row = 0;
  for (const ScheduledSequence& scheduled : plan.sequences) {
    const size_t num_rows = scheduled.num_result_rows();
    CHECK(next_row + num_rows <= rows.size());
    ApplyResult(scheduled, rows.subspan(next_row, num_rows), now, output);
    next_row += num_rows;
  }
  CHECK(next_row == rows.size());
  output.finished = TakePendingEvents();
  output.stats.num_running = static_cast<int>(running_.size());
  output.stats.num_waiting = static_cast<int>(waiting_.size());
  output.stats.num_blocks_used = kv_cache_.num_used_blocks();
  output.stats.num_blocks = kv_cache_.num_blocks();
  output.stats.num_batch_sequences = static_cast<int>(plan.sequences.size());
  output.stats.num_batch_tokens = plan.num_tokens;
  output.stats.num_prompt_tokens = plan.num_prompt_tokens;
  output.stats.num_preemptions = static_cast<int>(plan.preempted.size());
  output.stats.time = now;
  return output;
}

void Scheduler::ApplyResult(const ScheduledSequence& scheduled, std::span<const engine::ResultRowOutput> rows,
                            TimePoint now, StepOutput& output) {
  const std::shared_ptr<Sequence>& sequence = scheduled.sequence;
  // Aborted while the step ran: nobody waits for this result.
  if (sequence->state() != SequenceState::kRunning || sequence->abort_requested()) return;
  const bool failed = std::any_of(rows.begin(), rows.end(), [this](const engine::ResultRowOutput& row) {
    return row.failed || row.token_id < 0 || row.token_id >= limits_.vocab_size;
  });
  if (failed) return Finish(sequence, FinishReason::kError);

  sequence->AdvanceComputed(scheduled.num_tokens);
  if (scheduled.num_prompt_logprobs > 0) {
    const auto prompt_rows = rows.first(scheduled.num_prompt_logprobs);
    output.prompt_logprobs.push_back({.id = sequence->id(),
                                      .first_position = scheduled.first_prompt_logprob,
                                      .positions = {prompt_rows.begin(), prompt_rows.end()}});
    sequence->AdvancePromptLogprobs(scheduled.num_prompt_logprobs);
  }
  LiveRequest& live = requests_.at(sequence->id());
  if (!live.prompt_done && sequence->num_computed_tokens() >= sequence->num_prompt_tokens()) {
    live.prompt_done = true;
    output.prompts_done.push_back({.id = sequence->id(),
                                   .num_prompt_tokens = sequence->num_prompt_tokens(),
                                   .num_cached_tokens = sequence->num_cached_tokens()});
  }
  if (scheduled.samples) {
    ApplySampledToken(sequence, rows.back(), now, output);
  } else if (sequence->num_wanted_tokens() == 0) {
    Finish(sequence, FinishReason::kLength);  // nothing to generate was asked for
  }
}

void Scheduler::ApplySampledToken(const std::shared_ptr<Sequence>& sequence, const engine::ResultRowOutput& row,
                                  TimePoint now, StepOutput& output) {
  output.tokens.push_back({.id = sequence->id(),
                           .index = sequence->index(),
                           .output_position = sequence->num_output_tokens(),
                           .output = row});
  sequence->AppendOutput(row.token_id, now);
  const Request& request = sequence->request();
  if (Contains(request.eos_token_ids, row.token_id)) {
    Finish(sequence, FinishReason::kEosToken, row.token_id);
  } else if (Contains(request.stop_token_ids, row.token_id)) {
    Finish(sequence, FinishReason::kStopToken, row.token_id);
  } else if (sequence->num_output_tokens() >= request.max_tokens) {
    Finish(sequence, FinishReason::kLength);  // the context length cannot come first: CheckFits
  }
}

void Scheduler::Finish(const std::shared_ptr<Sequence>& held, FinishReason reason, TokenId stop_token) {
  // A copy, because `held` may be an element of the queue that the sequence leaves.
  const std::shared_ptr<Sequence> sequence = held;  // NOLINT(performance-unnecessary-copy-initialization)
  std::vector<std::shared_ptr<Sequence>>& queue = sequence->state() == SequenceState::kRunning ? running_ : waiting_;
  const auto position = std::find(queue.begin(), queue.end(), sequence);
  CHECK(position != queue.end());
  queue.erase(position);
  ReleaseResources(*sequence);
  sequence->Finish();
  pending_finished_.push_back(sequence->MakeFinishEvent(reason, stop_token));
  const auto live = requests_.find(sequence->id());
  if (--live->second.num_unfinished == 0) requests_.erase(live);
}

void Scheduler::ReleaseResources(Sequence& sequence) {
  kv_cache_.Release(sequence);
  if (sequence.history_slot() != engine::kNone) free_history_slots_.push_back(sequence.history_slot());
}

std::vector<FinishEvent> Scheduler::TakePendingEvents() { return std::exchange(pending_finished_, {}); }

int Scheduler::num_queued_sequences() const {
  return static_cast<int>(std::count_if(waiting_.begin(), waiting_.end(),
                                        [](const auto& sequence) { return !sequence->ever_scheduled(); }));
}

absl::Status Scheduler::CheckConsistent() const {
  std::vector<const Sequence*> owners;
  std::set<int> slots(free_history_slots_.begin(), free_history_slots_.end());
  size_t num_slots = free_history_slots_.size();
  for (const auto& sequence : running_) {
    owners.push_back(sequence.get());
    if (sequence->state() != SequenceState::kRunning) return absl::InternalError("not running, but in running_");
    if (sequence->history_slot() == engine::kNone) continue;
    slots.insert(sequence->history_slot());
    ++num_slots;
  }
  for (const auto& sequence : waiting_) {
    if (sequence->state() != SequenceState::kWaiting) return absl::InternalError("not waiting, but in waiting_");
    if (!sequence->block_table().empty()) return absl::InternalError("a waiting sequence owns blocks");
  }
  if (slots.size() != num_slots || num_slots != 2 * static_cast<size_t>(limits_.max_num_sequences)) {
    return absl::InternalError(absl::StrCat(num_slots, " history slots accounted for, ", slots.size(), " distinct"));
  }
  const auto in_order = [](const auto& queue) { return std::is_sorted(queue.begin(), queue.end(), ServedBefore()); };
  if (!in_order(running_) || !in_order(waiting_)) return absl::InternalError("a queue is out of order");
  return kv_cache_.CheckConsistent(owners);
}

}  // namespace minitron::scheduler
