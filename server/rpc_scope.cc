#include "server/rpc_scope.h"

#include <algorithm>
#include <random>

#include "absl/strings/str_cat.h"

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

bool IsEchoable(const std::string& id) {
  return !id.empty() && id.size() <= 128 &&
         std::all_of(id.begin(), id.end(), [](char c) { return c >= 32 && c < 127; });
}

}  // namespace

RequestNames::RequestNames() {
  std::random_device device;
  base_ = (static_cast<uint64_t>(device()) << 32) | device();
}

uint64_t RequestNames::FreshSeed() { return Mix(base_ + num_drawn_.fetch_add(1)); }
std::string RequestNames::FreshName() { return absl::StrCat("req-", absl::Hex(FreshSeed(), absl::kZeroPad16)); }

CallContext RpcScope::ReadCallContext() const {
  CallContext call;
  call.request_id = FindMetadata(*context_, "x-request-id");
  call.tenant = FindMetadata(*context_, "x-minitron-tenant");
  call.arrival = server_->now();
  call.deadline = call.arrival + server_->max_request_timeout;
  const auto system_now = std::chrono::system_clock::now();
  if (context_->deadline() < system_now + kFarFuture) {
    const auto left = std::chrono::duration_cast<scheduler::Duration>(context_->deadline() - system_now);
    call.deadline = std::min(call.deadline, call.arrival + left);
  }
  call.fresh_seed = server_->names.FreshSeed();
  call.fresh_request_id = server_->names.FreshName();
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
  server_->metrics->CountRpc(method_, status.error_code());
  return status;
}

}  // namespace minitron::server
