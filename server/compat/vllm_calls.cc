#include "server/compat/vllm_calls.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/compat/vllm_answer.h"
#include "server/limits.h"

namespace minitron::server::compat {
namespace {

namespace vllm_engine = ::vllm::grpc::engine;

absl::StatusOr<BuiltRequest> Build(const ::vllm::GenerateRequest& request, ServerContext& server,
                                   const CallContext& caller, VllmOptions& options) {
  ASSIGN_OR_RETURN(const VllmTask task, ReadVllmRequest(request, server.names.FreshName()));
  options = task.options;
  return BuildGenerate(task.task, server.model, caller);
}

}  // namespace

VllmUnaryCall::VllmUnaryCall(ServerContext* server, grpc::CallbackServerContext* context,
                             ::vllm::GenerateResponse* response)
    : UnaryEngineCall(server, context, "Generate"), response_(response) {}

grpc::ServerUnaryReactor* VllmUnaryCall::Start(ServerContext* server, grpc::CallbackServerContext* context,
                                               const ::vllm::GenerateRequest& request,
                                               ::vllm::GenerateResponse* response) {
  auto call = std::make_shared<VllmUnaryCall>(server, context, response);
  VllmOptions& options = call->options_;
  call->Run(
      [&](const CallContext& caller) -> absl::StatusOr<BuiltRequest> {
        if (const uint32_t count = request.sampling().num_sequences(); count > 1) {
          return FieldError("sampling.num_sequences",
                            absl::StrCat(count, ", but the answer has room for 1; GenerateStream takes more"),
                            {{"value", absl::StrCat(count)}, {"limit", "1"}});
        }
        return Build(request, *server, caller, options);
      },
      call);
  return call.get();
}

void VllmUnaryCall::OnAdmitting(const BuiltRequest& built) {
  if (options_.prompt_token_ids) prompt_ = built.request.prompt_token_ids;
  response_->mutable_outputs();
}

void VllmUnaryCall::OnStarted(StartedEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!finished_) *response_->mutable_prompt_info() = ToPromptInfo(event, options_, prompt_);
}

void VllmUnaryCall::OnDelta(DeltaEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!finished_) Append(event, options_, *response_->mutable_outputs());
}

void VllmUnaryCall::OnFinished(FinishedEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  scope().AddUsage(event.num_prompt_tokens, event.num_output_tokens);
  *response_->mutable_outputs()->mutable_finish_info() = ToFinishInfo(event);
}

VllmStreamCall::VllmStreamCall(ServerContext* server, grpc::CallbackServerContext* context)
    : StreamCall(server, context, "GenerateStream") {}

VllmStreamCall* VllmStreamCall::Start(ServerContext* server, grpc::CallbackServerContext* context,
                                      const ::vllm::GenerateRequest& request) {
  auto call = std::make_shared<VllmStreamCall>(server, context);
  VllmOptions& options = call->options_;
  call->Run([&](const CallContext& caller) { return Build(request, *server, caller, options); }, call);
  return call.get();
}

void VllmStreamCall::OnAdmitting(const BuiltRequest& built) {
  if (options_.prompt_token_ids) prompt_ = built.request.prompt_token_ids;
}

void VllmStreamCall::OnStarted(StartedEvent event) {
  ::vllm::GenerateResponse message;
  *message.mutable_prompt_info() = ToPromptInfo(event, options_, prompt_);
  std::lock_guard<std::mutex> lock(mutex_);
  Push(std::move(message));
}

void VllmStreamCall::OnDelta(DeltaEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  Append(event, options_, PendingOutput(event.index));
  Advance();
}

void VllmStreamCall::OnFinished(FinishedEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  scope().AddUsage(event.num_prompt_tokens, event.num_output_tokens);
  if (finished_) return;
  *PendingOutput(event.index).mutable_finish_info() = ToFinishInfo(event);
  Advance();
}

::vllm::SequenceOutput& VllmStreamCall::PendingOutput(int index) {
  for (auto message = queue_.rbegin(); message != queue_.rend(); ++message) {
    if (!message->has_outputs() || message->outputs().index() != static_cast<uint32_t>(index)) continue;
    if (message->outputs().num_tokens() >= limits::kMaxTokensPerDelta) break;
    return *message->mutable_outputs();
  }
  ::vllm::SequenceOutput& output = *queue_.emplace_back().mutable_outputs();
  output.set_index(static_cast<uint32_t>(index));
  return output;
}

