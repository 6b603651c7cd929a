#include "scheduler/sequence.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

using ::testing::ElementsAre;

std::shared_ptr<const Request> MakeRequest(int priority = 0) {
  Request request;
  request.id = 7;
  request.prompt_token_ids = {10, 11, 12};
  request.max_tokens = 4;
  request.eos_token_ids = {1};
  request.stop_token_ids = {2, 3};
  request.params.seed = 5;
  request.priority = priority;
  return std::make_shared<const Request>(request);
}

TEST(SequenceTest, PreemptionKeepsTokensAndForgetsWhatWasComputed) {
  Sequence sequence(MakeRequest(), 0, 0);
  sequence.Start(0, 3, TimePoint(Duration(5)));
  EXPECT_TRUE(sequence.history_reset_due());
  sequence.BeginStep(3, 0, 0);
  sequence.EndStep(3, 0);
  sequence.AppendOutput(20, TimePoint(Duration(6)));
  EXPECT_TRUE(sequence.is_decoding());
  EXPECT_FALSE(sequence.history_reset_due());
  sequence.Preempt();
  EXPECT_EQ(sequence.num_wanted_tokens(), 4);
  EXPECT_FALSE(sequence.is_decoding());
  EXPECT_THAT(sequence.OutputTokens(), ElementsAre(20));
  sequence.Start(2, 4, TimePoint(Duration(9)));
  EXPECT_TRUE(sequence.history_reset_due());
  const FinishEvent event = sequence.MakeFinishEvent(FinishReason::kLength, 0);
  EXPECT_EQ(event.num_preemptions, 1);
  EXPECT_EQ(event.num_cached_tokens, 0);  // of the first start
  EXPECT_EQ(event.first_scheduled, TimePoint(Duration(5)));
  EXPECT_EQ(event.first_token, TimePoint(Duration(6)));
}

TEST(SequenceTest, AnUnreadTokenCountsAsWantedUntilItsRowIsPlanned) {
  Sequence sequence(MakeRequest(), 0, 0);
  sequence.Start(0, engine::kNone, TimePoint{});
  sequence.BeginStep(3, 0, 5);
  EXPECT_EQ(sequence.num_unread_tokens(), 1);
  EXPECT_EQ(sequence.unread_row(), 5);
  EXPECT_TRUE(sequence.is_decoding());
  sequence.BeginStep(1, 0, 2);
  EXPECT_EQ(sequence.num_planned_tokens(), 4);
  EXPECT_EQ(sequence.num_steps_in_flight(), 2);
  sequence.EndStep(3, 0);
  sequence.AppendOutput(20, TimePoint{});
  EXPECT_EQ(sequence.num_computed_tokens(), 3);
  EXPECT_EQ(sequence.num_unread_tokens(), 1);
  EXPECT_EQ(sequence.num_wanted_tokens(), 1);
}

TEST(SequenceTest, EachSequenceHasItsOwnSeedAndBansAllStops) {
  const auto request = MakeRequest();
  EXPECT_EQ(Sequence(request, 0, 0).params().seed, 5u);
  EXPECT_EQ(Sequence(request, 1, 0).params().seed, SequenceSeed(5, 1));
  EXPECT_THAT(Sequence(request, 1, 0).banned_tokens(), ElementsAre(1, 2, 3));
}

TEST(ServedBeforeTest, PriorityThenPreemptedThenArrivalThenIndex) {
  const ServedBefore before;
  Sequence low(MakeRequest(0), 0, 0), high(MakeRequest(1), 0, 9), later(MakeRequest(0), 0, 1),
      follower(MakeRequest(0), 1, 0);
  EXPECT_TRUE(before(high, low));
  EXPECT_TRUE(before(low, later));
  EXPECT_TRUE(before(low, follower));
  EXPECT_TRUE(before(follower, later));
  later.Start(0, engine::kNone, TimePoint{});
  later.Preempt();
  EXPECT_TRUE(before(later, low));
  EXPECT_TRUE(before(high, later));
}

}  // namespace
}  // namespace minitron::scheduler
