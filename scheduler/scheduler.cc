#include "scheduler/scheduler.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace minitron::scheduler {
namespace {

int OptionOrLimit(int option, int limit) { return option == 0 ? limit : std::min(option, limit); }

// Unambiguous: no tenant and salt can spell another tenant's.
std::string CacheSalt(const Request& request, PrefixSharing sharing) {
  switch (sharing) {
    case PrefixSharing::kRequest:
      return absl::StrCat("request:", request.id);
    case PrefixSharing::kTenant:
      return absl::StrCat("tenant:", request.tenant.size(), ":", request.tenant, ":", request.cache_salt);
    case PrefixSharing::kAll:
      return absl::StrCat("all:", request.cache_salt);
  }
  CHECK(false);
}

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options, const RunnerLimits& limits)
    : options_(options),
      limits_(limits),
      max_step_tokens_(OptionOrLimit(options.max_step_tokens, limits.max_num_tokens)),
      max_running_sequences_(
          std::min(max_step_tokens_, OptionOrLimit(options.max_running_sequences, limits.max_num_sequences))),
      kv_cache_(limits.num_kv_blocks, limits.block_size, options.prefix_hash_key, options.prefix_hash_bits),
      waiting_(options.fairness) {
  CHECK(options.Validate().ok());
  CHECK(max_step_tokens_ > 0 && max_running_sequences_ > 0);
  for (int slot = 2 * limits.max_num_sequences - 1; slot >= 0; --slot) free_history_slots_.push_back(slot);
}

void Scheduler::Add(Request request, TimePoint now) {
  CHECK(CheckFits(request, limits_).ok());
  const auto shared = std::make_shared<const Request>(std::move(request));
  const auto [it, inserted] = requests_.try_emplace(shared->id);
  CHECK(inserted);
  LiveRequest& live = it->second;
  live.num_unfinished = shared->num_sequences;
  const uint64_t order = next_order_++;
  const std::string cache_salt = CacheSalt(*shared, options_.prefix_sharing);
  for (int index = 0; index < shared->num_sequences; ++index) {
    live.sequences.push_back(std::make_shared<Sequence>(shared, index, order, cache_salt));
    waiting_.Attach(*live.sequences.back());
    waiting_.Add(live.sequences.back(), now);
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

void Scheduler::Finish(const std::shared_ptr<Sequence>& held, FinishReason reason, TokenId stop_token) {
  // A copy, because `held` may be an element of the queue that the sequence leaves.
  const std::shared_ptr<Sequence> sequence = held;  // NOLINT(performance-unnecessary-copy-initialization)
  if (sequence->state() == SequenceState::kRunning) {
    const auto position = std::find(running_.begin(), running_.end(), sequence);
    CHECK(position != running_.end());
    running_.erase(position);
  } else {
    waiting_.Remove(sequence);
    if (!sequence->ever_scheduled()) left_queue_.push_back(sequence);
  }
  waiting_.Detach(*sequence);
  sequence->Finish();
  if (sequence->num_steps_in_flight() > 0) {
    retiring_.push_back(sequence);
  } else {
    ReleaseResources(*sequence);
    sequence->ReleaseSlot();
  }
  pending_finished_.push_back(sequence->MakeFinishEvent(reason, stop_token));
  const auto live = requests_.find(sequence->id());
  if (--live->second.num_unfinished == 0) requests_.erase(live);
}

bool Scheduler::ReservesToCompletion(const Sequence& sequence) const {
  return options_.admission_mode == AdmissionMode::kReserve || sequence.num_preemptions() >= options_.max_preemptions;
}

void Scheduler::ReleaseResources(Sequence& sequence) {
  kv_cache_.Release(sequence);
  if (sequence.history_slot() != engine::kNone) free_history_slots_.push_back(sequence.history_slot());
}

std::vector<FinishEvent> Scheduler::TakePendingEvents() { return std::exchange(pending_finished_, {}); }

std::vector<std::shared_ptr<Sequence>> Scheduler::waiting() const {
  std::vector<std::shared_ptr<Sequence>> waiting;
  waiting_.ForEach([&waiting](const std::shared_ptr<Sequence>& sequence) { waiting.push_back(sequence); });
  return waiting;
}

absl::Status Scheduler::CheckConsistent() const {
  std::vector<const Sequence*> owners;
  std::set<int> slots(free_history_slots_.begin(), free_history_slots_.end());
  size_t num_slots = free_history_slots_.size();
  for (const auto* queue : {&running_, &retiring_}) {
    for (const auto& sequence : *queue) {
      owners.push_back(sequence.get());
      const bool runs = sequence->state() == SequenceState::kRunning;
      if (runs != (queue == &running_)) return absl::InternalError("a sequence is in a queue of another state");
      if (!runs && sequence->num_steps_in_flight() == 0) return absl::InternalError("retiring, but not in flight");
      if (sequence->history_slot() == engine::kNone) continue;
      slots.insert(sequence->history_slot());
      ++num_slots;
    }
  }
  for (const auto& sequence : waiting()) {
    if (sequence->state() != SequenceState::kWaiting) return absl::InternalError("not waiting, but in waiting_");
    if (!sequence->block_table().empty()) return absl::InternalError("a waiting sequence owns blocks");
  }
  if (slots.size() != num_slots || num_slots != 2 * static_cast<size_t>(limits_.max_num_sequences)) {
    return absl::InternalError(absl::StrCat(num_slots, " history slots accounted for, ", slots.size(), " distinct"));
  }
  if (!std::is_sorted(running_.begin(), running_.end(), ServedBefore())) {
    return absl::InternalError("running sequences are out of order");
  }
  RETURN_IF_ERROR(waiting_.CheckConsistent());
  return kv_cache_.CheckConsistent(owners);
}

}  // namespace minitron::scheduler
