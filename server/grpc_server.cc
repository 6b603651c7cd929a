#include "server/grpc_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <mutex>

#include "absl/strings/str_cat.h"

namespace minitron::server {
namespace {

constexpr const char* kReadyServices[] = {"", "minitron.v1.GenerationService", "minitron.v1.ModelService"};
constexpr char kLiveness[] = "liveness";
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
  // A second server on a taken port must fail, not share it.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // The receive limit is checked after inflating: a few KiB of gzip would become gigabytes.
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
}

absl::Status CannotListen(const std::string& host, int port) {
  return absl::UnavailableError(absl::StrCat("cannot listen on ", host, ":", port, ": taken or not permitted"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Start(const GrpcServerOptions& options,
                                                              ServerContext* context) {
  grpc::EnableDefaultHealthCheckService(true);
  // The plugin registers itself for all builders of the process, and there is no way to take it back.
  static std::once_flag reflection_once;
  if (options.reflection) {
    std::call_once(reflection_once, [] { grpc::reflection::InitProtoReflectionServerBuilderPlugin(); });
  }
  std::unique_ptr<GrpcServer> server(new GrpcServer(context));
  grpc::ServerBuilder builder;
  SetKeepalive(builder);
  SetLimits(builder, options);
  builder.AddListeningPort(absl::StrCat(options.host, ":", options.port), grpc::InsecureServerCredentials(),
                           &server->port_);
  builder.RegisterService(&server->generation_);
  builder.RegisterService(&server->model_);
  builder.RegisterService(&server->admin_);
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || server->port_ == 0) return CannotListen(options.host, options.port);
  server->SetReady(false);
  server->SetAlive(true);
  return server;
}

void GrpcServer::SetReady(bool ready) {
  for (const char* name : kReadyServices) server_->GetHealthCheckService()->SetServingStatus(name, ready);
}

void GrpcServer::SetAlive(bool alive) { server_->GetHealthCheckService()->SetServingStatus(kLiveness, alive); }

void GrpcServer::Shutdown(std::chrono::milliseconds grace) {
  server_->Shutdown(std::chrono::system_clock::now() + grace);
  server_->Wait();
}

absl::Status CheckPortIsFree(const std::string& host, int port) {
  if (port == 0) return absl::OkStatus();
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), absl::StrCat(port).c_str(), &hints, &found) != 0) return CannotListen(host, port);
  const int fd = socket(found->ai_family, found->ai_socktype | SOCK_CLOEXEC, found->ai_protocol);
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));  // as gRPC does: old closed connections do not count
  const bool bound = fd >= 0 && bind(fd, found->ai_addr, found->ai_addrlen) == 0 && listen(fd, 1) == 0;
  if (fd >= 0) close(fd);
  freeaddrinfo(found);
  return bound ? absl::OkStatus() : CannotListen(host, port);
}

}  // namespace minitron::server
