#include "server/services.h"

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/generate_call.h"
#include "server/grpc_status.h"
#include "server/limits.h"
#include "server/unary_calls.h"

namespace minitron::server {
namespace {

void Describe(const ServedModel& model, v1::Model& out) {
  const engine::ModelInfo& info = model.info;
  out.set_name(model.name);
  out.set_architecture(info.architecture);
  out.set_parameter_count(static_cast<uint64_t>(info.num_parameters));
  out.set_weight_type(info.weight_type);
  out.set_max_context_tokens(static_cast<uint32_t>(info.max_context_tokens));
  out.set_vocab_size(static_cast<uint32_t>(info.vocab_size));
  for (const engine::TokenId id : info.eos_token_ids) out.add_eos_token_ids(static_cast<uint32_t>(id));
  out.set_bos_token_id(static_cast<uint32_t>(info.bos_token_id));
  *out.mutable_default_sampling() = DefaultSampling(model);
  out.set_default_max_tokens(static_cast<uint32_t>(model.default_max_tokens));
  out.set_default_add_bos(model.default_add_bos);
  v1::ModelShape& shape = *out.mutable_shape();
  shape.set_hidden_size(static_cast<uint32_t>(info.hidden_size));
  shape.set_num_layers(static_cast<uint32_t>(info.num_layers));
  shape.set_num_attention_heads(static_cast<uint32_t>(info.num_attention_heads));
  shape.set_num_key_value_heads(static_cast<uint32_t>(info.num_key_value_heads));
  shape.set_head_dim(static_cast<uint32_t>(info.head_dim));
  shape.set_intermediate_size(static_cast<uint32_t>(info.intermediate_size));
}

absl::Status FillTokens(const v1::TokenizeRequest& request, const ServedModel& model, v1::TokenizeResponse& response) {
  ASSIGN_OR_RETURN(const std::vector<engine::TokenId> ids, BuildTokenize(request, model));
  for (const engine::TokenId id : ids) {
    response.add_token_ids(static_cast<uint32_t>(id));
    response.add_token_bytes(model.tokenizer->TokenBytes(id, /*skip_special=*/false));
  }
  return absl::OkStatus();
}

absl::Status FillText(const v1::DetokenizeRequest& request, const ServedModel& model,
                      v1::DetokenizeResponse& response) {
  ASSIGN_OR_RETURN(*response.mutable_text(), BuildDetokenize(request, model));
  return absl::OkStatus();
}

void FillInfo(const ServerContext& server, v1::GetServerInfoResponse& response) {
  const EngineLimits& limits = server.limits;
  response.set_version(MINITRON_VERSION);
  response.set_backend(server.model.info.backend);
  response.set_model(server.model.name);
  response.set_kv_block_size(static_cast<uint32_t>(limits.kv_block_size));
  response.set_kv_blocks(static_cast<uint32_t>(limits.kv_blocks));
  response.set_max_running_sequences(static_cast<uint32_t>(limits.max_num_sequences));
  response.set_max_step_tokens(static_cast<uint32_t>(limits.max_step_tokens));
  response.set_max_queued_requests(static_cast<uint32_t>(limits.max_queued_requests));
  response.set_max_context_tokens(static_cast<uint32_t>(server.model.info.max_context_tokens));
  const auto up = std::chrono::duration_cast<std::chrono::milliseconds>(server.now() - server.ready_since).count();
  response.mutable_uptime()->set_seconds(up / 1000);
  response.mutable_uptime()->set_nanos(static_cast<int32_t>(up % 1000 * 1000000));
}

void FillLoad(const ServerContext& server, v1::GetLoadResponse& response) {
  const scheduler::StepStats stats = server.output->last_stats();
  response.set_running_sequences(static_cast<uint32_t>(stats.num_running));
  response.set_waiting_sequences(static_cast<uint32_t>(server.queue_depth()));
  response.set_kv_blocks_used(static_cast<uint32_t>(stats.num_blocks_used));
  response.set_kv_blocks(static_cast<uint32_t>(server.limits.kv_blocks));
  response.set_draining(server.draining.load());
  response.set_active_calls(static_cast<uint32_t>(server.output->num_live()));
}

}  // namespace

absl::StatusOr<uint32_t> CancelByName(const google::protobuf::RepeatedPtrField<std::string>& request_ids,
                                      OutputProcessor& output) {
  const int count = request_ids.size();
  if (count > limits::kMaxCancelIds) {
    return FieldError("request_ids", absl::StrCat(count, " names, at most ", limits::kMaxCancelIds),
                      {{"actual", absl::StrCat(count)}, {"limit", absl::StrCat(limits::kMaxCancelIds)}});
  }
  uint32_t cancelled = 0;
  for (const std::string& request_id : request_ids) cancelled += output.CancelByName(request_id);
  return cancelled;
}

grpc::ServerWriteReactor<v1::GenerateStreamResponse>* GenerationService::GenerateStream(
    grpc::CallbackServerContext* context, const v1::GenerateStreamRequest* request) {
  return GenerateCall::Start(server_, context, *request);
}

grpc::ServerUnaryReactor* GenerationService::Generate(grpc::CallbackServerContext* context,
                                                      const v1::GenerateRequest* request,
                                                      v1::GenerateResponse* response) {
  return GenerateUnaryCall::Start(server_, context, *request, response);
}

grpc::ServerUnaryReactor* GenerationService::Score(grpc::CallbackServerContext* context,
                                                   const v1::ScoreRequest* request, v1::ScoreResponse* response) {
  return ScoreCall::Start(server_, context, *request, response);
}

grpc::ServerUnaryReactor* GenerationService::Tokenize(grpc::CallbackServerContext* context,
                                                      const v1::TokenizeRequest* request,
                                                      v1::TokenizeResponse* response) {
  return AnswerUnary(server_, context, "Tokenize", Role::kUser,
                     [&] { return FillTokens(*request, server_->model, *response); });
}

grpc::ServerUnaryReactor* GenerationService::Detokenize(grpc::CallbackServerContext* context,
                                                        const v1::DetokenizeRequest* request,
                                                        v1::DetokenizeResponse* response) {
  return AnswerUnary(server_, context, "Detokenize", Role::kUser,
                     [&] { return FillText(*request, server_->model, *response); });
}

grpc::ServerUnaryReactor* ModelService::ListModels(grpc::CallbackServerContext* context, const v1::ListModelsRequest*,
                                                   v1::ListModelsResponse* response) {
  return AnswerUnary(server_, context, "ListModels", Role::kUser, [&] {
    Describe(server_->model, *response->add_models());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ModelService::GetModel(grpc::CallbackServerContext* context,
                                                 const v1::GetModelRequest* request, v1::GetModelResponse* response) {
  return AnswerUnary(server_, context, "GetModel", Role::kUser, [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckModelName(request->name(), server_->model));
    Describe(server_->model, *response->mutable_model());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* AdminService::GetServerInfo(grpc::CallbackServerContext* context,
                                                      const v1::GetServerInfoRequest*,
                                                      v1::GetServerInfoResponse* response) {
  return AnswerUnary(server_, context, "GetServerInfo", Role::kAdmin, [&] {
    FillInfo(*server_, *response);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* AdminService::GetLoad(grpc::CallbackServerContext* context, const v1::GetLoadRequest*,
                                                v1::GetLoadResponse* response) {
  return AnswerUnary(server_, context, "GetLoad", Role::kAdmin, [&] {
    FillLoad(*server_, *response);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* AdminService::CancelRequests(grpc::CallbackServerContext* context,
                                                       const v1::CancelRequestsRequest* request,
                                                       v1::CancelRequestsResponse* response) {
  return AnswerUnary(server_, context, "CancelRequests", Role::kAdmin, [&]() -> absl::Status {
    ASSIGN_OR_RETURN(const uint32_t cancelled, CancelByName(request->request_ids(), *server_->output));
    response->set_cancelled(cancelled);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* AdminService::Drain(grpc::CallbackServerContext* context, const v1::DrainRequest*,
                                              v1::DrainResponse*) {
  return AnswerUnary(server_, context, "Drain", Role::kAdmin, [&] {
    server_->begin_drain();
    return absl::OkStatus();
  });
}

}  // namespace minitron::server
