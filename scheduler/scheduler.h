// Scheduler: decides, step by step, which sequences run how many tokens in which blocks.
//
// Policy. Decoding sequences get their one token first, then running prompts their next chunk, then waiting sequences
// are admitted: the former two by priority (higher first), then arrival, the latter as FairQueue says. A sequence is
// admitted with the blocks of all tokens it has, so a prompt never stalls half-way; only decoding grows. When a growing
// sequence finds no block, the lowest-priority youngest running sequence is preempted: its blocks are released, it goes
// to the front of its tenant's queue, keeps its output and recomputes what the prefix cache has lost. After
// max_preemptions, or always in kReserve, a sequence is admitted only with a right to all blocks it may ever need, and
// is not preempted. The oldest of the others can always evict the rest and, by CheckFits, finish, so there is always
// progress.
//
// Running ahead. Schedule may be called for step n+1 while step n runs: progress is planned at once, and a token that
// is not read yet is named by its result row. Whatever ends a sequence wastes at most its one row in flight; its blocks
// come back when that row is read. Only a sequence with nothing in flight is preempted: wants_drain() asks for that.
//
// Deterministic: no clock, no randomness, no lock; `now` is an argument. Engine thread only.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/fair_queue.h"
#include "scheduler/kv_cache_manager.h"
#include "scheduler/scheduler_options.h"
#include "scheduler/scheduler_output.h"
#include "scheduler/sequence.h"
#include "scheduler/step_output.h"
#include "scheduler/step_time_model.h"

namespace minitron::scheduler {

class Scheduler {
 public:
  // CHECKs that options are valid.
  Scheduler(const SchedulerOptions& options, const RunnerLimits& limits);

  // Queues the request's sequences. CHECKs CheckFits, and that no live request has this id.
  void Add(Request request, TimePoint now);

  // Marks all sequences of a request, or one of them. The next Schedule or Update ends them with kCancelled and drops
  // what was computed meanwhile. Unknown, finished and out-of-range ids are ignored.
  void Abort(RequestId id);
  void AbortSequence(RequestId id, int index);

  // Ends marked and expired sequences, then plans a step. At most one step may be in flight: planned, with rows, and
  // not yet given to Update. The plan is empty only when no sequence is live or a step is in flight. Its storage is
  // that of `recycled`. It must be given to Update, in order, unless it is empty.
  SchedulerOutput Schedule(TimePoint now, SchedulerOutput recycled = {});

  // Whether the step in flight should be given to Update before the next Schedule, which can then preempt.
  bool wants_drain() const { return wants_drain_ && num_steps_in_flight_ > 0; }

  // Takes the results of `plan`, in its order, and returns all events since the last Update, in the storage of
  // `recycled`. Sequences that finished with nothing in flight own no block afterwards. `result` has one row per result
  // row of the plan (CHECKed). StepStats::step_duration is the caller's to fill.
  StepOutput Update(const SchedulerOutput& plan, const engine::StepResult& result, TimePoint now,
                    StepOutput recycled = {});

  // How long the step of `plan` took, from its submission (or the end of the step before) to its results.
  void ObserveStepTime(const SchedulerOutput& plan, Duration duration);

  // Sequences that were started for the first time, or ended without, since the last call of ClearLeftQueue.
  const std::vector<std::shared_ptr<Sequence>>& left_queue() const { return left_queue_; }
  void ClearLeftQueue() { left_queue_.clear(); }

  // The finish events that no Update has returned yet.
  bool has_pending_events() const { return !pending_finished_.empty(); }
  std::vector<FinishEvent> TakePendingEvents();

  int num_live_sequences() const { return static_cast<int>(running_.size()) + waiting_.size(); }
  int max_running_sequences() const { return max_running_sequences_; }
  int max_step_tokens() const { return max_step_tokens_; }

  // For inspection by tests and the simulator: in serving order, and as FairQueue::ForEach goes.
  const std::vector<std::shared_ptr<Sequence>>& running() const { return running_; }
  std::vector<std::shared_ptr<Sequence>> waiting() const;
  const FairQueue& fair_queue() const { return waiting_; }
  const std::vector<std::shared_ptr<Sequence>>& retiring() const { return retiring_; }  // finished, a row in flight
  const StepTimeModel& step_time_model() const { return step_time_model_; }
  const KvCacheManager& kv_cache() const { return kv_cache_; }
  // INTERNAL with the first contradiction between queues, tables, slots and refcounts.
  absl::Status CheckConsistent() const;

