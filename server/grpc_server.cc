#include "server/grpc_server.h"

#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
#include <grpcpp/ext/channelz_service_plugin.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>

#include <algorithm>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/base/log.h"
#include "engine/base/status_macros.h"

namespace minitron::server {
namespace {

constexpr const char* kReadyServices[] = {"", "minitron.v1.GenerationService", "minitron.v1.ModelService"};
constexpr char kLiveness[] = "liveness";
// A call that arrives while the server ends gets this long to take its refusal, a connection this long to close.
constexpr std::chrono::milliseconds kLateCallGrace{200};
constexpr int kMaxMetadataBytes = 16 * 1024;

// Dead peers are found within 80 s, and clients may ping through a long silent prefill.
void SetKeepalive(grpc::ServerBuilder& builder) {
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 60 * 1000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20 * 1000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10 * 1000);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, 15 * 60 * 1000);
}

void SetLimits(grpc::ServerBuilder& builder, const GrpcServerOptions& options) {
  builder.SetMaxReceiveMessageSize(options.max_receive_bytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_concurrent_streams);
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, static_cast<int>(options.handshake_timeout.count()));
  builder.AddChannelArgument(GRPC_ARG_ENABLE_CHANNELZ, options.channelz ? 1 : 0);
  // The receive limit is checked after inflating: a few KiB of gzip would become gigabytes.
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
}

// Plugins register themselves for every builder of the process, reflection as soon as its library is linked. What this
// server does not want is taken out of its own builder.
class OnlyWantedPlugins final : public grpc::ServerBuilderOption {
 public:
  explicit OnlyWantedPlugins(const GrpcServerOptions& options)
      : reflection_(options.reflection), channelz_(options.channelz) {}
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    std::erase_if(*plugins, [this](const auto& plugin) {
      return (!reflection_ && plugin->name() == "proto_server_reflection") ||
             (!channelz_ && plugin->name() == "channelz_service");
    });
  }

 private:
  const bool reflection_;
  const bool channelz_;
};

// Before the builder is made: it takes the plugins that are there then.
void RegisterPlugins(const GrpcServerOptions& options) {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();  // or the linker leaves the library out
  if (options.channelz) grpc::channelz::experimental::InitChannelzService();
}

bool IsHealth(const std::string& path) { return absl::StartsWith(path, "/grpc.health.v1.Health/"); }

// Deny by default. Our own services tell their callers more than a code (RpcScope), so they ask themselves, and a test
// calls every one of their methods; whatever else this process serves, or will, is closed here.
CallFence MakeFence(const ServerContext& context) {
  if (context.auth == nullptr) return nullptr;
  return [&context](const std::string& path, const std::string& authorization) {
    if (IsHealth(path) || absl::StartsWith(path, "/minitron.v1.") ||
        absl::StartsWith(path, "/inference.GRPCInferenceService/") || absl::StartsWith(path, "/vllm.Inference/") ||
        absl::StartsWith(path, "/vllm.Control/") || absl::StartsWith(path, "/vllm.grpc.engine.VllmEngine/")) {
      return grpc::Status::OK;
    }
    const std::shared_ptr<const AuthTable> table = context.auth->table();
    const Identity* identity = table->FindToken(BearerToken(authorization));
    if (identity == nullptr) {
      if (context.operator_metrics != nullptr) {
        context.operator_metrics->CountAuthFailure(authorization.empty() ? "missing" : "unknown");
      }
      return grpc::Status(grpc::StatusCode::UNAUTHENTICATED, "this server asks for a token it knows");
    }
    const Role role = absl::StartsWith(path, "/grpc.channelz.") ? Role::kAdmin : Role::kUser;
    if (identity->Has(role)) return grpc::Status::OK;
    if (context.operator_metrics != nullptr) context.operator_metrics->CountAuthFailure("role");
    return grpc::Status(grpc::StatusCode::PERMISSION_DENIED, "this method takes another role");
  };
}

grpc::Status HealthOnly(const std::string& path, const std::string&) {
  return IsHealth(path) ? grpc::Status::OK
                        : grpc::Status(grpc::StatusCode::PERMISSION_DENIED, "this port answers health checks only");
}

