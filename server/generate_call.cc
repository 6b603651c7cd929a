#include "server/generate_call.h"

#include <algorithm>
#include <utility>

#include "server/limits.h"

namespace minitron::server {

GenerateCall::GenerateCall(ServerContext* server, grpc::CallbackServerContext* context)
    : StreamCall(server, context, "GenerateStream") {}

GenerateCall* GenerateCall::Start(ServerContext* server, grpc::CallbackServerContext* context,
                                  const v1::GenerateStreamRequest& request) {
  auto call = std::make_shared<GenerateCall>(server, context);
  call->Run([&](const CallContext& caller) { return BuildGenerate(request.task(), server->model, caller); }, call);
  return call.get();
}

void GenerateCall::OnAdmitting(const BuiltRequest& built) {
  answer_ = MakeAnswerOptions(built);
  request_id_ = built.spec.request_id;
  seed_ = built.request.params.seed;
}

void GenerateCall::OnStarted(StartedEvent event) {
  v1::GenerateStreamResponse message;
  *message.mutable_started() = ToProto(event, answer_, *server().model.tokenizer);
  message.mutable_started()->set_request_id(request_id_);
  message.mutable_started()->set_model(server().model.name);
  message.mutable_started()->set_seed(seed_);
  std::lock_guard<std::mutex> lock(mutex_);
  Push(std::move(message));
}

void GenerateCall::OnDelta(DeltaEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  AppendDelta(event, answer_, *server().model.tokenizer, PendingDelta(static_cast<uint32_t>(event.index)));
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
  scope().AddUsage(event.num_prompt_tokens, event.num_output_tokens);
  Push(std::move(message));
}

}  // namespace minitron::server
