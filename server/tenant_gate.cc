#include "server/tenant_gate.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "server/grpc_status.h"

namespace minitron::server {
namespace {

// A place in a queue or a stream frees up at the pace of answers; only the bucket knows when.
constexpr int kPlaceRetryMs = 500;
constexpr int kMaxRetryMs = 60'000;

absl::Status OverQuota(const std::string& what, int64_t actual, int64_t limit, std::optional<int> retry_ms) {
  absl::Status status = ReasonError(absl::StatusCode::kResourceExhausted, reason::kQuotaExceeded,
                                    absl::StrCat("the tenant's limit: ", what, " ", actual, " of ", limit),
                                    {{"actual", absl::StrCat(actual)}, {"limit", absl::StrCat(limit)}});
  SetField(status, what);
  if (retry_ms.has_value()) SetRetryDelayMs(status, *retry_ms);
  return status;
}

}  // namespace

TenantGate::Stream::~Stream() { gate_->Add(tenant_, -1, 0, 0); }

TenantGate::Charge::~Charge() {
  if (!settled_) Release(0);
}

void TenantGate::Charge::OnStarted() {
  if (num_queued_ > 0) gate_->Add(tenant_, 0, -num_queued_, 0);
  num_queued_ = 0;
}

void TenantGate::Charge::Settle(int64_t num_used) {
  settled_ = true;
  Release(num_used);
  gate_->on_settled_(tenant_, num_used);
}

void TenantGate::Charge::Release(int64_t num_used) {
  const int64_t refund = std::max<int64_t>(num_tokens_ - num_used, 0);
  if (num_queued_ > 0 || refund > 0) gate_->Add(tenant_, 0, -num_queued_, -static_cast<double>(refund));
}

absl::StatusOr<std::unique_ptr<TenantGate::Stream>> TenantGate::OpenStream(const std::string& tenant) {
  const int64_t limit = limits_(tenant).max_streams;
  std::lock_guard<std::mutex> lock(mutex_);
  State& state = states_[tenant];
  if (limit > 0 && state.streams >= limit) return OverQuota("streams", state.streams, limit, kPlaceRetryMs);
  ++state.streams;
  return std::make_unique<Stream>(this, tenant);
}

absl::StatusOr<std::shared_ptr<TenantGate::Charge>> TenantGate::Admit(const std::string& tenant, int num_sequences,
                                                                      int64_t num_tokens) {
  const TenantLimits limits = limits_(tenant);
  std::lock_guard<std::mutex> lock(mutex_);
  State& state = states_[tenant];
  Refill(state, limits);
  if (limits.max_queued > 0 && state.queued + num_sequences > limits.max_queued) {
    return OverQuota("queued", state.queued + num_sequences, limits.max_queued, kPlaceRetryMs);
  }
  const int64_t per_minute = limits.tokens_per_minute;
  if (per_minute > 0 && num_tokens > per_minute) {
    return OverQuota("tokens_per_minute", num_tokens, per_minute, std::nullopt);
  }
  if (per_minute > 0 && state.spent + static_cast<double>(num_tokens) > static_cast<double>(per_minute)) {
    const double excess = state.spent + static_cast<double>(num_tokens) - static_cast<double>(per_minute);
    const int wait_ms = static_cast<int>(std::ceil(excess * 60'000 / static_cast<double>(per_minute)));
    return OverQuota("tokens_per_minute", static_cast<int64_t>(state.spent) + num_tokens, per_minute,
                     std::clamp(wait_ms, 1, kMaxRetryMs));
  }
  state.queued += num_sequences;
  const int64_t charged = per_minute > 0 ? num_tokens : 0;
  state.spent += static_cast<double>(charged);
  return std::make_shared<Charge>(this, tenant, num_sequences, charged);
}

void TenantGate::Refill(State& state, const TenantLimits& limits) {
  const scheduler::TimePoint now = now_();
  const double minutes = std::chrono::duration<double>(now - state.updated).count() / 60;
  state.updated = now;
  state.spent = std::max(0.0, state.spent - minutes * static_cast<double>(limits.tokens_per_minute));
  if (limits.tokens_per_minute == 0) state.spent = 0;
}

void TenantGate::Add(const std::string& tenant, int64_t streams, int64_t queued, double spent) {
  const TenantLimits limits = limits_(tenant);
  std::lock_guard<std::mutex> lock(mutex_);
  State& state = states_[tenant];
  Refill(state, limits);
  state.streams += streams;
  state.queued += queued;
  state.spent = std::max(0.0, state.spent + spent);
  if (state.streams == 0 && state.queued == 0 && state.spent == 0) states_.erase(tenant);
}

size_t TenantGate::num_tenants() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return states_.size();
}

}  // namespace minitron::server
