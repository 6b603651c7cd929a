#include "server/hang_detector.h"

#include <algorithm>

namespace minitron::server {
namespace {

constexpr int kStepFactor = 10;
// One step that swapped for a minute must not switch the detector off for the rest of the day.
constexpr std::chrono::minutes kMaxGrowth{10};

}  // namespace

scheduler::Duration HangDetector::limit() const {
  return timeout_ + std::min<scheduler::Duration>(kStepFactor * longest_, kMaxGrowth);
}

bool HangDetector::Look(const Heartbeat& heartbeat, scheduler::TimePoint now) {
  const bool progressed = heartbeat.num_steps != num_steps_;
  if (progressed && had_work_) {
    // The step ended at some time after the look before this one: what is certain is that it lasted until then.
    longest_ = std::max(longest_, last_look_ - progress_);
  }
  if (progressed || !heartbeat.has_work || !had_work_) progress_ = now;
  num_steps_ = heartbeat.num_steps;
  had_work_ = heartbeat.has_work;
  last_look_ = now;
  age_ = heartbeat.has_work ? now - progress_ : scheduler::Duration{};
  return age_ > limit();
}

}  // namespace minitron::server
