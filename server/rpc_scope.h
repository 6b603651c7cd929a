// RpcScope: what every call does at its start and its end: who calls and whether they may, the metadata we read, the
// trailers, the count and the audit line. One per call; not synchronized.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/auth.h"
#include "server/grpc_status.h"
#include "server/server_context.h"
#include "server/tenant_gate.h"

namespace minitron::server {

class RpcScope {
 public:
  // `method` is a literal known to Metrics; `role` is what it takes to call it. Both pointers outlive this object.
  RpcScope(ServerContext* server, grpc::CallbackServerContext* context, const char* method, Role role = Role::kUser);

  // First of all: nothing of a call is looked at before this is OK. A call may show a bearer token or, with mutual TLS,
  // a certificate; a token that is there decides. Without authentication everybody may.
  // Errors: UNAUTHENTICATED (no token, unknown token), PERMISSION_DENIED (token of another role).
  absl::Status Authorize();

  // Authorize, a place among the tenant's streams (kept until Close), and the metadata of a call that uses
  // the engine: arrival, deadline (the client's, at most the server's maximum away), names.
  // Errors: as Authorize; RESOURCE_EXHAUSTED.
  absl::StatusOr<CallContext> Begin();
  // After Begin: the same for one more request on a stream of requests, arriving now.
  CallContext NextRequest();

  // Sets the trailers and counts the call; its result goes to Finish. Call once, before Finish.
  grpc::Status Close(const absl::Status& status);
  grpc::Status Close(const grpc::Status& status);

  // Echoed as the trailer x-request-id.
  void set_request_id(const std::string& request_id) { request_id_ = request_id; }
  // For the audit line.
  void AddUsage(int num_prompt_tokens, int num_output_tokens) {
    num_prompt_tokens_ = num_prompt_tokens;
    num_output_tokens_ += num_output_tokens;
  }
  ServerContext* server() const { return server_; }
  grpc::CallbackServerContext* context() const { return context_; }
  const std::string& tenant() const { return identity_.tenant; }

 private:
  absl::StatusOr<Identity> Identify() const;
  CallContext MakeContext(scheduler::TimePoint arrival);
  void Audit(const grpc::Status& status) const;

  ServerContext* server_;                 // owned by main
  grpc::CallbackServerContext* context_;  // owned by gRPC until OnDone
  const char* method_;
  const Role role_;
  const scheduler::TimePoint arrival_;
  Identity identity_;
  std::unique_ptr<TenantGate::Stream> stream_;
  std::string request_id_;
  std::string traceparent_;  // empty unless valid
  int num_prompt_tokens_ = 0;
  int num_output_tokens_ = 0;
};

// A call that needs no engine: answered at once, for callers who may. `handler` returns the status of the call.
template <typename Handler>
grpc::ServerUnaryReactor* AnswerUnary(ServerContext* server, grpc::CallbackServerContext* context, const char* method,
                                      Role role, const Handler& handler) {
  RpcScope scope(server, context, method, role);
  absl::Status status = scope.Authorize();
  if (status.ok()) status = handler();
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(scope.Close(status));
  return reactor;
}

// Whether `text` is a version 00 traceparent of W3C Trace Context: 00-<trace id>-<parent id>-<flags>.
bool IsTraceparent(const std::string& text);

// Whether `id` may be returned and logged: 1 to 128 bytes of printable ASCII.
bool IsEchoable(const std::string& id);

}  // namespace minitron::server
