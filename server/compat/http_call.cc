#include "server/compat/http_call.h"

#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/support/error_details.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/grpc_status.h"
#include "server/rpc_scope.h"

namespace minitron::server::compat {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kJson[] = "application/json";

absl::Status Refuse(ServerContext& server, const char* why, absl::StatusCode code, const char* reason,
                    const std::string& message) {
  if (server.operator_metrics != nullptr) server.operator_metrics->CountAuthFailure(why);
  return ReasonError(code, reason, message);
}

// The client's name for its request, if it may be shown to anybody, or a fresh one.
std::string NameOf(const HttpExchange& exchange, ServerContext& server) {
  std::string name = exchange.Header("x-request-id");
  return IsEchoable(name) ? name : server.names.FreshName();
}

const char* ErrorType(int code) {
  switch (code) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    default:
      return code < 500 ? "invalid_request_error" : "server_error";
  }
}

}  // namespace

int HttpCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 200;
    case absl::StatusCode::kInvalidArgument:
      return 400;
    case absl::StatusCode::kUnauthenticated:
      return 401;
    case absl::StatusCode::kPermissionDenied:
      return 403;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kAlreadyExists:
      return 409;
    case absl::StatusCode::kResourceExhausted:
      return GetReason(status) == reason::kRequestTooLarge ? 413 : 429;
    case absl::StatusCode::kCancelled:
      return 499;
    case absl::StatusCode::kUnimplemented:
      return 501;
    case absl::StatusCode::kUnavailable:
      return 503;
    case absl::StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 500;
  }
}

std::string ErrorJson(const absl::Status& status) {
  const std::string field = GetField(status);
  const int code = HttpCode(status);
  Json error = {{"message", std::string(status.message())},
                {"type", ErrorType(code)},
                {"param", field.empty() ? Json(nullptr) : Json(field)},
                {"code", GetReason(status)}};
  return Json{{"error", std::move(error)}}.dump(-1, ' ', false, Json::error_handler_t::replace);
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  google::rpc::Status wire;
  if (result.ok() || !grpc::ExtractErrorDetails(status, &wire).ok()) return result;
  google::rpc::ErrorInfo info;
  for (const auto& detail : wire.details()) {
    if (!detail.UnpackTo(&info)) continue;
    SetReason(result, info.reason());
    const auto field = info.metadata().find("field");
    if (field != info.metadata().end()) SetField(result, field->second);
  }
  return result;
}

HttpCall::HttpCall(ServerContext* server, HttpExchange* exchange, const char* path)
    : server_(server),
      exchange_(exchange),
      path_(path),
      arrival_(server->now()),
      request_id_(NameOf(*exchange, *server)),
      traceparent_(exchange->Header("traceparent")) {
  server_->metrics->StreamOpened();
  server_->open_calls.Enter();
  exchange_->AddHeaders(absl::StrCat("x-request-id: ", request_id_, "\r\n"));
  if (!IsTraceparent(traceparent_)) traceparent_.clear();
  if (!traceparent_.empty()) exchange_->AddHeaders(absl::StrCat("traceparent: ", traceparent_, "\r\n"));
}

HttpCall::~HttpCall() {
  server_->metrics->StreamClosed();
  server_->open_calls.Leave();
  server_->metrics->CountHttp(path_, exchange_->code());
  if (server_->audit == nullptr) return;
  const double seconds = std::chrono::duration<double>(server_->now() - arrival_).count();
  base::LogFields fields = {{"method", path_},
                            {"status", absl::StrCat(exchange_->code())},
                            {"tenant", identity_.tenant.substr(0, 64)},
                            {"token_id", identity_.token_id},
                            {"peer", exchange_->peer().substr(0, 128)},
                            {"duration_ms", absl::StrCat(static_cast<int64_t>(seconds * 1000))},
                            {"request_id", request_id_}};
  if (!traceparent_.empty()) fields.emplace_back("traceparent", traceparent_);
  if (num_prompt_tokens_ > 0) fields.emplace_back("prompt_tokens", absl::StrCat(num_prompt_tokens_));
  if (num_output_tokens_ > 0) fields.emplace_back("completion_tokens", absl::StrCat(num_output_tokens_));
  server_->audit->Write("call", fields);
}

absl::Status HttpCall::Authorize(Role role) {
  if (server_->auth == nullptr) {
    identity_.tenant = exchange_->Header("x-minitron-tenant");
    return absl::OkStatus();
  }
  const std::string header = exchange_->Header("authorization");
  const std::shared_ptr<const AuthTable> table = server_->auth->table();
  const Identity* identity = header.empty() ? nullptr : table->FindToken(BearerToken(header));
  if (identity == nullptr) {
    return header.empty() ? Refuse(*server_, "missing", absl::StatusCode::kUnauthenticated, reason::kNoToken,
                                   "this server asks for a token: Authorization: Bearer <token>")
                          : Refuse(*server_, "unknown", absl::StatusCode::kUnauthenticated, reason::kUnknownToken,
                                   "the token is not known");
  }
  identity_ = *identity;
  if (identity_.Has(role)) return absl::OkStatus();
  return Refuse(*server_, "role", absl::StatusCode::kPermissionDenied, reason::kRoleMissing,
                absl::StrCat("this path takes the role ", role == Role::kAdmin ? "admin" : "user"));
}

CallContext HttpCall::NextRequest(size_t index, size_t count) const {
  CallContext call;
  call.request_id = count == 1 ? request_id_ : absl::StrCat(request_id_, "-", index);
  call.check_admission = [server = server_](const scheduler::Arrival& at_door) {
    if (server->draining.load()) return DrainingError();
    return server->check_admission(at_door);
  };
  call.tenant = identity_.tenant;
  call.arrival = arrival_;
  call.deadline = call.arrival + server_->max_request_timeout;
  call.fresh_seed = server_->names.FreshSeed();
  call.fresh_request_id = server_->names.FreshName();
  return call;
}

absl::Status HttpCall::Begin() {
  RETURN_IF_ERROR(Authorize(Role::kUser));
  if (server_->tenants == nullptr || server_->auth == nullptr) return absl::OkStatus();
  auto stream = server_->tenants->OpenStream(identity_.tenant);
  if (!stream.ok()) return stream.status();
  stream_ = *std::move(stream);
  return absl::OkStatus();
}

void HttpCall::RespondError(const absl::Status& status) {
  std::string headers;
  if (const std::optional<int> delay = RetryDelayMs(status); delay.has_value()) {
    headers = absl::StrCat("Retry-After: ", (*delay + 999) / 1000, "\r\nretry-after-ms: ", *delay, "\r\n");
  }
  if (absl::IsUnauthenticated(status)) absl::StrAppend(&headers, "WWW-Authenticate: Bearer\r\n");
  exchange_->Respond(HttpCode(status), kJson, ErrorJson(status), headers);
}

void HttpCall::RespondJson(const std::string& json) { exchange_->Respond(200, kJson, json); }

}  // namespace minitron::server::compat
