#include "server/grpc_status.h"

#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/support/error_details.h>
#include <gtest/gtest.h>

#include "scheduler/queue_ledger.h"

namespace minitron::server {
namespace {

template <typename T>
bool Find(const grpc::Status& status, T& out) {
  google::rpc::Status wire;
  if (!grpc::ExtractErrorDetails(status, &wire).ok()) return false;
  for (const auto& detail : wire.details()) {
    if (detail.Is<T>()) return detail.UnpackTo(&out);
  }
  return false;
}

TEST(GrpcStatusTest, FieldErrorCarriesFieldValueAndLimit) {
  const grpc::Status status = ToGrpcStatus(FieldError("x.y", "3 outside [0, 2]", {{"value", "3"}, {"limit", "2"}}));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.error_message(), "x.y: 3 outside [0, 2]");
  google::rpc::ErrorInfo info;
  ASSERT_TRUE(Find(status, info));
  EXPECT_EQ(info.reason(), "INVALID_FIELD");
  EXPECT_EQ(info.domain(), "minitron");
  EXPECT_EQ(info.metadata().at("value"), "3");
  EXPECT_EQ(info.metadata().at("limit"), "2");
  google::rpc::BadRequest bad;
  ASSERT_TRUE(Find(status, bad));
  ASSERT_EQ(bad.field_violations_size(), 1);
  EXPECT_EQ(bad.field_violations(0).field(), "x.y");
  EXPECT_EQ(bad.field_violations(0).description(), "3 outside [0, 2]");
}

TEST(GrpcStatusTest, UnavailableCarriesRetryInfo) {
  const absl::Status full = ReasonError(absl::StatusCode::kUnavailable, reason::kQueueFull, "full");
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(Find(ToGrpcStatus(full), retry));
  EXPECT_EQ(retry.retry_delay().nanos(), 500000000);
  EXPECT_EQ(RetryDelayMs(full), 500);
  EXPECT_EQ(RetryDelayMs(absl::InternalError("x")), std::nullopt);
}

TEST(GrpcStatusTest, RefusalsOfTheQueueCarryItsOwnNumbers) {
  scheduler::QueueLedger ledger({.max_sequences = 1});
  scheduler::Request request;
  request.prompt_token_ids = {1};
  ledger.Enter(request);
  const absl::Status refused = ledger.Check(scheduler::ArrivalOf(request));
  const grpc::Status wire = ToGrpcStatus(refused);
  EXPECT_EQ(wire.error_code(), grpc::StatusCode::UNAVAILABLE);
  google::rpc::ErrorInfo info;
  ASSERT_TRUE(Find(wire, info));
  EXPECT_EQ(info.reason(), reason::kQueueFull);
  EXPECT_EQ(info.metadata().at("queue_depth"), "1");
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(Find(wire, retry));
  EXPECT_EQ(RetryDelayMs(refused), 500);
  EXPECT_STREQ(scheduler::kReasonDeadlineUnreachable, reason::kDeadlineUnreachable);
  EXPECT_STREQ(scheduler::kReasonQueuedTokensFull, reason::kQueuedTokensFull);
  EXPECT_STREQ(scheduler::kReasonQueuedBytesFull, reason::kQueuedBytesFull);
}

TEST(GrpcStatusTest, ResourceExhaustedCarriesQuotaFailure) {
  google::rpc::QuotaFailure quota;
  ASSERT_TRUE(Find(ToGrpcStatus(absl::ResourceExhaustedError("too much")), quota));
  EXPECT_EQ(quota.violations_size(), 1);
}

TEST(GrpcStatusTest, EveryErrorHasAReason) {
  for (int code = 1; code <= 16; ++code) {
    google::rpc::ErrorInfo info;
    const grpc::Status status = ToGrpcStatus(absl::Status(static_cast<absl::StatusCode>(code), "m"));
    EXPECT_EQ(static_cast<int>(status.error_code()), code);
    ASSERT_TRUE(Find(status, info));
    EXPECT_FALSE(info.reason().empty());
  }
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
}

}  // namespace
}  // namespace minitron::server
