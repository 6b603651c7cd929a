#include "server/rpc_scope.h"

#include <algorithm>
#include <random>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace minitron::server {
namespace {

// Beyond the largest timeout anybody means; keeps the subtraction of the two clocks from overflowing.
constexpr auto kFarFuture = std::chrono::hours(24 * 365);

std::string FindMetadata(const grpc::CallbackServerContext& context, const char* key) {
  const auto found = context.client_metadata().find(key);
  if (found == context.client_metadata().end()) return "";
  return std::string(found->second.data(), found->second.size());
}

// splitmix64: every input gives a different, well-mixed output.
uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// How a refused caller is counted and logged.
absl::Status Refuse(ServerContext& server, const char* why, absl::StatusCode code, const char* reason,
                    const std::string& message) {
  if (server.operator_metrics != nullptr) server.operator_metrics->CountAuthFailure(why);
  return ReasonError(code, reason, message);
}

}  // namespace

bool IsEchoable(const std::string& id) {
  return !id.empty() && id.size() <= 128 &&
         std::all_of(id.begin(), id.end(), [](char c) { return c >= 32 && c < 127; });
}

RequestNames::RequestNames() {
  std::random_device device;
  base_ = (static_cast<uint64_t>(device()) << 32) | device();
}

uint64_t RequestNames::FreshSeed() { return Mix(base_ + num_drawn_.fetch_add(1)); }
std::string RequestNames::FreshName() { return absl::StrCat("req-", absl::Hex(FreshSeed(), absl::kZeroPad16)); }

void OpenCalls::Enter() {
  std::lock_guard<std::mutex> lock(mutex_);
  ++num_open_;
}

void OpenCalls::Leave() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (--num_open_ == 0) none_.notify_all();
}

void OpenCalls::WaitForNone(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  none_.wait_for(lock, timeout, [this] { return num_open_ == 0; });
}

bool IsTraceparent(const std::string& text) {
  constexpr size_t kBytes = 55;
  if (text.size() != kBytes || text.compare(0, 3, "00-") != 0 || text[35] != '-' || text[52] != '-') return false;
  const auto is_hex = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  for (size_t i = 3; i < kBytes; ++i) {
    if (i != 35 && i != 52 && !is_hex(text[i])) return false;
  }
  // All zeros names nothing.
  return text.find_first_not_of('0', 3) < 35 && text.find_first_not_of('0', 36) < 52;
}

RpcScope::RpcScope(ServerContext* server, grpc::CallbackServerContext* context, const char* method, Role role)
    : server_(server), context_(context), method_(method), role_(role), arrival_(server->now()) {
  traceparent_ = FindMetadata(*context_, "traceparent");
  if (!IsTraceparent(traceparent_)) traceparent_.clear();
}

absl::StatusOr<Identity> RpcScope::Identify() const {
  const std::shared_ptr<const AuthTable> table = server_->auth->table();
  const std::string header = FindMetadata(*context_, "authorization");
  if (!header.empty()) {
    const Identity* identity = table->FindToken(BearerToken(header));
    if (identity != nullptr) return *identity;
    return Refuse(*server_, "unknown", absl::StatusCode::kUnauthenticated, reason::kUnknownToken,
                  "the token is not known");
  }
  for (const grpc::string_ref& name : context_->auth_context()->FindPropertyValues(GRPC_X509_SAN_PROPERTY_NAME)) {
    const Identity* identity = table->FindName(std::string(name.data(), name.size()));
    if (identity != nullptr) return *identity;
  }
  return Refuse(*server_, "missing", absl::StatusCode::kUnauthenticated, reason::kNoToken,
                "this server asks for a token: authorization: Bearer <token>");
}

absl::Status RpcScope::Authorize() {
  if (server_->auth == nullptr) {
    identity_.tenant = FindMetadata(*context_, "x-minitron-tenant");
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(identity_, Identify());
  if (identity_.Has(role_)) return absl::OkStatus();
  return Refuse(*server_, "role", absl::StatusCode::kPermissionDenied, reason::kRoleMissing,
                absl::StrCat("this method takes the role ", role_ == Role::kAdmin ? "admin" : "user"));
}

CallContext RpcScope::MakeContext(scheduler::TimePoint arrival) {
  CallContext call;
  call.request_id = FindMetadata(*context_, "x-request-id");
  call.tenant = identity_.tenant;
  call.arrival = arrival;
  call.deadline = call.arrival + server_->max_request_timeout;
  const auto system_now = std::chrono::system_clock::now();
  if (context_->deadline() < system_now + kFarFuture) {
    const auto left = std::chrono::duration_cast<scheduler::Duration>(context_->deadline() - system_now);
    call.deadline = std::min(call.deadline, call.arrival + left);
  }
  call.check_admission = [server = server_](const scheduler::Arrival& at_door) {
    if (server->draining.load()) return DrainingError();
    return server->check_admission(at_door);
  };
  call.fresh_seed = server_->names.FreshSeed();
  call.fresh_request_id = server_->names.FreshName();
  return call;
}

CallContext RpcScope::NextRequest() { return MakeContext(server_->now()); }

absl::StatusOr<CallContext> RpcScope::Begin() {
  RETURN_IF_ERROR(Authorize());
  CallContext call = MakeContext(arrival_);
  // Names that nobody vouches for have no limits, and would only fill memory.
  if (server_->tenants == nullptr || server_->auth == nullptr) return call;
  auto stream = server_->tenants->OpenStream(call.tenant);
  if (!stream.ok()) return stream.status();
  stream_ = *std::move(stream);
  return call;
}

grpc::Status RpcScope::Close(const absl::Status& status) {
  if (const std::optional<int> delay = RetryDelayMs(status); delay.has_value()) {
    context_->AddTrailingMetadata(kRetryPushbackTrailer, absl::StrCat(*delay));
  }
  return Close(ToGrpcStatus(status));
}

grpc::Status RpcScope::Close(const grpc::Status& status) {
  if (request_id_.empty()) request_id_ = FindMetadata(*context_, "x-request-id");
  if (IsEchoable(request_id_)) context_->AddTrailingMetadata("x-request-id", request_id_);
  if (!traceparent_.empty()) context_->AddTrailingMetadata("traceparent", traceparent_);
  server_->metrics->CountRpc(method_, status.error_code());
  if (server_->audit != nullptr) Audit(status);
  stream_.reset();  // before the client sees the end: it may open its next one at once
  return status;
}

void RpcScope::Audit(const grpc::Status& status) const {
  const double seconds = std::chrono::duration<double>(server_->now() - arrival_).count();
  base::LogFields fields = {{"method", method_},
                            {"status", CodeName(status.error_code())},
                            {"tenant", identity_.tenant.substr(0, 64)},
                            {"token_id", identity_.token_id},
                            {"peer", context_->peer().substr(0, 128)},
                            {"duration_ms", absl::StrCat(static_cast<int64_t>(seconds * 1000))}};
  if (IsEchoable(request_id_)) fields.emplace_back("request_id", request_id_);
  if (!traceparent_.empty()) fields.emplace_back("traceparent", traceparent_);
  if (num_prompt_tokens_ > 0) fields.emplace_back("prompt_tokens", absl::StrCat(num_prompt_tokens_));
  if (num_output_tokens_ > 0) fields.emplace_back("completion_tokens", absl::StrCat(num_output_tokens_));
  server_->audit->Write("call", fields);
}

}  // namespace minitron::server
