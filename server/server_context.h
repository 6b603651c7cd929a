// ServerContext: what every call handler borrows. Built in main, outlives the gRPC server. Members are thread-safe.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "scheduler/request.h"
#include "server/audit_log.h"
#include "server/auth.h"
#include "server/compat/tokenizer_bundle.h"
#include "server/metrics.h"
#include "server/operator_metrics.h"
#include "server/output_processor.h"
#include "server/request_builder.h"
#include "server/tenant_gate.h"

namespace minitron::server {

// Numbers, names and seeds for requests that bring none.
class RequestNames {
 public:
  RequestNames();  // draws its base from the operating system
  scheduler::RequestId NextId() { return next_id_.fetch_add(1); }
  uint64_t FreshSeed();
  std::string FreshName();

 private:
  uint64_t base_;
  std::atomic<uint64_t> next_id_{1};
  std::atomic<uint64_t> num_drawn_{0};
};

// The calls that may still send something. Any thread.
class OpenCalls {
 public:
  void Enter();
  void Leave();
  // Waits until there is none, or `timeout` has passed.
  void WaitForNone(std::chrono::milliseconds timeout);

 private:
  std::mutex mutex_;
  std::condition_variable none_;
  int num_open_ = 0;
};

// Limits of the running engine, for AdminService.
struct EngineLimits {
  int kv_block_size = 0;
  int kv_blocks = 0;
  int max_num_sequences = 0;
  int max_step_tokens = 0;
  int max_queued_requests = 0;
};

struct ServerContext {
  ServedModel model;
  EngineLimits limits;
  Metrics* metrics = nullptr;                   // owned by main
  OutputProcessor* output = nullptr;            // owned by main
  OperatorMetrics* operator_metrics = nullptr;  // these may be null; owned by Serving
  const AuthStore* auth = nullptr;              // null: everybody may call everything
  TenantGate* tenants = nullptr;
  AuditLog* audit = nullptr;
  // What gateways get of the tokenizer, or why they get nothing.
  absl::StatusOr<compat::TokenizerBundle> tokenizer_bundle = absl::FailedPreconditionError("no model was loaded");
  // The engine's doors; see EngineCore::Submit, CheckAdmission and Abort.
  std::function<absl::Status(scheduler::Request)> submit;
  std::function<absl::Status(const scheduler::Arrival&)> check_admission;
  std::function<void(scheduler::RequestId)> abort;
  std::function<int()> queue_depth;
  std::function<scheduler::TimePoint()> now;
  std::function<void()> begin_drain;  // AdminService.Drain; returns at once
  std::atomic<bool> ready{false};     // what health says; false from the start of a drain
  std::atomic<bool> draining{false};  // new requests are refused
  scheduler::Duration max_request_timeout = std::chrono::minutes(10);
  scheduler::TimePoint ready_since;
  RequestNames names;
  OpenCalls open_calls;
};

}  // namespace minitron::server
