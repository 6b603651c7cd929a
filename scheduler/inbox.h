// Inbox: what other threads want from the engine thread, and what they may know about it. Bounded adds, aborts that are
// always taken. It has the only lock of this room, held for a few instructions; no call is made while it is held, so it
// comes last in any lock order.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/queue_ledger.h"
#include "scheduler/request.h"
#include "scheduler/sequence.h"

namespace minitron::scheduler {

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

  // The limits are for what never ran, here and in the scheduler together.
  explicit Inbox(const QueueLimits& limits) : ledger_(limits) {}

  // Errors: those of QueueLedger::Check; UNAVAILABLE with the reason kReasonDraining; INTERNAL after Fail.
  absl::Status Add(Request request);
  // Whether Add would take it now. Errors as Add.
  absl::Status Check(const Arrival& arrival) const;
  void Abort(AbortRequest abort);

  void BeginDrain();
  void Close();                       // wakes the engine thread for good; refuses as BeginDrain does
  void Fail();                        // engine thread: refuses with INTERNAL; no sequence is live any more
  bool WaitIdle(TimePoint deadline);  // on the real clock; whether no sequence is live

  // Engine thread.
  Contents Take();
  // Once per step: what was started for the first time, or ended without (ever_scheduled() tells), and the time.
  void ReportLeft(const std::vector<std::shared_ptr<Sequence>>& left, TimePoint now);
  void ReportFinished(int num_finished);  // sequences whose FinishEvents have been delivered
  bool WaitForWork();                     // until there is something to Take; false after Close

  int num_queued() const;
  int num_live() const;
  bool closed() const;
  bool failed() const;

 private:
  bool has_contents() const { return !contents_.adds.empty() || !contents_.aborts.empty(); }

  absl::Status CheckLocked(const Arrival& arrival) const;

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable work_;
  std::condition_variable idle_;
  Contents contents_;
  QueueLedger ledger_;  // of what never ran
  int num_live_ = 0;    // accepted, finish not delivered
  bool draining_ = false;
  bool closed_ = false;
  bool failed_ = false;
};

}  // namespace minitron::scheduler
