// StreamCall: one RPC that answers a request with a stream of messages, in any protocol. gRPC calls it from its
// threads, the output thread sends it events; a small mutex and two flags keep the rules of the reactor: one write in
// flight, Finish exactly once, nothing after Finish.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "server/admission.h"
#include "server/call_sink.h"
#include "server/grpc_status.h"
#include "server/rpc_scope.h"

namespace minitron::server {

// A protocol derives from it, turns events into messages and pushes them. It keeps itself alive until OnDone.
template <typename Response>
class StreamCall : public grpc::ServerWriteReactor<Response>, public CallSink {
 public:
  using Builder = std::function<absl::StatusOr<BuiltRequest>(const CallContext&)>;

  StreamCall(ServerContext* server, grpc::CallbackServerContext* context, const char* method)
      : server_(server), scope_(server, context, method) {
    server_->metrics->StreamOpened();
    server_->open_calls.Enter();
  }

  // Builds the request for a caller that may call, and admits it; or ends the call. `self` keeps this object alive.
  void Run(const Builder& build, std::shared_ptr<StreamCall> self) {
    self_ = std::move(self);
    const absl::Status status = BuildAndAdmit(build);
    if (status.ok()) return;
    std::lock_guard<std::mutex> lock(mutex_);
    if (!finished_) FinishWith(status);
  }

  // CallSink; output thread.
  void OnComplete() override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!end_.has_value()) end_ = grpc::Status::OK;
    Advance();
  }
  void OnFailed(const grpc::Status& status) override {
    std::lock_guard<std::mutex> lock(mutex_);
    end_ = status;  // after what is queued: tokens that were computed are counted in the status and reach the client
    Advance();
  }
  bool CutOffIfStalled(scheduler::TimePoint limit) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!writing_ || gone_ || cut_off_ || write_started_ > limit) return false;
      cut_off_ = true;
      if (!finished_) end_ = Cancelled(reason::kWriteStalled, "the client stopped reading");
      scope_.context()->TryCancel();
    }
    server_->abort(id_.load());
    return true;
  }

  // ServerWriteReactor; gRPC threads.
  void OnWriteDone(bool ok) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      writing_ = false;
      if (ok || finished_) {
        Advance();
        return;
      }
      FinishWith(Cancelled(reason::kCancelled, "the client is gone"));
    }
    server_->abort(id_.load());
  }
  void OnCancel() override {
    server_->abort(id_.load());
    std::lock_guard<std::mutex> lock(mutex_);
    if (finished_) return;
    queue_.clear();
    end_ = Cancelled(reason::kCancelled, "the client cancelled");
    Advance();
  }
  void OnDone() override {
    const std::shared_ptr<StreamCall> self = std::move(self_);
    server_->metrics->StreamClosed();
    server_->open_calls.Leave();
    std::lock_guard<std::mutex> lock(mutex_);
    gone_ = true;
  }

 protected:
  // Takes what the messages say of the request; before any event.
  virtual void OnAdmitting(const BuiltRequest& built) = 0;

  // With mutex_ held. A call that ended takes no message any more.
  void Push(Response message) {
    if (finished_) return;
    queue_.push_back(std::move(message));
    Advance();
  }
  // Starts what can be started: the next write, the last write together with the end, or the end alone.
  void Advance() {
    if (writing_ || finished_) return;
    if (queue_.empty()) {
      if (end_.has_value()) FinishWith(*end_);
      return;
    }
    in_flight_ = std::move(queue_.front());
    queue_.pop_front();
    writing_ = true;
    write_started_ = server_->now();
    if (queue_.empty() && end_.has_value()) {
      finished_ = true;
      this->StartWriteAndFinish(&in_flight_, grpc::WriteOptions(), scope_.Close(*end_));
    } else {
      this->StartWrite(&in_flight_);
    }
  }
  ServerContext& server() const { return *server_; }
  RpcScope& scope() { return scope_; }

  std::mutex mutex_;  // guards what follows; Start..., Finish and TryCancel never call back on the same stack
  std::deque<Response> queue_;
  bool finished_ = false;  // Finish was called

 private:
  static grpc::Status Cancelled(const char* why, const char* message) {
    return ToGrpcStatus(ReasonError(absl::StatusCode::kCancelled, why, message));
  }

  absl::Status BuildAndAdmit(const Builder& build) {
    const absl::StatusOr<CallContext> context = scope_.Begin();
    absl::StatusOr<BuiltRequest> built = context.ok() ? build(*context) : context.status();
    if (!built.ok()) {
      CountRefusal(*server_, built.status(), scope_.tenant());
      return built.status();
    }
    scope_.set_request_id(built->spec.request_id);
    OnAdmitting(*built);
    return Admit(*server_, *std::move(built), self_, id_);
  }

  template <typename Status>
  void FinishWith(const Status& status) {
    finished_ = true;
    queue_.clear();
    this->Finish(scope_.Close(status));
  }

  ServerContext* server_;  // owned by main
  RpcScope scope_;
  std::shared_ptr<StreamCall> self_;
  std::atomic<scheduler::RequestId> id_{0};
  Response in_flight_;
  bool writing_ = false;
  bool gone_ = false;  // OnDone was called: the context is dead
  bool cut_off_ = false;
  scheduler::TimePoint write_started_;
  std::optional<grpc::Status> end_;  // the status to finish with, once the queue is empty
};

}  // namespace minitron::server