Listener::Hooks MakeHooks(OperatorMetrics* metrics) {
  if (metrics == nullptr) return {[](int) {}, [](const std::string&) {}};
  return {[metrics](int open) { metrics->SetConnections(open); },
          [metrics](const std::string& reason) { metrics->CountRefusedConnection(reason); }};
}

}  // namespace

absl::Status GrpcServer::OpenPort(const std::string& host, int port,
                                  std::shared_ptr<grpc::ServerCredentials> credentials, grpc::ServerBuilder& builder,
                                  std::vector<Listener::Endpoint>& endpoints) {
  ASSIGN_OR_RETURN(ListeningSocket socket, ListeningSocket::Open(host, port));
  auto experimental = builder.experimental();
  auto acceptor = experimental.AddExternalConnectionAcceptor(
      grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD, credentials);
  credentials_.push_back(std::move(credentials));
  endpoints.push_back({std::move(socket), std::move(acceptor)});
  return absl::OkStatus();
}

void GrpcServer::RegisterForeign(const GrpcServerOptions& options, grpc::ServerBuilder& builder) {
  ready_services_.assign(std::begin(kReadyServices), std::end(kReadyServices));
  if (options.open_inference) {
    builder.RegisterService(&open_inference_);
    ready_services_.emplace_back("inference.GRPCInferenceService");
  }
  if (options.vllm_grpc) {
    builder.RegisterService(&vllm_inference_);
    builder.RegisterService(&vllm_control_);
    builder.RegisterService(&vllm_engine_);
    ready_services_.insert(ready_services_.end(), std::begin(compat::kVllmServices), std::end(compat::kVllmServices));
  }
}

absl::StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Start(const GrpcServerOptions& options,
                                                              ServerContext* context) {
  RegisterPlugins(options);
  std::unique_ptr<GrpcServer> server(new GrpcServer(context));
  grpc::ServerBuilder builder;
  builder.SetOption(std::make_unique<OnlyWantedPlugins>(options));
  SetKeepalive(builder);
  SetLimits(builder, options);
  std::vector<Listener::Endpoint> endpoints;
  RETURN_IF_ERROR(server->OpenPort(options.host, options.port, MakeServerCredentials(options.tls, MakeFence(*context)),
                                   builder, endpoints));
  server->port_ = endpoints.back().socket.port();
  if (options.health_port.has_value()) {
    RETURN_IF_ERROR(server->OpenPort(options.host, *options.health_port, MakeServerCredentials(nullptr, HealthOnly),
                                     builder, endpoints));
    server->health_port_ = endpoints.back().socket.port();
  }
  builder.RegisterService(&server->generation_);
  builder.RegisterService(&server->model_);
  builder.RegisterService(&server->admin_);
  server->RegisterForeign(options, builder);
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr) return absl::InternalError("gRPC refuses to start");
  server->SetReady(false);
  server->SetAlive(true);
  server->listener_ =
      std::make_unique<Listener>(options.listener, std::move(endpoints), MakeHooks(context->operator_metrics));
  return server;
}

void GrpcServer::SetReady(bool ready) {
  context_->ready.store(ready);
  for (const std::string& name : ready_services_) server_->GetHealthCheckService()->SetServingStatus(name, ready);
}

void GrpcServer::SetAlive(bool alive) { server_->GetHealthCheckService()->SetServingStatus(kLiveness, alive); }

void GrpcServer::Shutdown(std::chrono::milliseconds grace) {
  listener_->StopAccepting();
  context_->open_calls.WaitForNone(grace);
  listener_->HangUp(std::min(grace, kLateCallGrace));
  server_->Shutdown(std::chrono::system_clock::now() + std::min(grace, kLateCallGrace));
  server_->Wait();
}

void RouteLibraryLogs() {
  gpr_set_log_function([](gpr_log_func_args* line) {
    base::LogEvent(line->severity == GPR_LOG_SEVERITY_ERROR ? base::LogLevel::kWarning : base::LogLevel::kInfo, "grpc",
                   {{"message", line->message}});
  });
  google::protobuf::SetLogHandler([](google::protobuf::LogLevel, const char*, int, const std::string& message) {
    base::LogEvent(base::LogLevel::kWarning, "protobuf", {{"message", message}});
  });
}

absl::Status CheckPortIsFree(const std::string& host, int port) { return ListeningSocket::Open(host, port).status(); }

}  // namespace minitron::server
