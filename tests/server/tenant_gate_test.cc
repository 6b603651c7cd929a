#include "server/tenant_gate.h"

#include <gtest/gtest.h>

#include "server/grpc_status.h"

namespace minitron::server {
namespace {

class TenantGateTest : public ::testing::Test {
 protected:
  TenantLimits limits_;
  scheduler::TimePoint now_{std::chrono::hours(1)};
  int64_t settled_ = 0;
  TenantGate gate_{[this](const std::string& tenant) { return tenant == "alice" ? limits_ : TenantLimits{}; },
                   [this] { return now_; }, [this](const std::string&, int64_t used) { settled_ += used; }};
};

TEST_F(TenantGateTest, StreamsBeyondTheLimitAreRefusedUntilOneEnds) {
  limits_.max_streams = 2;
  auto first = gate_.OpenStream("alice");
  auto second = gate_.OpenStream("alice");
  ASSERT_TRUE(first.ok() && second.ok());
  const absl::Status refused = gate_.OpenStream("alice").status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused));
  EXPECT_EQ(GetReason(refused), reason::kQuotaExceeded);
  EXPECT_EQ(GetField(refused), "streams");
  EXPECT_TRUE(RetryDelayMs(refused).has_value());
  EXPECT_TRUE(gate_.OpenStream("bob").ok()) << "others are not concerned";
  first->reset();
  EXPECT_TRUE(gate_.OpenStream("alice").ok());
}

TEST_F(TenantGateTest, QueuedSequencesCountUntilTheyStart) {
  limits_.max_queued = 3;
  auto charge = gate_.Admit("alice", 2, 10);
  ASSERT_TRUE(charge.ok());
  EXPECT_FALSE(gate_.Admit("alice", 2, 10).ok());
  auto third = gate_.Admit("alice", 1, 10);
  EXPECT_TRUE(third.ok());
  (*charge)->OnStarted();
  (*charge)->OnStarted();  // once is enough
  EXPECT_TRUE(gate_.Admit("alice", 2, 10).ok());
}

TEST_F(TenantGateTest, TokensAreChargedInFullAndRefundedForWhatWasNotUsed) {
  limits_.tokens_per_minute = 100;
  auto charge = gate_.Admit("alice", 1, 80);
  ASSERT_TRUE(charge.ok());
  EXPECT_FALSE(gate_.Admit("alice", 1, 30).ok());
  (*charge)->Settle(50);
  EXPECT_EQ(settled_, 50);
  auto next = gate_.Admit("alice", 1, 30);
  ASSERT_TRUE(next.ok());
  EXPECT_FALSE(gate_.Admit("alice", 1, 21).ok());
  next->reset();  // the engine refused it
  EXPECT_TRUE(gate_.Admit("alice", 1, 50).ok());
}

TEST_F(TenantGateTest, TheRetryHintIsWhenTheTokensHaveFlownBack) {
  limits_.tokens_per_minute = 60;
  auto charge = gate_.Admit("alice", 1, 60);
  ASSERT_TRUE(charge.ok());
  (*charge)->Settle(60);
  const absl::Status refused = gate_.Admit("alice", 1, 5).status();
  ASSERT_EQ(RetryDelayMs(refused), 5000);
  now_ += std::chrono::milliseconds(4900);
  EXPECT_FALSE(gate_.Admit("alice", 1, 5).ok());
  now_ += std::chrono::milliseconds(110);
  EXPECT_TRUE(gate_.Admit("alice", 1, 5).ok());
}

TEST_F(TenantGateTest, ARequestLargerThanAMinutesWorthHasNoHintToComeBack) {
  limits_.tokens_per_minute = 60;
  const absl::Status refused = gate_.Admit("alice", 1, 61).status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused));
  EXPECT_FALSE(RetryDelayMs(refused).has_value());
}

TEST_F(TenantGateTest, NothingIsKeptOfTenantsThatHoldNothing) {
  limits_.tokens_per_minute = 60;
  {
    auto stream = gate_.OpenStream("alice");
    auto charge = gate_.Admit("alice", 1, 60);
    ASSERT_TRUE(charge.ok());
    (*charge)->Settle(0);
    EXPECT_EQ(gate_.num_tenants(), 1u);
  }
  EXPECT_EQ(gate_.num_tenants(), 0u);
}

}  // namespace
}  // namespace minitron::server
