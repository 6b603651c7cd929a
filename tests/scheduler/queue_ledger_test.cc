#include "scheduler/queue_ledger.h"

#include <deque>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;

const TimePoint kStart = TimePoint(seconds(1000));

Request MakeRequest(const std::string& tenant, int num_prompt = 10, int num_sequences = 1, int priority = 0) {
  Request request;
  request.tenant = tenant;
  request.prompt_token_ids.assign(num_prompt, 4);
  request.max_tokens = 10;
  request.num_sequences = num_sequences;
  request.priority = priority;
  request.arrival = kStart;
  return request;
}

std::string Payload(const absl::Status& status, const char* url) {
  const auto payload = status.GetPayload(url);
  return payload.has_value() ? std::string(*payload) : "";
}

TEST(QueueLedgerTest, ASequenceBoundRefusesWithDepthAndLimit) {
  QueueLedger ledger({.max_sequences = 3});
  ledger.Enter(MakeRequest("a", 10, 2));
  EXPECT_TRUE(ledger.Check(ArrivalOf(MakeRequest("a"))).ok());
  const absl::Status refused = ledger.Check(ArrivalOf(MakeRequest("a", 10, 2)));
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("2 sequences queued, limit 3, 2 more asked for"));
  EXPECT_EQ(Payload(refused, kReasonTypeUrl), kReasonQueueFull);
  EXPECT_EQ(Payload(refused, kRetryTypeUrl), "500");
  EXPECT_EQ(Payload(refused, kQueueDepthTypeUrl), "2");
}

TEST(QueueLedgerTest, ATokenBoundRefusesButAnEmptyQueueTakesAnyPrompt) {
  QueueLedger ledger({.max_prompt_tokens = 100});
  EXPECT_TRUE(ledger.Check(ArrivalOf(MakeRequest("a", 5000))).ok());
  ledger.Enter(MakeRequest("a", 60));
  EXPECT_TRUE(ledger.Check(ArrivalOf(MakeRequest("a", 40))).ok());
  const absl::Status refused = ledger.Check(ArrivalOf(MakeRequest("a", 41)));
  EXPECT_EQ(Payload(refused, kReasonTypeUrl), kReasonQueuedTokensFull);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("60 prompt tokens queued, limit 100, 41 more"));
}

TEST(QueueLedgerTest, AByteBoundRefuses) {
  const Request request = MakeRequest("a", 1000, 4);
  QueueLedger ledger({.max_bytes = WorkOf(request).num_bytes});
  ledger.Enter(request);
  EXPECT_EQ(Payload(ledger.Check(ArrivalOf(MakeRequest("a"))), kReasonTypeUrl), kReasonQueuedBytesFull);
}

TEST(QueueLedgerTest, WhatEntersLeavesWithNothingLeft) {
  QueueLedger ledger({});
  const Request request = MakeRequest("a", 30, 3);
  ledger.Enter(request);
  EXPECT_EQ(ledger.queued().num_sequences, 3);
  EXPECT_EQ(ledger.queued().num_prompt_tokens, 30);
  for (const int index : {2, 0, 1}) ledger.Leave(request, index, true);
  EXPECT_EQ(ledger.queued().num_sequences, 0);
  EXPECT_EQ(ledger.queued().num_prompt_tokens, 0);
  EXPECT_EQ(ledger.queued().num_bytes, 0);
}

TEST(QueueLedgerTest, AFloodLeavesRoomForOthersOnceTheyAreThere) {
  QueueLedger ledger({.max_sequences = 10});
  for (int i = 0; i < 9; ++i) ledger.Enter(MakeRequest("flood"));
  EXPECT_TRUE(ledger.Check(ArrivalOf(MakeRequest("flood"))).ok());  // alone, it may have all
  ledger.Enter(MakeRequest("other"));
  const absl::Status refused = ledger.Check(ArrivalOf(MakeRequest("flood")));
  EXPECT_EQ(Payload(refused, kReasonTypeUrl), kReasonQueueFull);
  for (int i = 0; i < 5; ++i) ledger.Leave(MakeRequest("flood"), 0, true);
  // Five places are free, but they are not all the flood's any more.
  EXPECT_TRUE(ledger.Check(ArrivalOf(MakeRequest("flood"))).ok());
  ledger.Enter(MakeRequest("flood"));
  EXPECT_THAT(std::string(ledger.Check(ArrivalOf(MakeRequest("flood"))).message()), HasSubstr("its part is 5 of 10"));
  EXPECT_TRUE(ledger.Check(ArrivalOf(MakeRequest("other"))).ok());
}

