#include "server/grpc_status.h"

#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/support/error_details.h>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "engine/base/check.h"

namespace minitron::server {
namespace {

constexpr char kReasonUrl[] = "minitron/reason";
constexpr char kFieldUrl[] = "minitron/field";
constexpr char kRetryUrl[] = "minitron/retry-ms";
constexpr char kMetadataUrl[] = "minitron/metadata/";

// A full queue empties at the pace of the model: come back soon. A draining server never comes back: another one may
// take the call at once, the delay only spreads the herd.
constexpr int kQueueFullRetryMs = 500;
constexpr int kDrainingRetryMs = 100;

std::string GetPayload(const absl::Status& status, const char* url) {
  const absl::optional<absl::Cord> payload = status.GetPayload(url);
  return payload.has_value() ? std::string(*payload) : std::string();
}

std::string DefaultReason(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
      return reason::kInvalidField;
    case absl::StatusCode::kCancelled:
      return reason::kCancelled;
    case absl::StatusCode::kDeadlineExceeded:
      return reason::kDeadlineExceeded;
    case absl::StatusCode::kInternal:
      return reason::kEngineFailure;
    default:
      return absl::StatusCodeToString(code);
  }
}

std::string ReasonOrDefault(const absl::Status& status) {
  const std::string reason = GetReason(status);
  return reason.empty() ? DefaultReason(status.code()) : reason;
}

void FillErrorInfo(const absl::Status& status, google::rpc::ErrorInfo& info) {
  info.set_reason(ReasonOrDefault(status));
  info.set_domain(kErrorDomain);
  const std::string field = GetField(status);
  if (!field.empty()) (*info.mutable_metadata())["field"] = field;
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& value) {
    const std::string name(url);
    if (name.rfind(kMetadataUrl, 0) != 0) return;
    (*info.mutable_metadata())[name.substr(sizeof(kMetadataUrl) - 1)] = std::string(value);
  });
}

}  // namespace

void SetReason(absl::Status& status, const std::string& reason) { status.SetPayload(kReasonUrl, absl::Cord(reason)); }
void SetField(absl::Status& status, const std::string& field) { status.SetPayload(kFieldUrl, absl::Cord(field)); }
void AddMetadata(absl::Status& status, const std::string& key, const std::string& value) {
  status.SetPayload(kMetadataUrl + key, absl::Cord(value));
}

std::string GetReason(const absl::Status& status) { return GetPayload(status, kReasonUrl); }
std::string GetField(const absl::Status& status) { return GetPayload(status, kFieldUrl); }

absl::Status ReasonError(absl::StatusCode code, const std::string& reason, const std::string& message,
                         const Metadata& metadata) {
  CHECK(code != absl::StatusCode::kOk);
  absl::Status status(code, message);
  SetReason(status, reason);
  for (const auto& [key, value] : metadata) AddMetadata(status, key, value);
  return status;
}

absl::Status FieldError(const std::string& field, const std::string& message, const Metadata& metadata,
                        const std::string& reason) {
  absl::Status status = ReasonError(absl::StatusCode::kInvalidArgument, reason, field + ": " + message, metadata);
  SetField(status, field);
  return status;
}

absl::Status DrainingError() {
  return ReasonError(absl::StatusCode::kUnavailable, reason::kDraining, "the server is draining; use another one");
}

void SetRetryDelayMs(absl::Status& status, int delay_ms) {
  status.SetPayload(kRetryUrl, absl::Cord(absl::StrCat(delay_ms)));
}

std::optional<int> RetryDelayMs(const absl::Status& status) {
  int delay_ms = 0;
  if (absl::SimpleAtoi(GetPayload(status, kRetryUrl), &delay_ms)) return delay_ms;
  if (!absl::IsUnavailable(status)) return std::nullopt;
  return GetReason(status) == reason::kDraining ? kDrainingRetryMs : kQueueFullRetryMs;
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  google::rpc::Status wire;
  wire.set_code(static_cast<int>(status.code()));  // both follow google.rpc.Code
  wire.set_message(std::string(status.message()));
  google::rpc::ErrorInfo info;
  FillErrorInfo(status, info);
  wire.add_details()->PackFrom(info);
  const std::string field = GetField(status);
  if (!field.empty()) {
    google::rpc::BadRequest bad_request;
    auto* violation = bad_request.add_field_violations();
    violation->set_field(field);
    // The message starts with the field; beside the field's own name only the rest says something.
    const std::string prefix = field + ": ";
    const bool repeats = wire.message().compare(0, prefix.size(), prefix) == 0;
    violation->set_description(repeats ? wire.message().substr(prefix.size()) : wire.message());
    wire.add_details()->PackFrom(bad_request);
  }
  if (const std::optional<int> delay = RetryDelayMs(status); delay.has_value()) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(*delay / 1000);
    retry.mutable_retry_delay()->set_nanos(*delay % 1000 * 1000000);
    wire.add_details()->PackFrom(retry);
  }
  if (absl::IsResourceExhausted(status)) {
    google::rpc::QuotaFailure quota;
    auto* violation = quota.add_violations();
    violation->set_subject(field.empty() ? info.reason() : field);
    violation->set_description(wire.message());
    wire.add_details()->PackFrom(quota);
  }
  grpc::Status result;
  grpc::SetErrorDetails(wire, &result);
  return result;
}

const char* CodeName(grpc::StatusCode code) {
  static constexpr const char* kNames[] = {
      "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
      "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
      "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
      "DATA_LOSS", "UNAUTHENTICATED"};
  const int index = static_cast<int>(code);
  return index >= 0 && index <= static_cast<int>(grpc::StatusCode::UNAUTHENTICATED) ? kNames[index] : "UNKNOWN";
}

}  // namespace minitron::server
