// TenantGate: what one tenant may use at once. Streams, queued sequences, and tokens per minute: charged in full at
// admission, so that a promise is never given twice, and refunded at the end for what was not used. Thread-safe; one
// small lock, taken a few times per call.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "scheduler/request.h"
#include "server/auth.h"

namespace minitron::server {

class TenantGate {
 public:
  // An open call; ends with its destruction.
  class Stream {
   public:
    Stream(TenantGate* gate, std::string tenant) : gate_(gate), tenant_(std::move(tenant)) {}
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

   private:
    TenantGate* gate_;
    std::string tenant_;
  };

  // An admitted request. Destroyed without Settle (the engine refused it, or failed), it is refunded in full.
  class Charge {
   public:
    Charge(TenantGate* gate, std::string tenant, int64_t num_queued, int64_t num_tokens)
        : gate_(gate), tenant_(std::move(tenant)), num_queued_(num_queued), num_tokens_(num_tokens) {}
    ~Charge();
    Charge(const Charge&) = delete;
    Charge& operator=(const Charge&) = delete;

    void OnStarted();               // it waits no longer
    void Settle(int64_t num_used);  // the call ended

   private:
    void Release(int64_t num_used);

    TenantGate* gate_;
    std::string tenant_;
    int64_t num_queued_;  // output thread, or the thread that destroys this
    int64_t num_tokens_;
    bool settled_ = false;
  };

  // `limits` is asked at every call, so that reloaded limits hold at once. `on_settled` hears of every request that
  // ended, with the tokens it used. This object must outlive what it hands out.
  TenantGate(std::function<TenantLimits(const std::string&)> limits, std::function<scheduler::TimePoint()> now,
             std::function<void(const std::string&, int64_t)> on_settled)
      : limits_(std::move(limits)), now_(std::move(now)), on_settled_(std::move(on_settled)) {}

  // Error: RESOURCE_EXHAUSTED with what there is, the limit and a retry hint.
  absl::StatusOr<std::unique_ptr<Stream>> OpenStream(const std::string& tenant);
  // Errors: RESOURCE_EXHAUSTED; without a retry hint when the request is larger than a minute's worth.
  absl::StatusOr<std::shared_ptr<Charge>> Admit(const std::string& tenant, int num_sequences, int64_t num_tokens);

  size_t num_tenants() const;  // that have something open or not refilled

 private:
  struct State {
    int64_t streams = 0;
    int64_t queued = 0;
    double spent = 0;  // tokens of the last minute that have not flowed back; the bucket's missing level
    scheduler::TimePoint updated;
  };

  void Refill(State& state, const TenantLimits& limits);
  // Adds to the state of `tenant`, and forgets it once it holds nothing.
  void Add(const std::string& tenant, int64_t streams, int64_t queued, double spent);

  const std::function<TenantLimits(const std::string&)> limits_;
  const std::function<scheduler::TimePoint()> now_;
  const std::function<void(const std::string&, int64_t)> on_settled_;
  mutable std::mutex mutex_;
  std::unordered_map<std::string, State> states_;
};

}  // namespace minitron::server
