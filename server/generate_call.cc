#include "server/generate_call.h"

#include <algorithm>
#include <utility>

#include "engine/base/status_macros.h"
#include "server/grpc_status.h"
#include "server/limits.h"

namespace minitron::server {

GenerateCall::GenerateCall(ServerContext* server, grpc::CallbackServerContext* context)
    : server_(server), scope_(server, context, "GenerateStream") {
  server_->metrics->StreamOpened();
  server_->open_calls.Enter();
}

GenerateCall* GenerateCall::Start(ServerContext* server, grpc::CallbackServerContext* context,
                                  const v1::GenerateStreamRequest& request) {
  auto call = std::make_shared<GenerateCall>(server, context);
  call->self_ = call;
  const absl::Status status = call->Admit(request.task());
  if (!status.ok()) {
    std::lock_guard<std::mutex> lock(call->mutex_);
    if (!call->finished_) {
      call->finished_ = true;
      call->Finish(call->scope_.Close(status));
    }
  }
  return call.get();
}

absl::Status GenerateCall::Admit(const v1::GenerationTask& task) {
  absl::StatusOr<BuiltRequest> built = absl::InternalError("");
  if (absl::StatusOr<CallContext> context = scope_.Begin(); context.ok()) {
    built = BuildGenerate(task, server_->model, *context);
  } else {
    built = context.status();
  }
  if (!built.ok()) {
    CountRefusal(*server_, built.status(), scope_.tenant());
    return built.status();
  }
  answer_ = MakeAnswerOptions(*built);
  request_id_ = built->spec.request_id;
  seed_ = built->request.params.seed;
  scope_.set_request_id(request_id_);
  return server::Admit(*server_, *std::move(built), self_, id_);
}

void GenerateCall::OnStarted(StartedEvent event) {
  v1::GenerateStreamResponse message;
  *message.mutable_started() = ToProto(event, answer_, *server_->model.tokenizer);
  message.mutable_started()->set_request_id(request_id_);
  message.mutable_started()->set_model(server_->model.name);
  message.mutable_started()->set_seed(seed_);
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  queue_.push_back(std::move(message));
  Advance();
}

void GenerateCall::OnDelta(DeltaEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  v1::Delta& delta = PendingDelta(static_cast<uint32_t>(event.index));
  AppendDelta(event, answer_, *server_->model.tokenizer, delta);
  Advance();
}

v1::Delta& GenerateCall::PendingDelta(uint32_t index) {
  // Messages of different sequences may overtake each other, so any queued one of this sequence will do: after a
  // full one or at its end there is none, because fresh ones are pushed at the back and searched from there.
  for (auto message = queue_.rbegin(); message != queue_.rend(); ++message) {
    if (!message->has_delta() || message->delta().index() != index) continue;
    const v1::Delta& delta = message->delta();
    if (std::max(delta.token_ids_size(), delta.logprobs_size()) >= limits::kMaxTokensPerDelta) break;
    return *message->mutable_delta();
  }
  queue_.emplace_back().mutable_delta()->set_index(index);
  return *queue_.back().mutable_delta();
}

void GenerateCall::OnFinished(FinishedEvent event) {
  v1::GenerateStreamResponse message;
  *message.mutable_finished() = ToProto(event);
  std::lock_guard<std::mutex> lock(mutex_);
  scope_.AddUsage(event.num_prompt_tokens, event.num_output_tokens);
  if (finished_) return;
  queue_.push_back(std::move(message));
  Advance();
}

void GenerateCall::OnComplete() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!end_.has_value()) end_ = grpc::Status::OK;
  Advance();
}

void GenerateCall::OnFailed(const grpc::Status& status) {
  std::lock_guard<std::mutex> lock(mutex_);
  end_ = status;  // after what is queued: tokens that were computed are counted in the status and reach the client
  Advance();
}

void GenerateCall::Advance() {
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
    StartWriteAndFinish(&in_flight_, grpc::WriteOptions(), scope_.Close(*end_));
  } else {
    StartWrite(&in_flight_);
  }
}

void GenerateCall::FinishWith(const grpc::Status& status) {
  finished_ = true;
  queue_.clear();
  Finish(scope_.Close(status));
}

void GenerateCall::OnWriteDone(bool ok) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    if (ok || finished_) {
      Advance();
      return;
    }
    FinishWith(ToGrpcStatus(ReasonError(absl::StatusCode::kCancelled, reason::kCancelled, "the client is gone")));
  }
  server_->abort(id_.load());
}

void GenerateCall::OnCancel() {
  server_->abort(id_.load());
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  queue_.clear();
  end_ = ToGrpcStatus(ReasonError(absl::StatusCode::kCancelled, reason::kCancelled, "the client cancelled"));
  Advance();
}

bool GenerateCall::CutOffIfStalled(scheduler::TimePoint limit) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!writing_ || gone_ || cut_off_ || write_started_ > limit) return false;
    cut_off_ = true;
    if (!finished_) {
      end_ =
          ToGrpcStatus(ReasonError(absl::StatusCode::kCancelled, reason::kWriteStalled, "the client stopped reading"));
    }
    scope_.context()->TryCancel();
  }
  server_->abort(id_.load());
  return true;
}

void GenerateCall::OnDone() {
  const std::shared_ptr<GenerateCall> self = std::move(self_);
  server_->metrics->StreamClosed();
  server_->open_calls.Leave();
  std::lock_guard<std::mutex> lock(mutex_);
  gone_ = true;
}

}  // namespace minitron::server
