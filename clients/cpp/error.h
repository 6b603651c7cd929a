// Error: a failed call, with the google.rpc details this server sends.
#pragma once

#include <grpcpp/support/status.h>

#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace minitron::client {

// One wrong field of a request, or one exceeded quota.
struct Violation {
  std::string subject;  // path of the field, or holder of the quota
  std::string description;
};

struct Error {
  grpc::StatusCode code = grpc::StatusCode::UNKNOWN;
  std::string message;
  std::string reason;  // UPPER_SNAKE_CASE of ErrorInfo; empty when the error does not come from a minitron server
  std::map<std::string, std::string> metadata;
  std::vector<Violation> field_violations;
  std::vector<Violation> quota_violations;
  std::optional<std::chrono::milliseconds> retry_delay;  // wait at least this long before another try
};

// Requires: !status.ok(). Details that cannot be parsed or are not known are left out; never fails.
Error DecodeError(const grpc::Status& status);

// "INVALID_ARGUMENT"; "CODE_42" for a number that is not known.
std::string CodeName(grpc::StatusCode code);

}  // namespace minitron::client
