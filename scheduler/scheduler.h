// Scheduler: decides, step by step, which sequences run how many tokens in which blocks.
//
// Policy. Decoding sequences get their one token first, then running prompts their next chunk, then waiting sequences
// are admitted: the former two by priority (higher first), then arrival, the latter as FairQueue says. A sequence is
// admitted with the blocks of all tokens it has, so a prompt never stalls half-way; only decoding grows. When a growing
// sequence finds no block, the lowest-priority youngest running sequence is preempted: its blocks are released, it goes
// to the front of its tenant's queue, keeps its output and recomputes. The oldest sequence can always evict all others
// and, by CheckFits, finish alone, so every step with live sequences makes progress.
//
// Deterministic: no clock, no randomness, no lock; `now` is an argument. Engine thread only.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/fair_queue.h"
#include "scheduler/kv_cache_manager.h"
#include "scheduler/scheduler_options.h"
#include "scheduler/scheduler_output.h"
#include "scheduler/sequence.h"
#include "scheduler/step_output.h"

namespace minitron::scheduler {

class Scheduler {
 public:
  // CHECKs that options are valid.
  Scheduler(const SchedulerOptions& options, const RunnerLimits& limits);

  // Queues the request's sequences. CHECKs CheckFits, and that no live request has this id.
  void Add(Request request, TimePoint now);

  // Marks all sequences of a request, or one of them. The next Schedule ends them with kCancelled; results that come in
  // before are dropped. Unknown, finished and out-of-range ids are ignored.
  void Abort(RequestId id);
  void AbortSequence(RequestId id, int index);

  // Ends marked and expired sequences, then plans a step. The plan is empty exactly when no sequence is live.
  SchedulerOutput Schedule(TimePoint now);

  // Takes the results of `plan`, in its order, and returns all events since the last Update. Finished sequences own no
  // block afterwards. `result` has one row per result row of the plan (CHECKed). StepStats::step_duration is the
  // caller's to fill.
  StepOutput Update(const SchedulerOutput& plan, const engine::StepResult& result, TimePoint now);

  // The finish events that no Update has returned yet.
  bool has_pending_events() const { return !pending_finished_.empty(); }
  std::vector<FinishEvent> TakePendingEvents();

  int num_live_sequences() const { return static_cast<int>(running_.size()) + waiting_.size(); }
  int num_queued_sequences() const { return num_queued_; }  // never scheduled yet; preempted ones are not counted
  int max_running_sequences() const { return max_running_sequences_; }
  int max_step_tokens() const { return max_step_tokens_; }

  // For inspection by tests and the simulator: in serving order, and as FairQueue::ForEach goes.
  const std::vector<std::shared_ptr<Sequence>>& running() const { return running_; }
  std::vector<std::shared_ptr<Sequence>> waiting() const;
  const FairQueue& fair_queue() const { return waiting_; }
  const KvCacheManager& kv_cache() const { return kv_cache_; }
  // INTERNAL with the first contradiction between queues, tables, slots and refcounts.
  absl::Status CheckConsistent() const;

 private:
  struct LiveRequest {
    std::vector<std::shared_ptr<Sequence>> sequences;
    int num_unfinished = 0;
    bool prompt_done = false;
  };

  void EndAbortedAndExpired(TimePoint now);
  void PlanDecodes(TimePoint now, SchedulerOutput& plan);
  void PlanPrefills(SchedulerOutput& plan);
  void AdmitWaiting(TimePoint now, SchedulerOutput& plan);

  // Grows the decoding running_[position] by a token; preempts from the back until it fits. False: it was preempted.
  bool GrowOrPreempt(size_t position, TimePoint now, SchedulerOutput& plan);
  void PreemptLast(TimePoint now, SchedulerOutput& plan);
  // A running sequence of the same request that has computed the shareable prefix, or null.
  const Sequence* FindPrefixOwner(const Sequence& sequence) const;
  // Whether another sequence of the request is computing what this one can share, or has prompt logprobs to report.
  bool WaitsForSibling(const Sequence& sequence) const;
  // False: not enough free blocks; nothing changed.
  bool TryStart(Sequence& sequence, TimePoint now);
  int ChunkLength(const Sequence& sequence, int budget) const;
  void AddToPlan(const std::shared_ptr<Sequence>& sequence, int num_tokens, SchedulerOutput& plan) const;

  void ApplyResult(const ScheduledSequence& scheduled, std::span<const engine::ResultRowOutput> rows, TimePoint now,
                   StepOutput& output);
  void ApplySampledToken(const std::shared_ptr<Sequence>& sequence, const engine::ResultRowOutput& row, TimePoint now,
                         StepOutput& output);
  void Finish(const std::shared_ptr<Sequence>& sequence, FinishReason reason, TokenId stop_token = 0);
  void ReleaseResources(Sequence& sequence);

  const SchedulerOptions options_;
  const RunnerLimits limits_;
  const int max_step_tokens_;
  const int max_running_sequences_;  // never above max_step_tokens_, so that every decoding sequence gets its token

  KvCacheManager kv_cache_;
  std::map<RequestId, LiveRequest> requests_;
  std::vector<std::shared_ptr<Sequence>> running_;  // in ServedBefore order
  FairQueue waiting_;
  std::vector<std::shared_ptr<Sequence>> set_aside_;  // popped in this step, but not to be started in it
  int num_queued_ = 0;
  std::vector<int> free_history_slots_;
  std::vector<FinishEvent> pending_finished_;
  uint64_t next_order_ = 0;
};

}  // namespace minitron::scheduler
