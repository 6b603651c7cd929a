// OutputProcessor: the output thread. Turns the engine's steps into text, events of calls, and metrics.
//
// The engine hands steps over through a bounded outbox; when it is full the engine waits (and the wait is a metric).
// Register, Unregister, CancelByName and EndLiveCalls may be called from any thread; everything about the content of a
// call belongs to the output thread alone. A call is registered before its request is submitted, so no event can miss
// it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/engine_core.h"
#include "scheduler/step_output.h"
#include "server/call_sink.h"
#include "server/live_call.h"
#include "server/metrics.h"
#include "server/request_builder.h"

namespace minitron::server {

struct OutputProcessorOptions {
  // Two engine steps per scheduler quantum would be enough; 64 ride out a scrape or a page fault of this thread.
  size_t max_outbox_steps = 64;
  scheduler::Duration write_stall_timeout = std::chrono::seconds(30);
};

class OutputProcessor : public scheduler::StepSink {
 public:
  // The three pointers and what `now` reads must outlive this object.
  OutputProcessor(const OutputProcessorOptions& options, const Tokenizer* tokenizer, Metrics* metrics,
                  std::function<scheduler::TimePoint()> now);
  ~OutputProcessor() override;  // stops the thread

  // How sequences are ended in the engine; index -1 means the whole request. Call before Start.
  void SetAbort(std::function<void(scheduler::RequestId, int index)> abort) { abort_ = std::move(abort); }
  // Called once, on the output thread, after all live calls were failed. Call before Start.
  void SetOnEngineFailure(std::function<void()> callback) { on_engine_failure_ = std::move(callback); }

  // Starts the output thread.
  void Start();
  // Processes what is in the outbox, then ends the thread. The engine must have stopped.
  void Stop();

  // Makes `sink` receive the events of request `id`.
  // Errors: ALREADY_EXISTS (a live request has this name), INTERNAL (the engine has failed).
  absl::Status Register(scheduler::RequestId id, CallSpec spec, std::shared_ptr<CallSink> sink);
  // Forgets a request that the engine did not accept. No event was sent.
  void Unregister(scheduler::RequestId id);
  // Aborts the live request of this name; returns whether there is one.
  bool CancelByName(const std::string& request_id);

  // Ends every live call with `status` and aborts it in the engine; done by the output thread, before the steps that
  // wait in the outbox. Any thread.
  void EndLiveCalls(absl::Status status);

  // scheduler::StepSink; engine thread. Waits while the outbox is full.
  void OnStep(scheduler::StepOutput output) override;
  scheduler::StepOutput Recycled() override;

  // The work of the thread, for tests that have none: one step, and one look at the writes in flight.
  void Process(scheduler::StepOutput output);
  void CutOffStalledCalls();

  int num_live() const;
  scheduler::StepStats last_stats() const;
  bool failed() const { return failed_.load(); }

 private:
  using CallPtr = std::shared_ptr<LiveCall>;

  void Run();
  CallPtr Find(scheduler::RequestId id) const;
  void Remove(const CallPtr& call);
  void HandleStarted(const scheduler::PromptDoneEvent& event);
  void HandleToken(scheduler::TokenEvent& event, scheduler::TimePoint time);
  void HandleFinish(const scheduler::FinishEvent& event);
  void EmitText(LiveCall& call, SequenceState& sequence, DeltaEvent delta, const std::string& text);
  void EmitTail(LiveCall& call, SequenceState& sequence, int index);
  void FailCall(LiveCall& call, const absl::Status& status, CallOutcome outcome);
  void CloseCall(const CallPtr& call);
  void FailAll();
  void FailLiveCalls(const absl::Status& status);
  void ObserveSequence(const scheduler::FinishEvent& event, const SequenceState& sequence);

  const OutputProcessorOptions options_;
  const Tokenizer* tokenizer_;  // owned by main
  Metrics* metrics_;            // owned by main
  const std::function<scheduler::TimePoint()> now_;
  std::function<void(scheduler::RequestId, int)> abort_ = [](scheduler::RequestId, int) {};
  std::function<void()> on_engine_failure_ = [] {};

  mutable std::mutex registry_mutex_;
  std::unordered_map<scheduler::RequestId, CallPtr> live_;
  std::unordered_map<std::string, scheduler::RequestId> names_;
  std::vector<std::weak_ptr<CallSink>> sinks_;  // open calls, also those the engine is done with
  scheduler::StepStats last_stats_;
  std::atomic<bool> failed_{false};

  std::mutex outbox_mutex_;
  std::condition_variable outbox_changed_;
  std::deque<scheduler::StepOutput> outbox_;
  absl::Status end_status_;                      // not OK: EndLiveCalls was asked for
  std::vector<scheduler::StepOutput> recycled_;  // processed; their memory is for steps to come
  bool stopping_ = false;
  std::thread thread_;

  StepObservations observations_;                     // output thread; reused
  std::vector<std::shared_ptr<CallSink>> completed_;  // in this step; told once it is counted
};

}  // namespace minitron::server
