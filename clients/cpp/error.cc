#include "clients/cpp/error.h"

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace minitron::client {

Error DecodeError(const grpc::Status& status) {
  Error error;
  error.code = status.error_code();
  error.message = status.error_message();
  google::rpc::Status details;
  if (status.error_details().empty() || !details.ParseFromString(status.error_details())) return error;
  for (const google::protobuf::Any& any : details.details()) {
    google::rpc::ErrorInfo info;
    google::rpc::RetryInfo retry;
    google::rpc::BadRequest bad_request;
    google::rpc::QuotaFailure quota;
    if (any.Is<google::rpc::ErrorInfo>() && any.UnpackTo(&info)) {
      error.reason = info.reason();
      error.metadata.insert(info.metadata().begin(), info.metadata().end());
    } else if (any.Is<google::rpc::RetryInfo>() && any.UnpackTo(&retry)) {
      error.retry_delay = std::chrono::seconds(retry.retry_delay().seconds()) +
                          std::chrono::milliseconds(retry.retry_delay().nanos() / 1'000'000);
    } else if (any.Is<google::rpc::BadRequest>() && any.UnpackTo(&bad_request)) {
      for (const auto& field : bad_request.field_violations()) {
        error.field_violations.push_back({field.field(), field.description()});
      }
    } else if (any.Is<google::rpc::QuotaFailure>() && any.UnpackTo(&quota)) {
      for (const auto& violation : quota.violations()) {
        error.quota_violations.push_back({violation.subject(), violation.description()});
      }
    }
  }
  return error;
}

std::string CodeName(grpc::StatusCode code) {
  static constexpr const char* kNames[] = {
      "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
      "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
      "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
      "DATA_LOSS", "UNAUTHENTICATED"};
  const int number = static_cast<int>(code);
  return number >= 0 && number <= 16 ? kNames[number] : "CODE_" + std::to_string(number);
}

}  // namespace minitron::client
