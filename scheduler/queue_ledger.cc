#include "scheduler/queue_ledger.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "scheduler/sequence.h"

namespace minitron::scheduler {
namespace {

// Rates forget with this time constant, and mean nothing before that much waiting was seen.
constexpr double kRateMemory = 5.0;  // seconds
constexpr double kMinSpan = 0.25;    // seconds

constexpr auto kDefaultRetry = std::chrono::milliseconds(500);  // while the rate is unknown
constexpr auto kMinRetry = std::chrono::milliseconds(50);
constexpr auto kMaxRetry = std::chrono::seconds(60);

int64_t Milliseconds(Duration duration) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(duration).count();
}

}  // namespace

QueuedWork& QueuedWork::operator+=(const QueuedWork& other) {
  num_sequences += other.num_sequences;
  num_prompt_tokens += other.num_prompt_tokens;
  num_bytes += other.num_bytes;
  return *this;
}

QueuedWork& QueuedWork::operator-=(const QueuedWork& other) {
  num_sequences -= other.num_sequences;
  num_prompt_tokens -= other.num_prompt_tokens;
  num_bytes -= other.num_bytes;
  return *this;
}

QueuedWork WorkOf(const Request& request, int index) {
  const auto num_prompt = static_cast<int64_t>(request.prompt_token_ids.size());
  // Every sequence has its tokens, with room for all it may generate; the request itself counts with the first.
  QueuedWork work{.num_sequences = 1,
                  .num_bytes = static_cast<int64_t>(sizeof(Sequence) + sizeof(TokenId) * request.max_tokens) +
                               static_cast<int64_t>(sizeof(TokenId)) * num_prompt};
  if (index > 0) return work;
  work.num_prompt_tokens = num_prompt;
  work.num_bytes += static_cast<int64_t>(
      sizeof(Request) + sizeof(TokenId) * (request.eos_token_ids.size() + request.stop_token_ids.size()) +
      sizeof(request.params.logit_bias[0]) * request.params.logit_bias.size() + request.tenant.size() +
      request.cache_salt.size());
  work.num_bytes += static_cast<int64_t>(sizeof(TokenId)) * num_prompt;
  return work;
}

QueuedWork WorkOf(const Request& request) {
  QueuedWork work = WorkOf(request, 0);
  const QueuedWork other = WorkOf(request, 1);
  work.num_sequences = request.num_sequences;
  work.num_bytes += other.num_bytes * (request.num_sequences - 1);
  return work;
}

Arrival ArrivalOf(const Request& request) {
  return {.tenant = request.tenant,
          .priority = request.priority,
          .work = WorkOf(request),
          .arrival = request.arrival,
          .start_by = std::min(request.deadline, request.first_token_deadline)};
}

bool QueueLedger::IsAbout(const Tenant& tenant, TimePoint now) const {
  return tenant.total.num_sequences > 0 || now - tenant.last_arrival < kTenantMemory;
}

absl::Status QueueLedger::CheckBound(const char* reason, const char* unit, int64_t QueuedWork::*amount, int64_t limit,
                                     const Tenant* tenant, const Arrival& arrival) const {
  // Idle tenants leave the map with the next arrival that is accepted; until then one more may be counted.
  const auto num_tenants = static_cast<int64_t>(tenants_.size()) + (tenant == nullptr ? 1 : 0);
  const int64_t share = std::max<int64_t>(1, limit / std::max<int64_t>(1, num_tenants));
  const int64_t wanted = arrival.work.*amount;
  const int64_t queued = total_.*amount;
  const int64_t own = tenant == nullptr ? 0 : tenant->total.*amount;
  const bool is_full = queued > 0 && queued + wanted > limit;
  const bool is_over_share = own > 0 && own + wanted > share;
  if (!is_full && !is_over_share) return absl::OkStatus();
  std::string message = absl::StrCat("queue full: ", queued, " ", unit, " queued, limit ", limit);
  if (!is_full)
    message = absl::StrCat("queue share full: ", own, " ", unit, " queued by this tenant, its part is ", share, " of ",
                           limit);
  absl::Status status = absl::UnavailableError(absl::StrCat(message, ", ", wanted, " more asked for"));
  QueuedWork excess;
  excess.*amount = is_full ? queued + wanted - limit : own + wanted - share;
  const Duration wait = span_s_ < kMinSpan ? Duration(kDefaultRetry) : TimeFor(excess);
  status.SetPayload(kReasonTypeUrl, absl::Cord(reason));
  status.SetPayload(kRetryTypeUrl,
                    absl::Cord(absl::StrCat(Milliseconds(std::clamp<Duration>(wait, kMinRetry, kMaxRetry)))));
  status.SetPayload(kQueueDepthTypeUrl, absl::Cord(absl::StrCat(total_.num_sequences)));
  return status;
}

