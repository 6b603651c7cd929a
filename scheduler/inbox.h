// Inbox: what other threads want from the engine thread, and what they may know about it. Bounded adds, aborts that are
// always taken. It has the only lock of this room, held for a few instructions; no call is made while it is held, so it
// comes last in any lock order.
#pragma once

#include <condition_variable>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/request.h"

namespace minitron::scheduler {

// absl::Status payload that tells the reasons of UNAVAILABLE apart.
inline constexpr char kReasonTypeUrl[] = "minitron/reason";
inline constexpr char kReasonQueueFull[] = "QUEUE_FULL";
inline constexpr char kReasonDraining[] = "DRAINING";

struct AbortRequest {
  static constexpr int kAllSequences = -1;
  RequestId id = 0;
  int index = kAllSequences;
};

// Any thread, except where a method says "engine thread".
class Inbox {
 public:
  struct Contents {
    std::vector<Request> adds;         // in order of arrival
    std::vector<AbortRequest> aborts;  // apply after the adds
  };

  // max_queued: sequences not yet running, here and in the scheduler together.
  explicit Inbox(int max_queued) : max_queued_(max_queued) {}

  // Errors: UNAVAILABLE with the payload kReasonQueueFull (message: depth and limit) or kReasonDraining;
  // INTERNAL after Fail.
  absl::Status Add(Request request);
  void Abort(AbortRequest abort);

  void BeginDrain();
  void Close();                       // wakes the engine thread for good; refuses as BeginDrain does
  void Fail();                        // engine thread: refuses with INTERNAL; no sequence is live any more
  bool WaitIdle(TimePoint deadline);  // on the real clock; whether no sequence is live

  // Engine thread.
  Contents Take();
  void ReportQueued(int num_queued);      // sequences in the scheduler that never ran
  void ReportFinished(int num_finished);  // sequences whose FinishEvents have been delivered
  bool WaitForWork();                     // until there is something to Take; false after Close

  int num_queued() const;
  int num_live() const;
  bool closed() const;
  bool failed() const;

 private:
  bool has_contents() const { return !contents_.adds.empty() || !contents_.aborts.empty(); }

  const int max_queued_;
  mutable std::mutex mutex_;  // guards all below
  std::condition_variable work_;
  std::condition_variable idle_;
  Contents contents_;
  int num_queued_here_ = 0;       // sequences in contents_.adds
  int num_queued_scheduler_ = 0;  // sequences taken that never ran
  int num_live_ = 0;              // accepted, finish not delivered
  bool draining_ = false;
  bool closed_ = false;
  bool failed_ = false;
};

}  // namespace minitron::scheduler