 private:
  struct LiveRequest {
    std::vector<std::shared_ptr<Sequence>> sequences;
    int num_unfinished = 0;
    bool prompt_done = false;
  };

  enum class Admission {
    kStarted,
    kLacksBlocks,
    kWaitsForOthers,  // for blocks that another sequence is computing, or for its leader's prompt logprobs
  };

  void EndAbortedAndExpired(TimePoint now);
  void PlanDecodes(TimePoint now, SchedulerOutput& plan);
  void CollectPrompts();
  void PlanPrompt(Sequence& sequence, SchedulerOutput& plan);
  // Admits all there is room for, or those that go before the running prompt `before`.
  void AdmitWaiting(TimePoint now, const Sequence* before, SchedulerOutput& plan);

  // Whether its next row can be planned although its last token may not be read yet.
  static bool MayRunAhead(const Sequence& sequence);
  // Whether it gets a right to all its blocks when it starts, and is never preempted afterwards.
  bool ReservesToCompletion(const Sequence& sequence) const;
  // Grows the decoding running_[position] by a token; preempts from the back until it fits. False: it cannot run now.
  bool GrowOrPreempt(size_t position, TimePoint now, SchedulerOutput& plan);
  void Preempt(size_t position, TimePoint now, SchedulerOutput& plan);
  // Whether prompt logprobs that come before any token of its request are still to be reported.
  bool WaitsForPromptLogprobs(const Sequence& sequence) const;
  // Ends the requests that CannotMakeIt.
  void EndGivenUp();
  // Gives a popped sequence blocks and makes it run. The caller puts it into running_, or back.
  Admission TryStart(const std::shared_ptr<Sequence>& held, TimePoint now, SchedulerOutput& plan);
  // Prompt rows for a step as planned so far; may be 0.
  int ChunkLength(const Sequence& sequence, const SchedulerOutput& plan) const;
  void AddToPlan(const std::shared_ptr<Sequence>& sequence, int num_tokens, SchedulerOutput& plan) const;

  // The pace: how much of a step prompts get, and who is too late (scheduler_pace.cc).
  // How long a step may take that computes this sequence's prompt, in seconds; 0: no target.
  double StepTarget(const Sequence& sequence) const;
  // Whether a target (0: none) leaves room for (more) prompt rows.
  bool HasRoomForPrompts(double target_s, const SchedulerOutput& plan) const;
  // Whether the decoding sequences leave new ones enough of the inter-token target to get on.
  bool HasRoomForNewSequences(const SchedulerOutput& plan) const;
  // At most `num_tokens`, at least 1 if HasRoomForPrompts.
  int PacedRows(const Sequence& sequence, int num_tokens, const SchedulerOutput& plan) const;
  // Whether the request is still waiting for its first token at a time when it gives that up.
  bool FirstTokenIsLate(const Sequence& sequence, TimePoint now) const;
  // Whether the first token of a waiting sequence would come too late if it were started in this step.
  bool CannotMakeIt(const Sequence& sequence, const SchedulerOutput& plan, TimePoint now) const;

  void ApplyResult(const ScheduledSequence& scheduled, std::span<const engine::ResultRowOutput> rows, TimePoint now,
                   StepOutput& output);
  void DropResult(const std::shared_ptr<Sequence>& sequence);
  void EmitPromptDone(const Sequence& sequence, StepOutput& output);
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
  std::vector<std::shared_ptr<Sequence>> retiring_;   // finished, own blocks until their last step is read
  std::vector<std::pair<std::shared_ptr<Sequence>, FinishReason>> ended_;  // scratch
  std::vector<Sequence*> prompts_;                                         // scratch of Schedule
  std::vector<RequestId> given_up_;                                        // in this step
  std::vector<std::shared_ptr<Sequence>> left_queue_;
  StepTimeModel step_time_model_;
  std::vector<int> free_history_slots_;
  std::vector<FinishEvent> pending_finished_;
  uint64_t next_order_ = 0;
  int num_steps_in_flight_ = 0;
  bool wants_drain_ = false;
  bool expects_light_tenant_ = false;  // in the step that is being planned
};

}  // namespace minitron::scheduler
