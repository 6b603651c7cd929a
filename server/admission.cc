#include "server/admission.h"

#include <utility>

#include "server/grpc_status.h"

namespace minitron::server {
namespace {

absl::Status TryAdmit(ServerContext& server, BuiltRequest built, std::shared_ptr<CallSink> sink,
                      std::atomic<scheduler::RequestId>& id) {
  if (server.draining.load()) return DrainingError();
  built.request.id = server.names.NextId();
  id.store(built.request.id);
  if (server.tenants != nullptr && server.auth != nullptr) {
    const scheduler::Request& request = built.request;
    const int64_t num_tokens =
        static_cast<int64_t>(request.prompt_token_ids.size()) + int64_t{request.num_sequences} * request.max_tokens;
    auto charge = server.tenants->Admit(request.tenant, request.num_sequences, num_tokens);
    if (!charge.ok()) return charge.status();
    built.spec.charge = *std::move(charge);
  }
  const scheduler::RequestId request_id = built.request.id;
  absl::Status status = server.output->Register(request_id, std::move(built.spec), std::move(sink));
  if (!status.ok()) return status;
  status = server.submit(std::move(built.request));
  if (!status.ok()) server.output->Unregister(request_id);
  return status;
}

}  // namespace

absl::Status Admit(ServerContext& server, BuiltRequest built, std::shared_ptr<CallSink> sink,
                   std::atomic<scheduler::RequestId>& id) {
  const std::string tenant = built.request.tenant;
  absl::Status status = TryAdmit(server, std::move(built), std::move(sink), id);
  // What the engine refuses without a reason of its own still gets one.
  if (!status.ok() && GetReason(status).empty()) {
    if (absl::IsUnavailable(status)) SetReason(status, reason::kQueueFull);
    if (absl::IsInvalidArgument(status)) SetReason(status, reason::kRequestTooLarge);
    if (absl::IsDeadlineExceeded(status)) SetReason(status, reason::kDeadlineExceeded);
  }
  if (!status.ok()) CountRefusal(server, status, tenant);
  return status;
}

void CountRefusal(ServerContext& server, const absl::Status& status, const std::string& tenant) {
  static constexpr struct {
    const char* why;
    const char* counted_as;
  } kReasons[] = {
      {reason::kQueueFull, "queue_full"},         {reason::kQueuedTokensFull, "tokens_full"},
      {reason::kQueuedBytesFull, "bytes_full"},   {reason::kDeadlineUnreachable, "deadline"},
      {reason::kDeadlineExceeded, "deadline"},    {reason::kDraining, "draining"},
      {reason::kDuplicateRequestId, "duplicate"}, {reason::kQuotaExceeded, "quota"},
  };
  const std::string why = GetReason(status);
  if (why == reason::kQuotaExceeded && server.operator_metrics != nullptr) {
    server.operator_metrics->CountTenantRefusal(tenant);
  }
  for (const auto& known : kReasons) {
    if (why == known.why) return server.metrics->CountRejection(known.counted_as);
  }
  const bool is_auth = absl::IsUnauthenticated(status) || absl::IsPermissionDenied(status);
  server.metrics->CountRejection(is_auth ? "auth" : absl::IsInternal(status) ? "error" : "invalid");
}

}  // namespace minitron::server