absl::Status QueueLedger::Check(const Arrival& arrival) const {
  if (arrival.start_by <= arrival.arrival) {
    return absl::DeadlineExceededError("the deadline had passed when the request arrived");
  }
  const auto found = tenants_.find(arrival.tenant);
  const Tenant* const tenant = found == tenants_.end() ? nullptr : &found->second;
  RETURN_IF_ERROR(
      CheckBound(kReasonQueueFull, "sequences", &QueuedWork::num_sequences, limits_.max_sequences, tenant, arrival));
  RETURN_IF_ERROR(CheckBound(kReasonQueuedTokensFull, "prompt tokens", &QueuedWork::num_prompt_tokens,
                             limits_.max_prompt_tokens, tenant, arrival));
  RETURN_IF_ERROR(
      CheckBound(kReasonQueuedBytesFull, "bytes", &QueuedWork::num_bytes, limits_.max_bytes, tenant, arrival));
  const Duration wait = EstimateWait(arrival.tenant, arrival.priority);
  const Duration time = arrival.start_by - arrival.arrival;
  if (wait <= time) return absl::OkStatus();
  absl::Status status =
      absl::UnavailableError(absl::StrCat("the deadline cannot be met: about ", Milliseconds(wait), " ms to wait, ",
                                          Milliseconds(time), " ms left, ", total_.num_sequences, " sequences queued"));
  status.SetPayload(kReasonTypeUrl, absl::Cord(kReasonDeadlineUnreachable));
  status.SetPayload(kRetryTypeUrl,
                    absl::Cord(absl::StrCat(Milliseconds(std::clamp<Duration>(wait - time, kMinRetry, kMaxRetry)))));
  status.SetPayload(kQueueDepthTypeUrl, absl::Cord(absl::StrCat(total_.num_sequences)));
  status.SetPayload(kEstimatedWaitTypeUrl, absl::Cord(absl::StrCat(Milliseconds(wait))));
  return status;
}

void QueueLedger::Enter(const Request& request) {
  const auto [it, inserted] = tenants_.try_emplace(request.tenant);
  Tenant& tenant = it->second;
  if (!inserted && tenant.total.num_sequences == 0) idle_.erase(tenant.idle_place);
  const QueuedWork work = WorkOf(request);
  tenant.total += work;
  tenant.by_priority[request.priority] += work;
  tenant.last_arrival = std::max(tenant.last_arrival, request.arrival);
  total_ += work;
  ForgetIdle(request.arrival);
}

void QueueLedger::Leave(const Request& request, int index, bool started) {
  const QueuedWork work = WorkOf(request, index);
  Tenant& tenant = tenants_.at(request.tenant);
  const auto level = tenant.by_priority.find(request.priority);
  CHECK(level != tenant.by_priority.end());
  level->second -= work;
  tenant.total -= work;
  total_ -= work;
  CHECK(level->second.num_sequences >= 0);
  if (level->second.num_sequences == 0) tenant.by_priority.erase(level);
  if (tenant.total.num_sequences == 0) {
    tenant.idle_place = idle_.insert(idle_.end(), request.tenant);
  }
  if (started) started_since_tick_ += work;
}

void QueueLedger::ForgetIdle(TimePoint now) {
  while (!idle_.empty()) {
    const auto tenant = tenants_.find(idle_.front());
    CHECK(tenant != tenants_.end());
    if (IsAbout(tenant->second, now) && idle_.size() <= kMaxIdleTenants) return;
    tenants_.erase(tenant);
    idle_.pop_front();
  }
}

void QueueLedger::Tick(TimePoint now) {
  if (waited_at_tick_ && now > last_tick_) {
    const double elapsed = std::chrono::duration<double>(now - last_tick_).count();
    const double keep = std::exp(-elapsed / kRateMemory);
    started_sequences_ = keep * started_sequences_ + static_cast<double>(started_since_tick_.num_sequences);
    started_tokens_ = keep * started_tokens_ + static_cast<double>(started_since_tick_.num_prompt_tokens);
    span_s_ = keep * span_s_ + elapsed;
  }
  // What starts without having had to wait says nothing about the rate under load.
  waited_at_tick_ = total_.num_sequences > 0;
  started_since_tick_ = {};
  last_tick_ = now;
}

double QueueLedger::sequences_per_second() const { return span_s_ < kMinSpan ? 0 : started_sequences_ / span_s_; }
double QueueLedger::prompt_tokens_per_second() const { return span_s_ < kMinSpan ? 0 : started_tokens_ / span_s_; }

Duration QueueLedger::TimeFor(const QueuedWork& work) const {
  // Half a sequence more than was seen keeps the estimate finite, and on the low side. The smaller of the two rules:
  // either may be the one that does not bind.
  const double by_sequences = static_cast<double>(work.num_sequences) * span_s_ / (started_sequences_ + 0.5);
  const double by_tokens = static_cast<double>(work.num_prompt_tokens) * span_s_ / (started_tokens_ + 0.5);
  const double seconds = work.num_sequences == 0       ? by_tokens
                         : work.num_prompt_tokens == 0 ? by_sequences
                                                       : std::min(by_sequences, by_tokens);
  const double most = std::chrono::duration<double>(kMaxRetry).count() * 60;
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(std::min(seconds, most)));
}

Duration QueueLedger::EstimateWait(const std::string& tenant, int priority) const {
  const auto found = tenants_.find(tenant);
  if (span_s_ < kMinSpan || found == tenants_.end()) return Duration::zero();
  QueuedWork ahead;
  const auto& by_priority = found->second.by_priority;
  for (auto level = by_priority.lower_bound(priority); level != by_priority.end(); ++level) ahead += level->second;
  return ahead.num_sequences == 0 ? Duration::zero() : TimeFor(ahead);
}

}  // namespace minitron::scheduler
