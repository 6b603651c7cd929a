// EngineCore: the engine thread. Drains the inbox, plans, runs, updates, publishes; one Step() after another.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "engine/model_runner.h"
#include "scheduler/inbox.h"
#include "scheduler/scheduler.h"
#include "scheduler/step_output.h"

namespace minitron::scheduler {

// Receives each step's output. Called on the engine thread, with no lock held; may block, which then holds up the
// engine. May call Submit and Abort, not Stop or WaitIdle.
class StepSink {
 public:
  virtual ~StepSink() = default;
  virtual void OnStep(StepOutput output) = 0;

  // An output that the sink is done with, so that the engine can fill its memory again. Engine thread. Optional.
  virtual StepOutput Recycled() { return {}; }
};

// Whether step n+1 is planned and submitted while step n runs.
enum class Overlap {
  kAuto,  // when the runner submits asynchronously
  kOn,
  kOff,
};

struct EngineCoreOptions {
  SchedulerOptions scheduler;
  QueueLimits queue;  // of what never ran, in inbox and scheduler together; max_sequences in [1, 1048576], others >= 1
  Overlap overlap = Overlap::kAuto;

  // Error: INVALID_ARGUMENT naming the field, its value and its range.
  absl::Status Validate() const;
};

// Owns the Scheduler; borrows the runner and the sink. Submit, Abort and the getters may be called from any thread.
// A test or the simulator calls Step() itself instead of Start().
// Everything that threads share is in the Inbox, behind its one lock, or atomic; the rest is the engine thread's.
class EngineCore {
 public:
  // `now` is the clock; runner and sink must outlive this object. CHECKs that options are valid.
  EngineCore(const EngineCoreOptions& options, engine::ModelRunner* runner, StepSink* sink,
             std::function<TimePoint()> now);
  ~EngineCore();  // stops the thread; live requests get no further events

  EngineCore(const EngineCore&) = delete;
  EngineCore& operator=(const EngineCore&) = delete;

  // Whether a request of this size can ever run. Pure; any thread.
  // Error: INVALID_ARGUMENT with the arithmetic (tokens, blocks needed, blocks there are).
  absl::Status CheckFits(const Request& request) const;

  // Whether Submit would take such a request now; to be asked before its text is tokenized. Any thread.
  absl::Status CheckAdmission(const Arrival& arrival) const { return inbox_.Check(arrival); }

  // Hands a request over. After OK exactly one FinishEvent per sequence will come, unless the engine fails or stops.
  // Errors: UNAVAILABLE (QueueLedger::Check: a bound is reached or the deadline out of reach; or draining),
  // DEADLINE_EXCEEDED (it had passed), INVALID_ARGUMENT (CheckFits), INTERNAL (the engine has failed).
  // UNAVAILABLE carries the payload kReasonTypeUrl ("minitron/reason"), a kReason...; after Stop kReasonDraining.
  absl::Status Submit(Request request);

  // Ends a request, or one of its sequences, at the next step with kCancelled. Unknown or finished ids are ignored.
  // Never blocks on a step. No TokenEvent of the sequence follows the step that is running now.
  void Abort(RequestId id);
  void AbortSequence(RequestId id, int index);

  // Starts the engine thread. Call once.
  void Start();

  // Refuses new requests from now on; live ones go on.
  void BeginDrain();

  // Waits until no request is live and all their events are delivered, or `deadline` (on the real steady clock) passes.
  // Returns whether it is idle. Call after BeginDrain. A failed engine is idle: its requests are lost.
  bool WaitIdle(TimePoint deadline);

  // Ends the thread after the current step. Idempotent; one thread at a time, not the engine's.
  void Stop();

  // Plans, submits and publishes at most one step each; returns whether there was work. With overlap a step is
  // published one call after it was submitted. Engine thread (or a test) only.
  bool Step();

  int queue_depth() const;     // sequences not yet running
  uint64_t num_steps() const;  // advances with every step published: the heartbeat
  bool idle() const;           // no live request
  bool failed() const;         // the runner failed; nothing will run again

  const Scheduler& scheduler() const { return scheduler_; }  // engine thread (or a test) only

 private:
  void RunLoop();
  void DrainInbox(TimePoint now);
  absl::StatusOr<bool> RunStep();        // whether there was work
  absl::StatusOr<bool> PlanAndSubmit();  // whether there was anything to submit
  absl::Status CollectAndPublish();
  void Publish(const SchedulerOutput& plan, const engine::StepResult& result, TimePoint start);
  void PublishFailure(const absl::Status& status);

  const EngineCoreOptions options_;
  const RunnerLimits limits_;
  engine::ModelRunner* const runner_;  // owned by the caller of the constructor
  StepSink* const sink_;               // likewise
  const std::function<TimePoint()> now_;

  Inbox inbox_;
  std::atomic<uint64_t> num_steps_{0};

  // A step submitted and not collected. The runner borrows from it, also after it failed.
  struct StepInFlight {
    SchedulerOutput plan;
    engine::Batch batch;
    TimePoint start;
  };

  // Engine thread.
  const int max_steps_in_flight_;
  Scheduler scheduler_;
  StepInFlight steps_[2];  // a ring
  int oldest_step_ = 0;
  int num_steps_in_flight_ = 0;
  TimePoint last_collected_;

  std::thread thread_;
};

}  // namespace minitron::scheduler
