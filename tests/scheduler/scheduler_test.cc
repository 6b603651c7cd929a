#include "scheduler/scheduler.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minitron::scheduler {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr RunnerLimits kLimits = {.num_kv_blocks = 64,
                                  .block_size = 8,
                                  .max_num_tokens = 64,
                                  .max_num_sequences = 8,
                                  .max_context_tokens = 256,
                                  .vocab_size = 100};

Request MakeRequest(RequestId id, int num_prompt, int max_tokens, int num_sequences = 1) {
  Request request;
  request.id = id;
  request.prompt_token_ids.assign(num_prompt, 4);
  request.max_tokens = max_tokens;
  request.num_sequences = num_sequences;
  return request;
}

// Results as a runner would give them: prompt rows echo the target, sampled rows give `token`.
engine::StepResult Results(const SchedulerOutput& plan, TokenId token = 50) {
  engine::StepResult result;
  for (const ScheduledSequence& scheduled : plan.sequences) {
    for (int i = 0; i < scheduled.num_result_rows(); ++i) {
      result.rows.emplace_back().token_id = token;
    }
  }
  return result;
}

class SchedulerTest : public ::testing::Test {
 protected:
  void Make(const SchedulerOptions& options, const RunnerLimits& limits = kLimits) {
    scheduler_ = std::make_unique<Scheduler>(options, limits);
  }
  StepOutput Step(TokenId token = 50) {
    plan_ = scheduler_->Schedule(now_);
    return scheduler_->Update(plan_, Results(plan_, token), now_);
  }
  std::vector<std::pair<RequestId, int>> Planned() const {
    std::vector<std::pair<RequestId, int>> planned;
    for (const auto& scheduled : plan_.sequences) planned.emplace_back(scheduled.sequence->id(), scheduled.num_tokens);
    return planned;
  }

  std::unique_ptr<Scheduler> scheduler_;
  SchedulerOutput plan_;
  TimePoint now_ = TimePoint(std::chrono::seconds(1));
};

using Plan = std::pair<RequestId, int>;

TEST_F(SchedulerTest, LongPromptsAreChunkedAndDecodesComeFirst) {
  Make({.max_step_tokens = 16, .max_prefill_chunk = 12});
  scheduler_->Add(MakeRequest(1, 4, 10), now_);
  scheduler_->Add(MakeRequest(2, 40, 10), now_);
  Step();
  EXPECT_THAT(Planned(), ElementsAre(Plan{1, 4}, Plan{2, 12}));
  Step();
  EXPECT_THAT(Planned(), ElementsAre(Plan{1, 1}, Plan{2, 12}));
}

TEST_F(SchedulerTest, HigherPriorityIsAdmittedFirstThenArrival) {
  Make({.max_running_sequences = 2});
  scheduler_->Add(MakeRequest(1, 4, 10), now_);
  scheduler_->Add(MakeRequest(2, 4, 10), now_);
  Request urgent = MakeRequest(3, 4, 10);
  urgent.priority = 1;
  scheduler_->Add(urgent, now_);
  Step();
  EXPECT_THAT(Planned(), ElementsAre(Plan{3, 4}, Plan{1, 4}));
}

TEST_F(SchedulerTest, YoungestOfTheLowestPriorityIsPreemptedAndResumesWithItsTokens) {
  RunnerLimits limits = kLimits;
  limits.num_kv_blocks = 4;
  Make({}, limits);
  scheduler_->Add(MakeRequest(1, 8, 20), now_);
  Request other = MakeRequest(2, 16, 16);
  other.cache_salt = "other";
  scheduler_->Add(other, now_);
  Step();  // 1 + 2 blocks
  Step();  // 1 takes the last block; 2 needs a third and is its own victim
  EXPECT_THAT(plan_.preempted, ElementsAre(2u));
  ASSERT_EQ(scheduler_->waiting().size(), 1u);
  EXPECT_EQ(scheduler_->waiting()[0]->num_output_tokens(), 1);
  std::vector<int> positions;
  while (scheduler_->num_live_sequences() > 0) {
    for (const TokenEvent& event : Step().tokens) {
      if (event.id == 2) positions.push_back(event.output_position);
    }
  }
  ASSERT_EQ(positions.size(), 15u);
  for (size_t i = 0; i < positions.size(); ++i) EXPECT_EQ(positions[i], static_cast<int>(i) + 1);
}

TEST_F(SchedulerTest, FollowersWaitForTheLeaderAndShareItsFullBlocks) {
  Make({.max_prefill_chunk = 10});
  scheduler_->Add(MakeRequest(1, 20, 5, 3), now_);
  Step();
  EXPECT_THAT(Planned(), ElementsAre(Plan{1, 10}));
  Step();
  EXPECT_THAT(Planned(), ElementsAre(Plan{1, 10}));
  Step();
  EXPECT_THAT(Planned(), ElementsAre(Plan{1, 1}, Plan{1, 4}, Plan{1, 4}));
  EXPECT_EQ(scheduler_->kv_cache().num_used_blocks(), 2 + 3);
}

TEST_F(SchedulerTest, WhenTheLeaderIsAbortedTheNextGoesOnFromItsLastFullBlock) {
  Make({.max_prefill_chunk = 10});
  scheduler_->Add(MakeRequest(1, 20, 5, 3), now_);
  Step();
  scheduler_->AbortSequence(1, 0);
  EXPECT_EQ(Step().finished.at(0).reason, FinishReason::kCancelled);
  ASSERT_EQ(plan_.sequences.size(), 1u);
  EXPECT_EQ(plan_.sequences[0].sequence->index(), 1);
  EXPECT_EQ(plan_.sequences[0].first_position, 8);
}

