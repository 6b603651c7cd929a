// HttpCall: what every HTTP request does at its start and its end, as RpcScope does for gRPC: who calls and whether
// they may, the count, the audit line. One per request; not synchronized.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/auth.h"
#include "server/compat/http_server.h"
#include "server/server_context.h"
#include "server/tenant_gate.h"

namespace minitron::server::compat {

class HttpCall {
 public:
  // `path` is a literal known to Metrics. Both pointers outlive this object.
  HttpCall(ServerContext* server, HttpExchange* exchange, const char* path);
  ~HttpCall();  // counts and audits

  // Errors: UNAUTHENTICATED, PERMISSION_DENIED.
  absl::Status Authorize(Role role);
  // Authorize, and a place among the tenant's streams.
  // Errors: as Authorize; RESOURCE_EXHAUSTED.
  absl::Status Begin();
  // The same caller's request `index` of `count`: the name in x-request-id is the one's, or its start is, with "-0",
  // "-1" and so on behind it.
  CallContext NextRequest(size_t index, size_t count) const;

  // Answers with the HTTP code and the error object that `status` means.
  void RespondError(const absl::Status& status);
  void RespondJson(const std::string& json);

  void AddUsage(int num_prompt_tokens, int num_output_tokens) {
    num_prompt_tokens_ += num_prompt_tokens;
    num_output_tokens_ += num_output_tokens;
  }
  const std::string& tenant() const { return identity_.tenant; }
  HttpExchange& exchange() const { return *exchange_; }

 private:
  ServerContext* server_;   // owned by Serving
  HttpExchange* exchange_;  // the handler's
  const char* path_;
  const scheduler::TimePoint arrival_;
  const std::string request_id_;  // the client's, or a fresh one; goes back to it, as traceparent does
  std::string traceparent_;       // empty unless valid
  Identity identity_;
  std::unique_ptr<TenantGate::Stream> stream_;
  int num_prompt_tokens_ = 0;
  int num_output_tokens_ = 0;
};

// The error object of OpenAI's API for a status, and the HTTP code it has.
std::string ErrorJson(const absl::Status& status);
int HttpCode(const absl::Status& status);
// What a CallSink is told, as the status it was made from: code, message, field and reason.
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace minitron::server::compat
