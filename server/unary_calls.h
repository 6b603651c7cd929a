// GenerateUnaryCall and ScoreCall: the RPCs that collect an answer and send it once. Threads as in generate_call.h.
#pragma once

#include <minitron/v1/generation.grpc.pb.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>

#include "server/admission.h"
#include "server/call_sink.h"
#include "server/proto_convert.h"
#include "server/rpc_scope.h"

namespace minitron::server {

// The half both share: admission, cancellation, Finish exactly once, life until OnDone.
class UnaryEngineCall : public grpc::ServerUnaryReactor, public CallSink {
 public:
  UnaryEngineCall(ServerContext* server, grpc::CallbackServerContext* context, const char* method);

  // Builds the request for a caller that may call, and admits it; or ends the call. `self` keeps this object alive
  // until OnDone.
  void Run(const std::function<absl::StatusOr<BuiltRequest>(const CallContext&)>& build,
           std::shared_ptr<UnaryEngineCall> self);

  void OnComplete() override;
  void OnFailed(const grpc::Status& status) override;
  bool CutOffIfStalled(scheduler::TimePoint) override { return false; }  // nothing is written before the end
  void OnCancel() override;
  void OnDone() override;

 protected:
  // Fills in what the response says of the request; before any event.
  virtual void OnAdmitting(const BuiltRequest& built) = 0;
  // The answer is complete: the last chance to fill in the response. With mutex_ held.
  virtual void Complete() {}
  ServerContext* server() const { return server_; }
  RpcScope& scope() { return scope_; }  // under mutex_
  const Tokenizer& tokenizer() const { return *server_->model.tokenizer; }

  std::mutex mutex_;       // guards the response and finished_
  bool finished_ = false;  // Finish was called: the response is gRPC's

 private:
  ServerContext* server_;  // owned by main
  RpcScope scope_;
  std::shared_ptr<UnaryEngineCall> self_;
  std::atomic<scheduler::RequestId> id_{0};
};

class GenerateUnaryCall final : public UnaryEngineCall {
 public:
  static grpc::ServerUnaryReactor* Start(ServerContext* server, grpc::CallbackServerContext* context,
                                         const v1::GenerateRequest& request, v1::GenerateResponse* response);
  GenerateUnaryCall(ServerContext* server, grpc::CallbackServerContext* context, v1::GenerateResponse* response);

  void OnStarted(StartedEvent event) override;
  void OnDelta(DeltaEvent event) override;
  void OnFinished(FinishedEvent event) override;

 protected:
  void OnAdmitting(const BuiltRequest& built) override;

 private:
  v1::GenerateResponse* response_;  // owned by gRPC, valid until Finish
  AnswerOptions answer_;
  std::string request_id_;
  uint64_t seed_ = 0;
};

class ScoreCall final : public UnaryEngineCall {
 public:
  static grpc::ServerUnaryReactor* Start(ServerContext* server, grpc::CallbackServerContext* context,
                                         const v1::ScoreRequest& request, v1::ScoreResponse* response);
  ScoreCall(ServerContext* server, grpc::CallbackServerContext* context, v1::ScoreResponse* response);

  void OnStarted(StartedEvent event) override;
  void OnDelta(DeltaEvent) override {}
  void OnFinished(FinishedEvent event) override;

 protected:
  void OnAdmitting(const BuiltRequest& built) override;

 private:
  v1::ScoreResponse* response_;  // owned by gRPC, valid until Finish
  bool has_context_ = false;
};

}  // namespace minitron::server
