// GrpcServer: the ports with their limits, the services, health, reflection and channelz, and who may call them.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/compat/open_inference_service.h"
#include "server/compat/vllm_services.h"
#include "server/listener.h"
#include "server/services.h"
#include "server/tls.h"

namespace minitron::server {

struct GrpcServerOptions {
  std::string host = "0.0.0.0";
  int port = 50051;                // 0: any free one
  std::optional<int> health_port;  // a plaintext port that answers nothing but grpc.health.v1; 0: any free one
  int max_receive_bytes = 4 << 20;
  int max_concurrent_streams = 4096;  // per connection; admission control is ours and must see the calls
  // TLS handshake and the client's HTTP/2 preface together; a connection that takes longer is closed.
  std::chrono::milliseconds handshake_timeout{10'000};
  ListenerOptions listener;
  bool reflection = true;
  bool open_inference = true;  // inference.GRPCInferenceService
  bool vllm_grpc = true;       // vllm.Inference, vllm.Control, vllm.grpc.engine.VllmEngine
  bool channelz = false;
  TlsStore* tls = nullptr;  // null: plaintext; must outlive the server
};

class GrpcServer {
 public:
  // Binds and starts to serve; not ready until SetReady. `context` must outlive this object.
  // Error: UNAVAILABLE when a port cannot be bound (names host and port).
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Start(const GrpcServerOptions& options, ServerContext* context);

  int port() const { return port_; }
  int health_port() const { return health_port_; }  // 0: none

  // Readiness: "" and every service of ours in grpc.health.v1.
  void SetReady(bool ready);
  // The health service "liveness": false once only a restart can help.
  void SetAlive(bool alive);

  // Accepts no connection any more and waits until no generating call is open, but at most `grace`; then ends all that
  // is left (a health watch lasts as long as the server) and returns when it is gone. No call may start afterwards.
  void Shutdown(std::chrono::milliseconds grace);

  std::shared_ptr<grpc::Channel> InProcessChannel() { return server_->InProcessChannel(grpc::ChannelArguments()); }

 private:
  explicit GrpcServer(ServerContext* context)
      : context_(context),
        generation_(context),
        model_(context),
        admin_(context),
        open_inference_(context),
        vllm_inference_(context),
        vllm_control_(context),
        vllm_engine_(context) {}

  absl::Status OpenPort(const std::string& host, int port, std::shared_ptr<grpc::ServerCredentials> credentials,
                        grpc::ServerBuilder& builder, std::vector<Listener::Endpoint>& endpoints);

  void RegisterForeign(const GrpcServerOptions& options, grpc::ServerBuilder& builder);

  ServerContext* context_;  // outlives this object
  GenerationService generation_;
  ModelService model_;
  AdminService admin_;
  compat::OpenInferenceService open_inference_;
  compat::VllmInference vllm_inference_;
  compat::VllmControl vllm_control_;
  compat::VllmEngine vllm_engine_;
  std::vector<std::string> ready_services_;                            // whose health follows readiness
  std::vector<std::shared_ptr<grpc::ServerCredentials>> credentials_;  // gRPC's listeners point into them
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Listener> listener_;
  int port_ = 0;
  int health_port_ = 0;
};

// Sends what gRPC and protobuf have to say through our log: same format, same rate limit. Call once, first.
void RouteLibraryLogs();

// Error: UNAVAILABLE when nobody could listen on this address now; port 0 asks for any. A cheap question before a model
// is loaded for minutes; the answer may change until Start.
absl::Status CheckPortIsFree(const std::string& host, int port);

}  // namespace minitron::server
