#include "server/compat/vllm_services.h"

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/compat/tokenizer_call.h"
#include "server/compat/vllm_calls.h"
#include "server/rpc_scope.h"
#include "server/services.h"

namespace minitron::server::compat {
namespace {

namespace vllm_engine = ::vllm::grpc::engine;

constexpr char kApiVersion[] = "1";  // of vllm.Inference and vllm.Control as they were in September 2026

void Describe(const ServerContext& server, ::vllm::ServerInfo& info) {
  const EngineLimits& limits = server.limits;
  info.set_engine_version(MINITRON_VERSION);
  info.set_api_version(kApiVersion);
  ::vllm::ParallelismInfo& parallelism = *info.mutable_parallelism();
  parallelism.set_tensor_parallel_size(1);
  parallelism.set_pipeline_parallel_size(1);
  parallelism.set_data_parallel_size(1);
  parallelism.set_decode_context_parallel_size(1);
  parallelism.set_world_size(1);
  parallelism.set_data_parallel_size_local(1);
  info.set_max_model_len(static_cast<uint32_t>(server.model.info.max_context_tokens));
  info.set_kv_block_size(static_cast<uint32_t>(limits.kv_block_size));
  info.set_total_kv_blocks(static_cast<uint64_t>(limits.kv_blocks));
  info.set_max_running_requests(static_cast<uint64_t>(limits.max_num_sequences));
  info.set_max_batched_tokens(static_cast<uint64_t>(limits.max_step_tokens));
}

void Describe(const ServedModel& model, vllm_engine::GetModelInfoResponse& out) {
  out.set_model_path(model.name);
  out.set_served_model_name(model.name);
  out.set_is_generation(true);
  out.set_max_context_length(static_cast<uint32_t>(model.info.max_context_tokens));
  out.set_vocab_size(static_cast<uint32_t>(model.info.vocab_size));
  out.set_model_type(model.info.architecture);
  for (const engine::TokenId id : model.info.eos_token_ids) out.add_eos_token_ids(id);
  out.set_pad_token_id(-1);
  out.set_bos_token_id(model.info.bos_token_id);
  out.set_max_req_input_len(model.info.max_context_tokens - 1);  // and one token of an answer
}

void Describe(const ServerContext& server, vllm_engine::SchedulerLoad& load) {
  const scheduler::StepStats stats = server.output->last_stats();
  const EngineLimits& limits = server.limits;
  const int num_waiting = server.queue_depth();
  load.set_num_running_reqs(stats.num_running);
  load.set_num_waiting_reqs(num_waiting);
  load.set_num_total_reqs(stats.num_running + num_waiting);
  load.set_num_used_tokens(stats.num_blocks_used * limits.kv_block_size);
  load.set_max_total_num_tokens(limits.kv_blocks * limits.kv_block_size);
  const double usage = static_cast<double>(stats.num_blocks_used) / std::max(1, limits.kv_blocks);
  load.set_token_usage(usage);
  load.set_utilization(usage);
  load.set_max_running_requests(limits.max_num_sequences);
}

template <typename Request>
absl::Status AbortAll(const Request& request, OutputProcessor& output) {
  return CancelByName(request.request_ids(), output).status();
}

}  // namespace

grpc::ServerUnaryReactor* VllmInference::Generate(grpc::CallbackServerContext* context,
                                                  const ::vllm::GenerateRequest* request,
                                                  ::vllm::GenerateResponse* response) {
  return VllmUnaryCall::Start(server_, context, *request, response);
}

grpc::ServerWriteReactor<::vllm::GenerateResponse>* VllmInference::GenerateStream(
    grpc::CallbackServerContext* context, const ::vllm::GenerateRequest* request) {
  return VllmStreamCall::Start(server_, context, *request);
}

grpc::ServerUnaryReactor* VllmControl::GetServerInfo(grpc::CallbackServerContext* context,
                                                     const ::vllm::GetServerInfoRequest*,
                                                     ::vllm::ServerInfo* response) {
  return AnswerUnary(server_, context, "GetServerInfo", Role::kAdmin, [&] {
    Describe(*server_, *response);
    response->set_instance_id(instance_id_);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* VllmControl::GetModelInfo(grpc::CallbackServerContext* context,
                                                    const ::vllm::GetModelInfoRequest*, ::vllm::ModelInfo* response) {
  return AnswerUnary(server_, context, "GetModelInfo", Role::kAdmin, [&] {
    response->set_model_id(server_->model.name);
    response->set_served_model_name(server_->model.name);
    response->set_supports_text_input(true);
    response->set_supports_token_ids_input(true);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* VllmControl::Abort(grpc::CallbackServerContext* context, const ::vllm::AbortRequest* request,
                                             ::vllm::AbortResponse*) {
  return AnswerUnary(server_, context, "Abort", Role::kAdmin, [&] { return AbortAll(*request, *server_->output); });
}

grpc::ServerWriteReactor<vllm_engine::GenerateResponse>* VllmEngine::Generate(
    grpc::CallbackServerContext* context, const vllm_engine::GenerateRequest* request) {
  return VllmEngineCall::Start(server_, context, *request);
}

grpc::ServerUnaryReactor* VllmEngine::HealthCheck(grpc::CallbackServerContext* context,
                                                  const vllm_engine::HealthCheckRequest*,
                                                  vllm_engine::HealthCheckResponse* response) {
  return AnswerUnary(server_, context, "HealthCheck", Role::kUser, [&] {
    response->set_healthy(server_->ready.load() && !server_->output->failed());
    if (!response->healthy()) response->set_message(server_->draining.load() ? "draining" : "not ready");
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* VllmEngine::Abort(grpc::CallbackServerContext* context,
                                            const vllm_engine::AbortRequest* request, vllm_engine::AbortResponse*) {
  return AnswerUnary(server_, context, "Abort", Role::kAdmin, [&] { return AbortAll(*request, *server_->output); });
}

grpc::ServerUnaryReactor* VllmEngine::GetModelInfo(grpc::CallbackServerContext* context,
                                                   const vllm_engine::GetModelInfoRequest*,
                                                   vllm_engine::GetModelInfoResponse* response) {
  return AnswerUnary(server_, context, "GetModelInfo", Role::kUser, [&] {
    Describe(server_->model, *response);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* VllmEngine::GetServerInfo(grpc::CallbackServerContext* context,
                                                    const vllm_engine::GetServerInfoRequest*,
                                                    vllm_engine::GetServerInfoResponse* response) {
  return AnswerUnary(server_, context, "GetServerInfo", Role::kAdmin, [&] {
    response->set_active_requests(static_cast<uint32_t>(server_->output->num_live()));
    response->set_uptime_seconds(std::chrono::duration<double>(server_->now() - server_->ready_since).count());
    response->set_server_type("vllm-grpc");
    response->set_data_parallel_size(1);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* VllmEngine::GetLoads(grpc::CallbackServerContext* context,
                                               const vllm_engine::GetLoadsRequest* request,
                                               vllm_engine::GetLoadsResponse* response) {
  return AnswerUnary(server_, context, "GetLoads", Role::kAdmin, [&]() -> absl::Status {
    if (request->dp_rank() != 0) {
      return FieldError("dp_rank", absl::StrCat(request->dp_rank(), " is not there, only 0 is"),
                        {{"value", absl::StrCat(request->dp_rank())}, {"limit", "0"}});
    }
    response->set_timestamp(absl::FormatTime("%Y-%m-%d%ET%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone()));
    response->set_version(MINITRON_VERSION);
    response->set_dp_rank_count(1);
    Describe(*server_, *response->add_loads());
    return absl::OkStatus();
  });
}

grpc::ServerWriteReactor<::smg::grpc::common::GetTokenizerChunk>* VllmEngine::GetTokenizer(
    grpc::CallbackServerContext* context, const ::smg::grpc::common::GetTokenizerRequest*) {
  return TokenizerCall::Start(server_, context);
}

}  // namespace minitron::server::compat