VllmEngineCall::VllmEngineCall(ServerContext* server, grpc::CallbackServerContext* context, bool stream)
    : StreamCall(server, context, "Generate"), stream_(stream) {}

VllmEngineCall* VllmEngineCall::Start(ServerContext* server, grpc::CallbackServerContext* context,
                                      const vllm_engine::GenerateRequest& request) {
  auto call = std::make_shared<VllmEngineCall>(server, context, request.stream());
  call->has_logprobs_ = request.sampling_params().has_logprobs();
  call->has_prompt_logprobs_ = request.sampling_params().has_prompt_logprobs();
  call->Run(
      [&](const CallContext& caller) -> absl::StatusOr<BuiltRequest> {
        ASSIGN_OR_RETURN(const v1::GenerationTask task,
                         ReadEngineRequest(request, server->model.info.max_context_tokens));
        return BuildGenerate(task, server->model, caller);
      },
      call);
  return call.get();
}

void VllmEngineCall::OnAdmitting(const BuiltRequest& built) {
  if (has_prompt_logprobs_) prompt_ = built.request.prompt_token_ids;
  sequences_.resize(static_cast<size_t>(built.spec.num_sequences));
}

void VllmEngineCall::OnStarted(StartedEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (has_prompt_logprobs_) input_logprobs_ = ToInputLogProbs(event, prompt_);
  event.prompt_logprobs.clear();
  started_ = std::move(event);
}

void VllmEngineCall::OnDelta(DeltaEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finished_ || !event.token.has_value()) return;  // text alone is the gateway's business
  Sequence& sequence = sequences_[static_cast<size_t>(event.index)];
  sequence.token_ids.push_back(static_cast<uint32_t>(event.token->token_id));
  if (has_logprobs_) Append(*event.token, sequence.logprobs);
  if (!stream_) return;
  vllm_engine::GenerateStreamChunk& chunk = PendingChunk(event.index);
  chunk.add_token_ids(sequence.token_ids.back());
  chunk.set_completion_tokens(static_cast<uint32_t>(sequence.token_ids.size()));
  if (has_logprobs_) Append(*event.token, *chunk.mutable_output_logprobs());
  Advance();
}

vllm_engine::GenerateStreamChunk& VllmEngineCall::PendingChunk(int index) {
  for (auto message = queue_.rbegin(); message != queue_.rend(); ++message) {
    if (!message->has_chunk() || message->chunk().index() != static_cast<uint32_t>(index)) continue;
    if (message->chunk().token_ids_size() >= limits::kMaxTokensPerDelta) break;
    return *message->mutable_chunk();
  }
  vllm_engine::GenerateStreamChunk& chunk = *queue_.emplace_back().mutable_chunk();
  chunk.set_index(static_cast<uint32_t>(index));
  chunk.set_prompt_tokens(static_cast<uint32_t>(started_.num_prompt_tokens));
  chunk.set_cached_tokens(static_cast<uint32_t>(started_.num_cached_tokens));
  if (has_prompt_logprobs_ && !has_sent_input_logprobs_) *chunk.mutable_input_logprobs() = input_logprobs_;
  has_sent_input_logprobs_ = true;
  return chunk;
}

void VllmEngineCall::OnFinished(FinishedEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  scope().AddUsage(event.num_prompt_tokens, event.num_output_tokens);
  Sequence& sequence = sequences_[static_cast<size_t>(event.index)];
  vllm_engine::GenerateResponse message;
  vllm_engine::GenerateComplete& complete = *message.mutable_complete();
  Describe(event, complete);
  complete.mutable_output_ids()->Add(sequence.token_ids.begin(), sequence.token_ids.end());
  if (has_logprobs_) complete.mutable_output_logprobs()->Swap(&sequence.logprobs);
  if (has_prompt_logprobs_) *complete.mutable_input_logprobs() = input_logprobs_;
  Push(std::move(message));
}

}  // namespace minitron::server::compat
