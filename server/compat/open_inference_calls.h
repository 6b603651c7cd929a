// The two inference calls of the Open Inference Protocol. Threads as in generate_call.h.
#pragma once

#include <compat/open_inference.grpc.pb.h>

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <set>

#include "server/admission.h"
#include "server/compat/open_inference_answer.h"
#include "server/rpc_scope.h"
#include "server/unary_calls.h"

namespace minitron::server::compat {

// ModelInfer: collects and answers once, also when the request says "stream".
class InferCall final : public UnaryEngineCall {
 public:
  static grpc::ServerUnaryReactor* Start(ServerContext* server, grpc::CallbackServerContext* context,
                                         const inference::ModelInferRequest& request,
                                         inference::ModelInferResponse* response);
  InferCall(ServerContext* server, grpc::CallbackServerContext* context, inference::ModelInferResponse* response);

  void OnStarted(StartedEvent event) override;
  void OnDelta(DeltaEvent event) override;
  void OnFinished(FinishedEvent event) override;

 protected:
  void OnAdmitting(const BuiltRequest& built) override;
  void Complete() override;

 private:
  inference::ModelInferResponse* response_;  // owned by gRPC, valid until Finish
  InferOptions options_;
  std::optional<InferAnswer> answer_;
};

// ModelStreamInfer: many requests on one stream, each with its own events. A request that fails ends alone, with an
// error message on the stream; with the header triton_grpc_error its status ends the stream. What a slow reader has not
// taken yet is gathered per request, so memory is bounded by the requests, and no request is read while too many wait.
class StreamInferCall final
    : public grpc::ServerBidiReactor<inference::ModelInferRequest, inference::ModelStreamInferResponse> {
 public:
  static StreamInferCall* Start(ServerContext* server, grpc::CallbackServerContext* context);
  StreamInferCall(ServerContext* server, grpc::CallbackServerContext* context);  // use Start

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  class Entry;  // one request: the sink of its events
  using EntryPtr = std::shared_ptr<Entry>;

  absl::Status Admit(const inference::ModelInferRequest& request, const EntryPtr& entry);
  void Fail(const EntryPtr& entry, const grpc::Status& status);
  bool CutOffIfStalled(scheduler::TimePoint limit);

  // With mutex_ held:
  void Enqueue(const EntryPtr& entry);
  void Advance();                  // starts what can be started: a write, a read, the end
  bool FillMessage(Entry& entry);  // whether it is the request's last message
  std::vector<scheduler::RequestId> TakeLiveIds();

  ServerContext* server_;  // owned by main
  RpcScope scope_;
  bool errors_end_the_stream_;
  std::shared_ptr<StreamInferCall> self_;

  std::mutex mutex_;
  inference::ModelInferRequest incoming_;
  inference::ModelStreamInferResponse in_flight_;
  std::set<EntryPtr> open_;     // requests whose last message is not written yet
  std::deque<EntryPtr> ready_;  // those with something to send, in turn
  EntryPtr writing_;
  int num_prompt_tokens_ = 0;  // of all requests that ended
  bool reading_ = false;
  bool reads_done_ = false;
  bool finished_ = false;
  bool gone_ = false;
  bool cut_off_ = false;
  scheduler::TimePoint write_started_;
  std::optional<grpc::Status> end_;  // ends the stream at once
};

}  // namespace minitron::server::compat
