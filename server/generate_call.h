// GenerateCall: one GenerateStream RPC. gRPC calls it from its threads, the output thread sends it events; a small
// mutex and two flags keep the rules of the reactor: one write in flight, Finish exactly once, nothing after Finish.
#pragma once

#include <minitron/v1/generation.grpc.pb.h>

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>

#include "server/admission.h"
#include "server/call_sink.h"
#include "server/proto_convert.h"
#include "server/rpc_scope.h"

namespace minitron::server {

class GenerateCall final : public grpc::ServerWriteReactor<v1::GenerateStreamResponse>, public CallSink {
 public:
  // Checks and admits the call. The reactor keeps itself alive until OnDone.
  static GenerateCall* Start(ServerContext* server, grpc::CallbackServerContext* context,
                             const v1::GenerateStreamRequest& request);

  GenerateCall(ServerContext* server, grpc::CallbackServerContext* context);  // use Start

  // CallSink; output thread.
  void OnStarted(StartedEvent event) override;
  void OnDelta(DeltaEvent event) override;
  void OnFinished(FinishedEvent event) override;
  void OnComplete() override;
  void OnFailed(const grpc::Status& status) override;
  bool CutOffIfStalled(scheduler::TimePoint limit) override;

  // ServerWriteReactor; gRPC threads.
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  absl::Status Admit(const v1::GenerationTask& task);
  // The message new tokens of sequence `index` belong to: the queued one, or a new one.
  v1::Delta& PendingDelta(uint32_t index);
  // Starts what can be started: the next write, the last write together with the end, or the end alone.
  void Advance();
  void FinishWith(const grpc::Status& status);

  ServerContext* server_;  // owned by main
  RpcScope scope_;
  std::shared_ptr<GenerateCall> self_;
  std::atomic<scheduler::RequestId> id_{0};
  AnswerOptions answer_;
  std::string request_id_;
  uint64_t seed_ = 0;

  std::mutex mutex_;  // guards what follows; Start..., Finish and TryCancel never call back on the same stack
  std::deque<v1::GenerateStreamResponse> queue_;
  v1::GenerateStreamResponse in_flight_;
  bool writing_ = false;
  bool finished_ = false;  // Finish was called
  bool gone_ = false;      // OnDone was called: the context is dead
  bool cut_off_ = false;
  scheduler::TimePoint write_started_;
  std::optional<grpc::Status> end_;  // the status to finish with, once the queue is empty
};

}  // namespace minitron::server
