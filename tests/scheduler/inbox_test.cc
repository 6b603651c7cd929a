#include "scheduler/inbox.h"

#include <memory>
#include <thread>

#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

Request MakeRequest(RequestId id, int num_sequences = 1) {
  Request request;
  request.id = id;
  request.num_sequences = num_sequences;
  return request;
}

TEST(InboxTest, TheBoundCountsInboxAndSchedulerTogether) {
  Inbox inbox({.max_sequences = 3});
  ASSERT_TRUE(inbox.Add(MakeRequest(1, 2)).ok());
  EXPECT_EQ(inbox.Take().adds.size(), 1u);
  EXPECT_EQ(inbox.num_queued(), 2);  // taken, but nobody said that they run
  EXPECT_FALSE(inbox.Add(MakeRequest(2, 2)).ok());
  auto started = std::make_shared<Sequence>(std::make_shared<const Request>(MakeRequest(1, 2)), 0, 0);
  started->Start(0, engine::kNone, TimePoint{});
  inbox.ReportLeft({started}, TimePoint{});
  EXPECT_TRUE(inbox.Add(MakeRequest(3, 2)).ok());
  EXPECT_EQ(inbox.num_live(), 4);
}

TEST(InboxTest, AbortsAreTakenWhenTheQueueIsFull) {
  Inbox inbox({.max_sequences = 1});
  ASSERT_TRUE(inbox.Add(MakeRequest(1)).ok());
  for (RequestId id = 0; id < 10; ++id) inbox.Abort({.id = id});
  EXPECT_EQ(inbox.Take().aborts.size(), 10u);
}

TEST(InboxTest, CloseWakesTheWaiter) {
  Inbox inbox({.max_sequences = 1});
  std::thread closer([&] { inbox.Close(); });
  EXPECT_FALSE(inbox.WaitForWork());
  closer.join();
  EXPECT_EQ(inbox.Add(MakeRequest(1)).GetPayload(kReasonTypeUrl), absl::Cord(kReasonDraining));
}

TEST(InboxTest, AddWakesTheWaiter) {
  Inbox inbox({.max_sequences = 1});
  std::thread adder([&] { EXPECT_TRUE(inbox.Add(MakeRequest(1)).ok()); });
  EXPECT_TRUE(inbox.WaitForWork());
  adder.join();
}

TEST(InboxTest, FailLosesWhatIsLive) {
  Inbox inbox({.max_sequences = 4});
  ASSERT_TRUE(inbox.Add(MakeRequest(1)).ok());
  EXPECT_FALSE(inbox.WaitIdle(TimePoint{}));
  inbox.Fail();
  EXPECT_TRUE(inbox.WaitIdle(TimePoint{}));
  EXPECT_EQ(inbox.Add(MakeRequest(2)).code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace minitron::scheduler
