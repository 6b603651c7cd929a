#include "scheduler/engine_core.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "scheduler/batch_builder.h"

namespace minitron::scheduler {

absl::Status EngineCoreOptions::Validate() const {
  if (max_queued_requests < 1 || max_queued_requests > 1048576) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_queued_requests ", max_queued_requests, " outside [1, 1048576]"));
  }
  return scheduler.Validate();
}

EngineCore::EngineCore(const EngineCoreOptions& options, engine::ModelRunner* runner, StepSink* sink,
                       std::function<TimePoint()> now)
    : options_(options),
      limits_(RunnerLimits::Of(*runner)),
      runner_(runner),
      sink_(sink),
      now_(std::move(now)),
      inbox_(options.max_queued_requests),
      scheduler_(options.scheduler, limits_) {
  CHECK(options.Validate().ok());
}

EngineCore::~EngineCore() { Stop(); }

absl::Status EngineCore::CheckFits(const Request& request) const {
  RETURN_IF_ERROR(scheduler::CheckFits(request, limits_));
  if (request.num_sequences > options_.max_queued_requests) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_sequences ", request.num_sequences, " exceeds the queue of ", options_.max_queued_requests));
  }
  return absl::OkStatus();
}

absl::Status EngineCore::Submit(Request request) {
  RETURN_IF_ERROR(CheckFits(request));
  return inbox_.Add(std::move(request));
}

void EngineCore::Abort(RequestId id) { inbox_.Abort({.id = id}); }

void EngineCore::AbortSequence(RequestId id, int index) {
  if (index >= 0) inbox_.Abort({.id = id, .index = index});
}

void EngineCore::Start() {
  CHECK(!thread_.joinable());
  thread_ = std::thread(&EngineCore::RunLoop, this);
}

void EngineCore::BeginDrain() { inbox_.BeginDrain(); }

bool EngineCore::WaitIdle(TimePoint deadline) { return inbox_.WaitIdle(deadline); }

void EngineCore::Stop() {
  inbox_.Close();
  if (thread_.joinable()) thread_.join();
}

void EngineCore::RunLoop() {
  while (!inbox_.closed() && !inbox_.failed()) {
    // A step without work means that no sequence is live, so no deadline can pass while this waits.
    if (!Step()) inbox_.WaitForWork();
  }
}

void EngineCore::DrainInbox(TimePoint now) {
  Inbox::Contents contents = inbox_.Take();
  for (Request& request : contents.adds) scheduler_.Add(std::move(request), now);
  for (const AbortRequest& abort : contents.aborts) {
    if (abort.index == AbortRequest::kAllSequences) {
      scheduler_.Abort(abort.id);
    } else {
      scheduler_.AbortSequence(abort.id, abort.index);
    }
  }
}

bool EngineCore::Step() {
  if (inbox_.failed()) return false;
  const TimePoint start = now_();
  DrainInbox(start);
  plan_ = scheduler_.Schedule(start);
  inbox_.ReportQueued(scheduler_.num_queued_sequences());
  if (plan_.sequences.empty() && !scheduler_.has_pending_events()) return false;

  absl::StatusOr<engine::StepResult> result = RunBatch();
  num_steps_.fetch_add(1, std::memory_order_relaxed);
  if (!result.ok()) {
    PublishFailure(result.status());
    return true;
  }
  const TimePoint end = now_();
  StepOutput output = scheduler_.Update(plan_, *result, end);
  output.stats.step_duration = end - start;
  const int num_finished = static_cast<int>(output.finished.size());
  sink_->OnStep(std::move(output));
  inbox_.ReportFinished(num_finished);
  return true;
}

absl::StatusOr<engine::StepResult> EngineCore::RunBatch() {
  if (plan_.sequences.empty()) return engine::StepResult{};  // only finish events to publish
  batch_ = BuildBatch(plan_);
  RETURN_IF_ERROR(runner_->Submit(batch_));
  return runner_->Collect();
}

void EngineCore::PublishFailure(const absl::Status& status) {
  StepOutput output;
  output.finished = scheduler_.TakePendingEvents();
  output.engine_error = status.ToString();
  output.stats.time = now_();
  inbox_.Fail();  // before the sink hears of it, so that it can rely on failed()
  sink_->OnStep(std::move(output));
}

int EngineCore::queue_depth() const { return inbox_.num_queued(); }
uint64_t EngineCore::num_steps() const { return num_steps_.load(std::memory_order_relaxed); }
bool EngineCore::idle() const { return inbox_.num_live() == 0; }
bool EngineCore::failed() const { return inbox_.failed(); }

}  // namespace minitron::scheduler
