// GrpcServer: the listener with its limits, the services, health and reflection.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/services.h"

namespace minitron::server {

struct GrpcServerOptions {
  std::string host = "0.0.0.0";
  int port = 50051;  // 0: any free one
  int max_receive_bytes = 4 << 20;
  int max_concurrent_streams = 4096;  // per connection; admission control is ours and must see the calls
  bool reflection = true;
};

class GrpcServer {
 public:
  // Binds and starts to serve; not ready until SetReady. `context` must outlive this object.
  // Error: UNAVAILABLE when the port cannot be bound (names host and port).
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Start(const GrpcServerOptions& options, ServerContext* context);

  int port() const { return port_; }

  // Readiness: "" and every service of ours in grpc.health.v1.
  void SetReady(bool ready);
  // The health service "liveness": false once only a restart can help.
  void SetAlive(bool alive);

  // Ends open calls with CANCELLED after `grace` and returns when all are gone. No call may start afterwards.
  void Shutdown(std::chrono::milliseconds grace);

  std::shared_ptr<grpc::Channel> InProcessChannel() { return server_->InProcessChannel(grpc::ChannelArguments()); }

 private:
  explicit GrpcServer(ServerContext* context) : generation_(context), model_(context), admin_(context) {}

  GenerationService generation_;
  ModelService model_;
  AdminService admin_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
};

// Error: UNAVAILABLE when nobody could listen on this address now. A cheap question before a model is loaded for
// minutes; the answer may change until Start.
absl::Status CheckPortIsFree(const std::string& host, int port);

}  // namespace minitron::server
