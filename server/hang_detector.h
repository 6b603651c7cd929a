// HangDetector: tells a hung engine from a busy one by its heartbeat. A machine without a clock or a thread: the
// watchdog shows it one sample after the other.
//
// An engine with work finishes steps; one without work says so before it waits. So the age that counts is the time
// since the last step finished while there was work all along. A long step is no hang: the limit grows with the longest
// step seen, so that a slow model, or a long prefill, is never restarted for being slow.
#pragma once

#include <cstdint>

#include "scheduler/request.h"

namespace minitron::server {

struct Heartbeat {
  uint64_t num_steps = 0;
  bool has_work = false;
};

class HangDetector {
 public:
  // `timeout`: the age that no step of a healthy engine reaches, beyond ten times the longest step. `longest_step`:
  // what is known of that before the first look.
  HangDetector(scheduler::Duration timeout, scheduler::Duration longest_step)
      : timeout_(timeout), longest_(longest_step) {}

  // Returns whether the engine is hung. Call often against `timeout`, with times that do not go back.
  bool Look(const Heartbeat& heartbeat, scheduler::TimePoint now);

  scheduler::Duration age() const { return age_; }
  scheduler::Duration limit() const;

 private:
  const scheduler::Duration timeout_;
  scheduler::Duration longest_;
  scheduler::Duration age_{};
  bool had_work_ = false;
  uint64_t num_steps_ = 0;
  scheduler::TimePoint progress_;  // when the last step was seen finished, or work seen to begin
  scheduler::TimePoint last_look_;
};

}  // namespace minitron::server
