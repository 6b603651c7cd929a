// Errors on the wire: grpc::Status with google.rpc details, made from absl::Status with payloads. Any thread.
//
// Inside the server an error is an absl::Status. What a client may need to handle it by program travels as payloads
// (reason, field, numbers); ToGrpcStatus turns them into ErrorInfo, BadRequest, RetryInfo and QuotaFailure.
#pragma once

#include <grpcpp/grpcpp.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace minitron::server {

inline constexpr char kErrorDomain[] = "minitron";
// The trailer that tells gRPC's own retry policy how long to wait.
inline constexpr char kRetryPushbackTrailer[] = "grpc-retry-pushback-ms";

// Machine-readable causes (ErrorInfo.reason).
namespace reason {
inline constexpr char kInvalidField[] = "INVALID_FIELD";
inline constexpr char kPromptTooLong[] = "PROMPT_TOO_LONG";
inline constexpr char kRequestTooLarge[] = "REQUEST_TOO_LARGE";  // can never fit the KV cache
inline constexpr char kModelNotFound[] = "MODEL_NOT_FOUND";
inline constexpr char kDuplicateRequestId[] = "DUPLICATE_REQUEST_ID";
inline constexpr char kQueueFull[] = "QUEUE_FULL";                 // sequences
inline constexpr char kQueuedTokensFull[] = "QUEUED_TOKENS_FULL";  // prompt tokens
inline constexpr char kQueuedBytesFull[] = "QUEUED_BYTES_FULL";
inline constexpr char kDeadlineUnreachable[] = "DEADLINE_UNREACHABLE";  // the wait is longer than the time left
inline constexpr char kDraining[] = "DRAINING";
inline constexpr char kEngineFailure[] = "ENGINE_FAILURE";
inline constexpr char kNonFiniteLogits[] = "NON_FINITE_LOGITS";
inline constexpr char kDeadlineExceeded[] = "DEADLINE_EXCEEDED";
inline constexpr char kFirstTokenTimeout[] = "FIRST_TOKEN_TIMEOUT";
inline constexpr char kCancelled[] = "CANCELLED";
inline constexpr char kWriteStalled[] = "WRITE_STALLED";
inline constexpr char kNoToken[] = "NO_TOKEN";
inline constexpr char kUnknownToken[] = "UNKNOWN_TOKEN";
inline constexpr char kRoleMissing[] = "ROLE_MISSING";
inline constexpr char kUnsupported[] = "UNSUPPORTED";  // by this model or backend
inline constexpr char kQuotaExceeded[] = "QUOTA_EXCEEDED";
}  // namespace reason

using Metadata = std::vector<std::pair<std::string, std::string>>;

// Adds (or replaces) the reason, the offending field or a number. Requires: !status.ok().
void SetReason(absl::Status& status, const std::string& reason);
void SetField(absl::Status& status, const std::string& field);
void AddMetadata(absl::Status& status, const std::string& key, const std::string& value);

// The reason of a status; empty when it has none.
std::string GetReason(const absl::Status& status);
// The field of a status; empty when it has none.
std::string GetField(const absl::Status& status);

// INVALID_ARGUMENT for `field`; `metadata` usually has "value" (or "actual") and "limit".
absl::Status FieldError(const std::string& field, const std::string& message, const Metadata& metadata = {},
                        const std::string& reason = reason::kInvalidField);

// A status of `code` with `reason`.
absl::Status ReasonError(absl::StatusCode code, const std::string& reason, const std::string& message,
                         const Metadata& metadata = {});

// UNAVAILABLE: another server may take the call at once.
absl::Status DrainingError();

// The wire form: always one ErrorInfo; BadRequest with a field; RetryInfo when trying again makes sense; QuotaFailure
// when RESOURCE_EXHAUSTED. OK gives OK.
grpc::Status ToGrpcStatus(const absl::Status& status);

// How long a client should wait before it tries again; nullopt when trying again is pointless. What SetRetryDelayMs or
// the scheduler said, or a default for UNAVAILABLE.
void SetRetryDelayMs(absl::Status& status, int delay_ms);
std::optional<int> RetryDelayMs(const absl::Status& status);

// The upper-case name of a code ("INVALID_ARGUMENT"), as used in metrics.
const char* CodeName(grpc::StatusCode code);

}  // namespace minitron::server
