#include "scheduler/engine_core.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "scheduler/batch_builder.h"

namespace minitron::scheduler {

namespace {

int MaxStepsInFlight(Overlap overlap, const engine::ModelRunner& runner) {
  if (overlap == Overlap::kAuto) return runner.submits_asynchronously() ? 2 : 1;
  return overlap == Overlap::kOn ? 2 : 1;
}

}  // namespace

absl::Status EngineCoreOptions::Validate() const {
  if (queue.max_sequences < 1 || queue.max_sequences > 1048576) {
    return absl::InvalidArgumentError(
        absl::StrCat("queue.max_sequences ", queue.max_sequences, " outside [1, 1048576]"));
  }
  if (queue.max_prompt_tokens < 1 || queue.max_bytes < 1) {
    return absl::InvalidArgumentError(absl::StrCat("queue.max_prompt_tokens ", queue.max_prompt_tokens,
                                                   " and queue.max_bytes ", queue.max_bytes, " must be at least 1"));
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
      inbox_(options.queue),
      max_steps_in_flight_(MaxStepsInFlight(options.overlap, *runner)),
      scheduler_(options.scheduler, limits_) {
  CHECK(options.Validate().ok());
}

EngineCore::~EngineCore() { Stop(); }

absl::Status EngineCore::CheckFits(const Request& request) const {
  RETURN_IF_ERROR(scheduler::CheckFits(request, limits_));
  if (request.num_sequences > options_.queue.max_sequences) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_sequences ", request.num_sequences, " exceeds the queue of ", options_.queue.max_sequences));
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
  DrainInbox(now_());
  const absl::StatusOr<bool> worked = RunStep();
  if (worked.ok() && !*worked) return false;
  num_steps_.fetch_add(1, std::memory_order_relaxed);
  if (!worked.ok()) PublishFailure(worked.status());
  return true;
}

absl::StatusOr<bool> EngineCore::RunStep() {
  while (scheduler_.wants_drain() && num_steps_in_flight_ > 0) RETURN_IF_ERROR(CollectAndPublish());
  bool submitted = true;
  while (submitted && num_steps_in_flight_ < max_steps_in_flight_ && !scheduler_.wants_drain()) {
    ASSIGN_OR_RETURN(submitted, PlanAndSubmit());
  }
  if (num_steps_in_flight_ > 0) {
    RETURN_IF_ERROR(CollectAndPublish());
  } else {
    if (!scheduler_.has_pending_events()) return false;
    Publish({}, {}, now_());  // only finish events
  }
  return true;
}

absl::StatusOr<bool> EngineCore::PlanAndSubmit() {
  StepInFlight& step = steps_[(oldest_step_ + num_steps_in_flight_) % 2];
  step.start = now_();
  step.plan = scheduler_.Schedule(step.start, std::move(step.plan));
  inbox_.ReportLeft(scheduler_.left_queue(), step.start);
  scheduler_.ClearLeftQueue();
  if (step.plan.sequences.empty()) return false;
  step.batch = BuildBatch(step.plan, std::move(step.batch));
  RETURN_IF_ERROR(runner_->Submit(step.batch));
  ++num_steps_in_flight_;
  return true;
}

absl::Status EngineCore::CollectAndPublish() {
  const StepInFlight& step = steps_[oldest_step_];
  ASSIGN_OR_RETURN(engine::StepResult result, runner_->Collect());
  oldest_step_ = (oldest_step_ + 1) % 2;
  --num_steps_in_flight_;
  Publish(step.plan, result, step.start);
  runner_->Recycle(std::move(result));
  return absl::OkStatus();
}

void EngineCore::Publish(const SchedulerOutput& plan, const engine::StepResult& result, TimePoint start) {
  const TimePoint end = now_();
  StepOutput output = scheduler_.Update(plan, result, end, sink_->Recycled());
  // Steps that overlap take turns on the device: this one's began when the one before was done.
  output.stats.step_duration = end - std::max(start, last_collected_);
  if (!plan.sequences.empty()) scheduler_.ObserveStepTime(plan, output.stats.step_duration);
  last_collected_ = end;
  const int num_finished = static_cast<int>(output.finished.size());
  sink_->OnStep(std::move(output));
  if (num_finished > 0) inbox_.ReportFinished(num_finished);
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
