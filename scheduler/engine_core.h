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

// Receives each step's output. Called on the engine thread; may block, which then holds up the engine.
class StepSink {
 public:
  virtual ~StepSink() = default;
  virtual void OnStep(StepOutput output) = 0;
};

struct EngineCoreOptions {
  SchedulerOptions scheduler;
  int max_queued_requests = 256;  // sequences not yet running, inbox and waiting queue together
};

// Owns the Scheduler; borrows the runner and the sink. Submit, Abort and the getters may be called from any thread.
// A test or the simulator calls Step() itself instead of Start().
class EngineCore {
 public:
  // `now` is the clock; runner and sink must outlive this object.
  EngineCore(const EngineCoreOptions& options, engine::ModelRunner* runner, StepSink* sink,
             std::function<TimePoint()> now);
  ~EngineCore();  // stops the thread; live requests get no further events

  // Whether a request of this size can ever run. Pure; any thread.
  // Error: INVALID_ARGUMENT with the arithmetic (tokens, blocks needed, blocks there are).
  absl::Status CheckFits(const Request& request) const;

  // Hands a request over. After OK exactly one FinishEvent per sequence will come, unless the engine fails or stops.
  // Errors: UNAVAILABLE (queue full, with depth and limit; or draining), INVALID_ARGUMENT (CheckFits),
  // INTERNAL (the engine has failed).
  absl::Status Submit(Request request);

  // Ends a request at the next step with kCancelled. Unknown or finished ids are ignored. Never blocks on a step.
  void Abort(RequestId id);

  // Starts the engine thread. Call once.
  void Start();

  // Refuses new requests from now on; live ones go on.
  void BeginDrain();

  // Waits until no request is live or `deadline` passes. Returns whether it is idle. Call after BeginDrain.
  bool WaitIdle(TimePoint deadline);

  // Ends the thread after the current step.
  void Stop();

  // Runs one step if there is work; returns whether there was. Engine thread (or a test) only.
  bool Step();

  int queue_depth() const;     // sequences not yet running
  uint64_t num_steps() const;  // advances with every step: the heartbeat
  bool idle() const;           // no live request
  bool failed() const;         // the runner failed; nothing will run again
};

}  // namespace minitron::scheduler