TEST_F(SchedulerTest, ResultsOfASequenceAbortedMeanwhileAreDropped) {
  Make({});
  scheduler_->Add(MakeRequest(1, 4, 5), now_);
  plan_ = scheduler_->Schedule(now_);
  scheduler_->Abort(1);
  const StepOutput output = scheduler_->Update(plan_, Results(plan_), now_);
  EXPECT_TRUE(output.tokens.empty() && output.prompts_done.empty());
  EXPECT_EQ(output.finished.at(0).reason, FinishReason::kCancelled);
  EXPECT_EQ(scheduler_->kv_cache().num_used_blocks(), 0);
}

TEST_F(SchedulerTest, ExpiredRequestsLeaveTheQueueAtOnce) {
  Make({.max_running_sequences = 1});
  scheduler_->Add(MakeRequest(1, 4, 50), now_);
  Request hurried = MakeRequest(2, 4, 50);
  hurried.deadline = now_ + std::chrono::milliseconds(1);
  scheduler_->Add(hurried, now_);
  EXPECT_TRUE(Step().finished.empty());
  now_ = hurried.deadline;
  const StepOutput output = Step();
  ASSERT_EQ(output.finished.size(), 1u);
  EXPECT_EQ(output.finished[0].reason, FinishReason::kDeadline);
  EXPECT_EQ(output.finished[0].first_scheduled, TimePoint{});
}

TEST_F(SchedulerTest, PromptLogprobsComeInBoundedChunksThenPromptDone) {
  Make({.max_logprob_rows_per_step = 4});
  Request request = MakeRequest(1, 12, 0);
  request.num_prompt_top_logprobs = 0;
  request.prompt_logprobs_start = 3;  // positions 3..11 from rows 2..10
  scheduler_->Add(request, now_);
  StepOutput output = Step();
  ASSERT_EQ(output.prompt_logprobs.size(), 1u);
  EXPECT_EQ(output.prompt_logprobs[0].first_position, 3);
  EXPECT_EQ(output.prompt_logprobs[0].positions.size(), 4u);
  EXPECT_EQ(Step().prompt_logprobs.at(0).first_position, 7);
  output = Step();
  EXPECT_EQ(output.prompt_logprobs.at(0).positions.size(), 1u);
  EXPECT_EQ(output.prompts_done.size(), 1u);
  EXPECT_TRUE(output.tokens.empty());
  EXPECT_EQ(output.finished.at(0).reason, FinishReason::kLength);
}

TEST_F(SchedulerTest, AFailedRowEndsOnlyItsSequence) {
  Make({});
  scheduler_->Add(MakeRequest(1, 4, 5), now_);
  scheduler_->Add(MakeRequest(2, 4, 5), now_);
  scheduler_->Add(MakeRequest(3, 4, 5), now_);
  plan_ = scheduler_->Schedule(now_);
  engine::StepResult result = Results(plan_);
  result.rows[0].failed = true;
  result.rows[1].token_id = kLimits.vocab_size;  // a broken sampler
  const StepOutput output = scheduler_->Update(plan_, result, now_);
  ASSERT_EQ(output.finished.size(), 2u);
  EXPECT_EQ(output.finished[0].reason, FinishReason::kError);
  EXPECT_EQ(output.finished[1].reason, FinishReason::kError);
  ASSERT_EQ(output.tokens.size(), 1u);
  EXPECT_EQ(output.tokens[0].id, 3u);
}

TEST_F(SchedulerTest, StopTokenIsEmittedCountedAndNamed) {
  Make({});
  Request request = MakeRequest(1, 4, 5);
  request.stop_token_ids = {50};
  scheduler_->Add(request, now_);
  const StepOutput output = Step(50);
  EXPECT_EQ(output.tokens.size(), 1u);
  EXPECT_EQ(output.finished.at(0).reason, FinishReason::kStopToken);
  EXPECT_EQ(output.finished.at(0).stop_token, 50);
  EXPECT_EQ(output.finished.at(0).num_output_tokens, 1);
}

TEST_F(SchedulerTest, ASequenceBudgetAboveTheTokenBudgetIsCut) {
  Make({.max_running_sequences = 8, .max_step_tokens = 3});
  for (RequestId id = 1; id <= 6; ++id) scheduler_->Add(MakeRequest(id, 1, 10), now_);
  for (int i = 0; i < 5; ++i) Step();
  EXPECT_THAT(Planned(), ElementsAre(Plan{1, 1}, Plan{2, 1}, Plan{3, 1}));
}

TEST(SchedulerOptionsTest, OutOfRangeNamesFieldValueAndRange) {
  EXPECT_TRUE(SchedulerOptions{}.Validate().ok());
  EXPECT_EQ(SchedulerOptions{.max_running_sequences = -1}.Validate().message(),
            "max_running_sequences -1 outside [0, 65536]");
  EXPECT_THAT(std::string(SchedulerOptions{.max_logprob_rows_per_step = 0}.Validate().message()),
              HasSubstr("max_logprob_rows_per_step 0 outside [1,"));
}

}  // namespace
}  // namespace minitron::scheduler
