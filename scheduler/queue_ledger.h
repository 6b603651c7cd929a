// QueueLedger: what is queued, whose it is, and whether one more request may join. Behind the inbox's lock.
//
// Three bounds: sequences, prompt tokens, bytes. While more than one tenant is about, a tenant may fill at most its
// equal part of each, so a flood is refused and the others still get in.
//
// Wait estimate. While work waits, the ledger measures at which rate sequences and prompt tokens are started. The least
// a request has to wait is what its own tenant has queued at its priority or above, at that rate: other tenants and
// higher classes can only make it longer. So a refusal for a deadline is right whenever the rate holds, and what is
// wrongly accepted leaves the queue when it expires, at no cost to others.
//
// Deterministic: times are arguments. Not synchronized.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <string>

#include "absl/status/status.h"
#include "scheduler/request.h"

namespace minitron::scheduler {

// Payloads of a refusal: why (one of the reasons), when to come back, and facts for the client.
inline constexpr char kReasonTypeUrl[] = "minitron/reason";
inline constexpr char kRetryTypeUrl[] = "minitron/retry-ms";
inline constexpr char kQueueDepthTypeUrl[] = "minitron/metadata/queue_depth";  // sequences
inline constexpr char kEstimatedWaitTypeUrl[] = "minitron/metadata/estimated_wait_ms";
inline constexpr char kReasonQueueFull[] = "QUEUE_FULL";
inline constexpr char kReasonQueuedTokensFull[] = "QUEUED_TOKENS_FULL";
inline constexpr char kReasonQueuedBytesFull[] = "QUEUED_BYTES_FULL";
inline constexpr char kReasonDeadlineUnreachable[] = "DEADLINE_UNREACHABLE";
inline constexpr char kReasonDraining[] = "DRAINING";

// Work that never ran.
struct QueuedWork {
  int64_t num_sequences = 0;
  int64_t num_prompt_tokens = 0;  // a prompt counts once, with sequence 0
  int64_t num_bytes = 0;          // host memory, about

  QueuedWork& operator+=(const QueuedWork& other);
  QueuedWork& operator-=(const QueuedWork& other);
};
QueuedWork WorkOf(const Request& request, int index);
QueuedWork WorkOf(const Request& request);

struct QueueLimits {
  int64_t max_sequences = 256;
  int64_t max_prompt_tokens = int64_t{256} << 10;  // 64 prompts of 4 k
  int64_t max_bytes = int64_t{64} << 20;
};

// A request at the door. Before its text is tokenized `work` is a lower bound.
struct Arrival {
  std::string tenant;
  int priority = 0;
  QueuedWork work;
  TimePoint arrival;
  TimePoint start_by = TimePoint::max();  // deadline, or the first token's
};
Arrival ArrivalOf(const Request& request);

class QueueLedger {
 public:
  // Tenants without queued work count as being about for this long, the latest kMaxIdleTenants of them.
  static constexpr std::chrono::seconds kTenantMemory{60};
  static constexpr size_t kMaxIdleTenants = 256;

  explicit QueueLedger(const QueueLimits& limits) : limits_(limits) {}

  // Whether the request may be queued. O(log tenants).
  // Errors: UNAVAILABLE with reason, retry time and queue depth: a bound is reached (reasons ..._FULL, message with
  // depth and limit) or the wait is too long (DEADLINE_UNREACHABLE); DEADLINE_EXCEEDED if start_by has passed.
  // What is larger than a token or byte bound by itself may still join when nothing (of its tenant) is queued.
  absl::Status Check(const Arrival& arrival) const;

  void Enter(const Request& request);
  // A sequence was started for the first time, or ended without.
  void Leave(const Request& request, int index, bool started);
  // After each step: the rates have a clock.
  void Tick(TimePoint now);

  const QueuedWork& queued() const { return total_; }
  // Least time to start what is queued before a new request of this tenant; zero while the rate is unknown.
  Duration EstimateWait(const std::string& tenant, int priority) const;
  // Zero while unknown.
  double sequences_per_second() const;
  double prompt_tokens_per_second() const;
  int num_tenants() const { return static_cast<int>(tenants_.size()); }

 private:
  struct Tenant {
    std::map<int, QueuedWork> by_priority;  // non-empty ones
    QueuedWork total;
    TimePoint last_arrival;
    std::list<std::string>::iterator idle_place;  // valid while total has no sequences
  };

  absl::Status CheckBound(const char* reason, const char* unit, int64_t QueuedWork::*amount, int64_t limit,
                          const Tenant* tenant, const Arrival& arrival) const;
  Duration TimeFor(const QueuedWork& work) const;
  void ForgetIdle(TimePoint now);
  bool IsAbout(const Tenant& tenant, TimePoint now) const;

  const QueueLimits limits_;
  QueuedWork total_;
  std::map<std::string, Tenant> tenants_;
  std::list<std::string> idle_;  // tenants without queued work, longest idle first

  // Fading sums over the time in which work waited.
  double started_sequences_ = 0;
  double started_tokens_ = 0;
  double span_s_ = 0;
  QueuedWork started_since_tick_;
  bool waited_at_tick_ = false;
  TimePoint last_tick_;
};

}  // namespace minitron::scheduler
