// Scheduler, its pace: how much of a step prompts get while others decode, and which requests come too late.
#include <algorithm>

#include "scheduler/scheduler.h"

namespace minitron::scheduler {
void Scheduler::ObserveStepTime(const SchedulerOutput& plan, Duration duration) {
  step_time_model_.Observe(plan.shape, Seconds(duration));
}

double Scheduler::StepTarget(const Sequence& sequence) const {
  const bool leaves_room = expects_light_tenant_ && !waiting_.IsBehindOthers(sequence);
  return Seconds(options_.itl_target) * (leaves_room ? options_.itl_shared_step : 1.0);
}

bool Scheduler::HasRoomForPrompts(double target_s, const SchedulerOutput& plan) const {
  if (target_s == 0 || plan.num_decodes == 0) return true;
  if (plan.num_tokens == plan.num_decodes) return true;  // the first prompt rows of a step are always granted
  if (!step_time_model_.is_trained()) return false;
  constexpr int kRows = SchedulerOptions::kMinChunk;
  return step_time_model_.MaxRows(plan.shape, 0, kRows, target_s) == kRows;
}

bool Scheduler::HasRoomForNewSequences(const SchedulerOutput& plan) const {
  if (options_.itl_target == Duration::zero() || plan.num_decodes == 0 || !step_time_model_.is_trained()) return true;
  return plan.decode_seconds <= options_.itl_decode_share * Seconds(options_.itl_target);
}

int Scheduler::PacedRows(const Sequence& sequence, int num_tokens, const SchedulerOutput& plan) const {
  if (num_tokens <= 0 || options_.itl_target == Duration::zero() || plan.num_decodes == 0) return num_tokens;
  const double target_s = StepTarget(sequence);
  if (!HasRoomForPrompts(target_s, plan)) return 0;
  int num_rows = 0;
  if (step_time_model_.is_trained()) {
    num_rows = step_time_model_.MaxRows(plan.shape, sequence.num_planned_tokens(), num_tokens, target_s);
  }
  return std::min(num_tokens, std::max(num_rows, SchedulerOptions::kMinChunk));
}

bool Scheduler::FirstTokenIsLate(const Sequence& sequence, TimePoint now) const {
  if (sequence.request().first_token_deadline > now || sequence.num_output_tokens() > 0) return false;
  return !requests_.at(sequence.id()).prompt_done;
}

bool Scheduler::CannotMakeIt(const Sequence& sequence, const SchedulerOutput& plan, TimePoint now) const {
  const Request& request = sequence.request();
  const TimePoint first_token_by = std::min(request.deadline, request.first_token_deadline);
  if (first_token_by == TimePoint::max() || !step_time_model_.is_trained()) return false;
  // All of a request or none of it.
  if (std::find(given_up_.begin(), given_up_.end(), request.id) != given_up_.end()) return true;
  // Once a sequence of the request runs, its first token is on its way.
  const auto& siblings = requests_.at(request.id).sequences;
  if (std::any_of(siblings.begin(), siblings.end(), [](const auto& s) { return s->ever_scheduled(); })) return false;
  // All its rows once, and what else this step does once per chunk.
  const int num_rows = std::max(1, ChunkLength(sequence, plan));
  const int num_steps = (sequence.num_tokens() + num_rows - 1) / num_rows;
  StepShape all = plan.shape;
  all.Add(0, sequence.num_tokens());
  const double seconds =
      step_time_model_.PredictSeconds(all) + (num_steps - 1) * step_time_model_.PredictSeconds(plan.shape);
  return std::chrono::duration<double>(seconds) > first_token_by - now;
}

}  // namespace minitron::scheduler