TEST(QueueLedgerTest, TenantsThatStayAwayGiveTheirPartBack) {
  QueueLedger ledger({.max_sequences = 10});
  ledger.Enter(MakeRequest("other"));
  ledger.Leave(MakeRequest("other"), 0, true);
  for (int i = 0; i < 5; ++i) ledger.Enter(MakeRequest("flood"));
  EXPECT_FALSE(ledger.Check(ArrivalOf(MakeRequest("flood"))).ok());
  ledger.Leave(MakeRequest("flood"), 0, true);
  Request later = MakeRequest("flood");
  later.arrival = kStart + QueueLedger::kTenantMemory;
  for (int i = 0; i < 5; ++i) {
    EXPECT_TRUE(ledger.Check(ArrivalOf(later)).ok());
    ledger.Enter(later);
  }
  EXPECT_EQ(ledger.num_tenants(), 1);
}

TEST(QueueLedgerTest, InventedTenantsDoNotFillMemory) {
  QueueLedger ledger({});
  for (int i = 0; i < 5000; ++i) {
    const Request request = MakeRequest("tenant" + std::to_string(i));
    ledger.Enter(request);
    ledger.Leave(request, 0, true);
  }
  EXPECT_LE(ledger.num_tenants(), static_cast<int>(QueueLedger::kMaxIdleTenants) + 1);
}

// A queue that starts one sequence of 10 prompt tokens every 100 ms, with `depth` waiting.
class BusyLedger {
 public:
  explicit BusyLedger(int depth) {
    for (int i = 0; i < depth; ++i) ledger.Enter(MakeRequest("a"));
    ledger.Tick(now);
    for (int i = 0; i < 200; ++i) {
      now += milliseconds(100);
      ledger.Enter(MakeRequest("a"));
      ledger.Leave(MakeRequest("a"), 0, true);
      ledger.Tick(now);
    }
  }
  QueueLedger ledger{{}};
  TimePoint now = kStart;
};

TEST(QueueLedgerTest, TheWaitIsWhatIsAheadAtTheObservedRate) {
  BusyLedger busy(20);
  EXPECT_NEAR(busy.ledger.sequences_per_second(), 10, 0.5);
  EXPECT_NEAR(busy.ledger.prompt_tokens_per_second(), 100, 5);
  const double wait = std::chrono::duration<double>(busy.ledger.EstimateWait("a", 0)).count();
  EXPECT_NEAR(wait, 2.0, 0.1);
  EXPECT_LE(wait, 2.0);                                           // on the low side
  EXPECT_EQ(busy.ledger.EstimateWait("a", 1), Duration::zero());  // nothing of that class or above
  EXPECT_EQ(busy.ledger.EstimateWait("b", 0), Duration::zero());  // nothing of that tenant
}

TEST(QueueLedgerTest, ADeadlineThatTheQueueCannotMeetIsRefusedWithTheTimeToComeBack) {
  BusyLedger busy(20);
  Request request = MakeRequest("a");
  request.arrival = busy.now;
  request.deadline = busy.now + milliseconds(1500);
  const absl::Status refused = busy.ledger.Check(ArrivalOf(request));
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Payload(refused, kReasonTypeUrl), kReasonDeadlineUnreachable);
  EXPECT_EQ(Payload(refused, kQueueDepthTypeUrl), "20");
  EXPECT_NEAR(std::stoi(Payload(refused, kRetryTypeUrl)), 450, 60);
  EXPECT_NEAR(std::stoi(Payload(refused, kEstimatedWaitTypeUrl)), 1950, 60);
  request.deadline = busy.now + milliseconds(2500);
  EXPECT_TRUE(busy.ledger.Check(ArrivalOf(request)).ok());
  request.first_token_deadline = busy.now + milliseconds(1500);
  EXPECT_FALSE(busy.ledger.Check(ArrivalOf(request)).ok());
}

TEST(QueueLedgerTest, APassedDeadlineIsExceeded) {
  QueueLedger ledger({});
  Request request = MakeRequest("a");
  request.deadline = request.arrival;
  EXPECT_EQ(ledger.Check(ArrivalOf(request)).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(QueueLedgerTest, NothingIsRefusedForADeadlineBeforeTheRateIsKnown) {
  QueueLedger ledger({});
  for (int i = 0; i < 200; ++i) ledger.Enter(MakeRequest("a"));
  Request request = MakeRequest("a");
  request.deadline = request.arrival + milliseconds(1);
  EXPECT_TRUE(ledger.Check(ArrivalOf(request)).ok());
}

TEST(QueueLedgerTest, StartsWithoutAWaitDoNotCountAsARate) {
  QueueLedger ledger({});
  TimePoint now = kStart;
  for (int i = 0; i < 100; ++i) {
    ledger.Enter(MakeRequest("a"));
    ledger.Leave(MakeRequest("a"), 0, true);
    ledger.Tick(now += milliseconds(100));
  }
  EXPECT_EQ(ledger.sequences_per_second(), 0);
}

}  // namespace
}  // namespace minitron::scheduler
