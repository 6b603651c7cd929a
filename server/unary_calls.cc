#include "server/unary_calls.h"

#include <utility>

#include "server/grpc_status.h"

namespace minitron::server {

UnaryEngineCall::UnaryEngineCall(ServerContext* server, grpc::CallbackServerContext* context, const char* method)
    : server_(server), scope_(server, context, method) {
  server_->metrics->StreamOpened();
  server_->open_calls.Enter();
}

void UnaryEngineCall::Run(const std::function<absl::StatusOr<BuiltRequest>(const CallContext&)>& build,
                          std::shared_ptr<UnaryEngineCall> self) {
  self_ = std::move(self);
  const absl::StatusOr<CallContext> context = scope_.Begin();
  absl::StatusOr<BuiltRequest> built = context.ok() ? build(*context) : context.status();
  absl::Status status = built.status();
  if (status.ok()) {
    scope_.set_request_id(built->spec.request_id);
    OnAdmitting(*built);
    status = Admit(*server_, *std::move(built), self_, id_);
  } else {
    CountRefusal(*server_, status, scope_.tenant());
  }
  if (status.ok()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  finished_ = true;
  Finish(scope_.Close(status));
}

void UnaryEngineCall::OnComplete() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  Complete();
  finished_ = true;
  Finish(scope_.Close(grpc::Status::OK));
}

void UnaryEngineCall::OnFailed(const grpc::Status& status) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  finished_ = true;
  Finish(scope_.Close(status));
}

void UnaryEngineCall::OnCancel() {
  server_->abort(id_.load());
  OnFailed(ToGrpcStatus(ReasonError(absl::StatusCode::kCancelled, reason::kCancelled, "the client cancelled")));
}

void UnaryEngineCall::OnDone() {
  const std::shared_ptr<UnaryEngineCall> self = std::move(self_);
  server_->metrics->StreamClosed();
  server_->open_calls.Leave();
}

GenerateUnaryCall::GenerateUnaryCall(ServerContext* server, grpc::CallbackServerContext* context,
                                     v1::GenerateResponse* response)
    : UnaryEngineCall(server, context, "Generate"), response_(response) {}

grpc::ServerUnaryReactor* GenerateUnaryCall::Start(ServerContext* server, grpc::CallbackServerContext* context,
                                                   const v1::GenerateRequest& request, v1::GenerateResponse* response) {
  auto call = std::make_shared<GenerateUnaryCall>(server, context, response);
  call->Run([&](const CallContext& caller) { return BuildGenerate(request.task(), server->model, caller); }, call);
  return call.get();
}

void GenerateUnaryCall::OnAdmitting(const BuiltRequest& built) {
  answer_ = MakeAnswerOptions(built);
  request_id_ = built.spec.request_id;
  seed_ = built.request.params.seed;
  for (int i = 0; i < built.spec.num_sequences; ++i) response_->add_sequences()->set_index(static_cast<uint32_t>(i));
}

void GenerateUnaryCall::OnStarted(StartedEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  *response_->mutable_started() = ToProto(event, answer_, tokenizer());
  response_->mutable_started()->set_request_id(request_id_);
  response_->mutable_started()->set_model(server()->model.name);
  response_->mutable_started()->set_seed(seed_);
}

void GenerateUnaryCall::OnDelta(DeltaEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  AppendDelta(event, answer_, tokenizer(), *response_->mutable_sequences(event.index));
}

void GenerateUnaryCall::OnFinished(FinishedEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  scope().AddUsage(event.num_prompt_tokens, event.num_output_tokens);
  *response_->mutable_sequences(event.index)->mutable_finished() = ToProto(event);
}

ScoreCall::ScoreCall(ServerContext* server, grpc::CallbackServerContext* context, v1::ScoreResponse* response)
    : UnaryEngineCall(server, context, "Score"), response_(response) {}

grpc::ServerUnaryReactor* ScoreCall::Start(ServerContext* server, grpc::CallbackServerContext* context,
                                           const v1::ScoreRequest& request, v1::ScoreResponse* response) {
  auto call = std::make_shared<ScoreCall>(server, context, response);
  call->Run([&](const CallContext& caller) { return BuildScore(request, server->model, caller); }, call);
  return call.get();
}

void ScoreCall::OnAdmitting(const BuiltRequest& built) {
  has_context_ = built.num_context_tokens > 0;
  response_->set_request_id(built.spec.request_id);
  response_->set_model(server()->model.name);
}

void ScoreCall::OnStarted(StartedEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  if (!has_context_) response_->add_positions();  // the first token: nothing predicts it
  double total = 0;
  bool is_greedy = true;
  for (const engine::ResultRowOutput& row : event.prompt_logprobs) {
    ToProto(row, tokenizer(), *response_->add_positions());
    total += row.chosen.logprob;
    is_greedy = is_greedy && row.chosen.rank == 1;
  }
  response_->set_total_logprob(total);
  response_->set_is_greedy(is_greedy);
}

void ScoreCall::OnFinished(FinishedEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  scope().AddUsage(event.num_prompt_tokens, event.num_output_tokens);
  *response_->mutable_usage() = ToProto(event).usage();
}

}  // namespace minitron::server
