// A server on port 0 whose engine is a script: every call path is real but the model. The test decides when steps run.
#pragma once

#include <grpcpp/grpcpp.h>
#include <minitron/v1/admin.grpc.pb.h>
#include <minitron/v1/generation.grpc.pb.h>
#include <minitron/v1/model.grpc.pb.h>

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "server/grpc_server.h"
#include "server/metrics.h"
#include "server/output_processor.h"
#include "server/tokenizer.h"

namespace minitron::server {

// Produces script[position] for every sequence (one token per step), and all events the real engine would.
class ScriptedEngine {
 public:
  explicit ScriptedEngine(std::function<scheduler::TimePoint()> now) : now_(std::move(now)) {}

  absl::Status CheckAdmission(const scheduler::Arrival&) { return early_refusal; }
  absl::Status Submit(scheduler::Request request);
  void Abort(scheduler::RequestId id, int index);
  // One step over all live requests, handed to `output` on this thread. Returns whether there was work.
  bool Step(OutputProcessor& output);
  void WaitForRequests(int count);  // ever submitted
  void WaitForAborts(int count);
  bool WaitForWork();  // false once stopped
  void Stop();
  int num_live();

  std::vector<TokenId> script;     // repeated when shorter than the answer
  absl::Status refusal;            // returned by Submit unless OK
  absl::Status early_refusal;      // returned by CheckAdmission
  std::string engine_error;        // reported by the next step
  bool fail_next_request = false;  // kError in the next step

 private:
  struct Live {
    scheduler::Request request;
    std::vector<int> num_tokens;
    std::vector<bool> finished;
    std::vector<bool> aborted;
    bool started = false;
  };
  void StepOne(Live& live, scheduler::StepOutput& output);
  void StepSequence(Live& live, int index, scheduler::StepOutput& output);
  void Finish(Live& live, int index, scheduler::FinishReason reason, TokenId token, scheduler::StepOutput& output);

  std::function<scheduler::TimePoint()> now_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<scheduler::RequestId, Live> live_;
  int num_submitted_ = 0;
  int num_aborts_ = 0;
  bool stopped_ = false;
};

// Who may call; by default everybody may, in plaintext.
struct HarnessOptions {
  std::shared_ptr<const AuthTable> auth;
  TlsStore* tls = nullptr;
  AuditLog* audit = nullptr;
  GrpcServerOptions grpc;
};

class ServerHarness {
 public:
  explicit ServerHarness(const HarnessOptions& options = {});
  ~ServerHarness();

  // Runs steps on a thread of its own from now on.
  void RunEngine();
  void Step(int count = 1);
  std::vector<TokenId> Encode(const std::string& text) const { return tokenizer->Encode(text, {}); }
  // A channel of its own, with a small flow-control window that does not grow.
  std::shared_ptr<grpc::Channel> Connect();
  std::string MetricsText();

  std::unique_ptr<Tokenizer> tokenizer;
  std::atomic<int64_t> clock_ms{1000};  // the server's clock
  ServerContext context;
  std::unique_ptr<Metrics> metrics;
  std::unique_ptr<OperatorMetrics> operator_metrics;
  std::unique_ptr<AuthStore> auth;
  std::unique_ptr<TenantGate> tenants;
  std::unique_ptr<OutputProcessor> output;
  std::unique_ptr<ScriptedEngine> engine;
  std::unique_ptr<GrpcServer> server;
  std::unique_ptr<v1::GenerationService::Stub> generation;
  std::unique_ptr<v1::ModelService::Stub> model;
  std::unique_ptr<v1::AdminService::Stub> admin;
  std::atomic<int> num_drain_requests{0};
  std::atomic<int> num_engine_failures{0};

 private:
  std::thread runner_;
};

}  // namespace minitron::server
