// RpcScope: what every call does at its start and its end. One per call; not synchronized.
#pragma once

#include <grpcpp/grpcpp.h>

#include <string>

#include "server/grpc_status.h"
#include "server/server_context.h"

namespace minitron::server {

class RpcScope {
 public:
  // `method` is a literal known to Metrics. `server` and `context` outlive this object.
  RpcScope(ServerContext* server, grpc::CallbackServerContext* context, const char* method)
      : server_(server), context_(context), method_(method) {}

  // Arrival, deadline (the client's, at most the server's maximum away) and the metadata we read.
  CallContext ReadCallContext() const;

  // Sets the trailers and counts the call; its result goes to Finish. Call once, before Finish.
  grpc::Status Close(const absl::Status& status);
  grpc::Status Close(const grpc::Status& status);

  // Echoed as the trailer x-request-id.
  void set_request_id(const std::string& request_id) { request_id_ = request_id; }
  ServerContext* server() const { return server_; }
  grpc::CallbackServerContext* context() const { return context_; }

 private:
  ServerContext* server_;                 // owned by main
  grpc::CallbackServerContext* context_;  // owned by gRPC until OnDone
  const char* method_;
  std::string request_id_;
};

}  // namespace minitron::server
