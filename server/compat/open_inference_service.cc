#include "server/compat/open_inference_service.h"

#include "engine/base/status_macros.h"
#include "server/compat/open_inference_calls.h"
#include "server/compat/open_inference_request.h"
#include "server/rpc_scope.h"

namespace minitron::server::compat {
namespace {

constexpr char kPlatform[] = "minitron";

bool IsReady(const ServerContext& server) { return server.ready.load() && !server.output->failed(); }

absl::Status CheckModel(const std::string& name, const std::string& version, const ServedModel& model) {
  RETURN_IF_ERROR(CheckModelName(name, model));
  return CheckModelVersion(version);
}

void Describe(const TensorSpec& spec, inference::ModelMetadataResponse::TensorMetadata& out) {
  out.set_name(spec.name);
  out.set_datatype(spec.datatype);
  out.add_shape(spec.extent);
}

void Describe(const ServedModel& model, inference::ModelMetadataResponse& out) {
  out.set_name(model.name);
  out.add_versions(kModelVersion);
  out.set_platform(kPlatform);
  for (const TensorSpec& spec : InputSpecs()) Describe(spec, *out.add_inputs());
  for (const TensorSpec& spec : OutputSpecs()) Describe(spec, *out.add_outputs());
}

void Describe(const ServedModel& model, inference::ModelConfig& config) {
  config.set_name(model.name);
  config.set_platform(kPlatform);
  config.set_backend(kPlatform);
  config.mutable_model_transaction_policy()->set_decoupled(true);
  for (const TensorSpec& spec : InputSpecs()) {
    inference::ModelInput& input = *config.add_input();
    input.set_name(spec.name);
    input.set_data_type(spec.config_type);
    input.add_dims(spec.extent);
    input.set_optional(spec.optional);
  }
  for (const TensorSpec& spec : OutputSpecs()) {
    inference::ModelOutput& output = *config.add_output();
    output.set_name(spec.name);
    output.set_data_type(spec.config_type);
    output.add_dims(spec.extent);
  }
}

void Set(const Metrics::Tally& from, inference::StatisticDuration& to) {
  to.set_count(from.count);
  to.set_ns(static_cast<uint64_t>(from.seconds * 1e9));
}

// All protocols together: what /metrics counts, in this protocol's words.
void Describe(const ServedModel& model, const Metrics::Totals& totals, inference::ModelStatistics& out) {
  out.set_name(model.name);
  out.set_version(kModelVersion);
  out.set_last_inference(totals.last_end_unix_ms);
  out.set_inference_count(totals.answered.count);
  out.set_execution_count(totals.steps);
  inference::InferStatistics& stats = *out.mutable_inference_stats();
  Set(totals.answered, *stats.mutable_success());
  Set(totals.failed, *stats.mutable_fail());
  Set(totals.queue, *stats.mutable_queue());
  Set(totals.inference, *stats.mutable_compute_infer());
  // Not measured apart, so no time; but perf_analyzer ends with an error when the three do not count the same.
  stats.mutable_compute_input()->set_count(totals.inference.count);
  stats.mutable_compute_output()->set_count(totals.inference.count);
}

}  // namespace

grpc::ServerUnaryReactor* OpenInferenceService::ServerLive(grpc::CallbackServerContext* context,
                                                           const inference::ServerLiveRequest*,
                                                           inference::ServerLiveResponse* response) {
  return AnswerUnary(server_, context, "ServerLive", Role::kUser, [&] {
    response->set_live(!server_->output->failed());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* OpenInferenceService::ServerReady(grpc::CallbackServerContext* context,
                                                            const inference::ServerReadyRequest*,
                                                            inference::ServerReadyResponse* response) {
  return AnswerUnary(server_, context, "ServerReady", Role::kUser, [&] {
    response->set_ready(IsReady(*server_));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* OpenInferenceService::ModelReady(grpc::CallbackServerContext* context,
                                                           const inference::ModelReadyRequest* request,
                                                           inference::ModelReadyResponse* response) {
  return AnswerUnary(server_, context, "ModelReady", Role::kUser, [&] {
    const bool is_served = CheckModel(request->name(), request->version(), server_->model).ok();
    response->set_ready(is_served && IsReady(*server_));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* OpenInferenceService::ServerMetadata(grpc::CallbackServerContext* context,
                                                               const inference::ServerMetadataRequest*,
                                                               inference::ServerMetadataResponse* response) {
  return AnswerUnary(server_, context, "ServerMetadata", Role::kUser, [&] {
    response->set_name("minitron-server");
    response->set_version(MINITRON_VERSION);
    for (const char* extension : {"model_configuration", "parameters", "statistics"}) {
      response->add_extensions(extension);
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* OpenInferenceService::ModelMetadata(grpc::CallbackServerContext* context,
                                                              const inference::ModelMetadataRequest* request,
                                                              inference::ModelMetadataResponse* response) {
  return AnswerUnary(server_, context, "ModelMetadata", Role::kUser, [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckModel(request->name(), request->version(), server_->model));
    Describe(server_->model, *response);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* OpenInferenceService::ModelInfer(grpc::CallbackServerContext* context,
                                                           const inference::ModelInferRequest* request,
                                                           inference::ModelInferResponse* response) {
  return InferCall::Start(server_, context, *request, response);
}

grpc::ServerBidiReactor<inference::ModelInferRequest, inference::ModelStreamInferResponse>*
OpenInferenceService::ModelStreamInfer(grpc::CallbackServerContext* context) {
  return StreamInferCall::Start(server_, context);
}

grpc::ServerUnaryReactor* OpenInferenceService::ModelConfig(grpc::CallbackServerContext* context,
                                                            const inference::ModelConfigRequest* request,
                                                            inference::ModelConfigResponse* response) {
  return AnswerUnary(server_, context, "ModelConfig", Role::kUser, [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckModel(request->name(), request->version(), server_->model));
    Describe(server_->model, *response->mutable_config());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* OpenInferenceService::ModelStatistics(grpc::CallbackServerContext* context,
                                                                const inference::ModelStatisticsRequest* request,
                                                                inference::ModelStatisticsResponse* response) {
  return AnswerUnary(server_, context, "ModelStatistics", Role::kUser, [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckModel(request->name(), request->version(), server_->model));
    Describe(server_->model, server_->metrics->totals(), *response->add_model_stats());
    return absl::OkStatus();
  });
}

}  // namespace minitron::server::compat
