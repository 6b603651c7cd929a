// The scheduler with its prefix cache, its admission modes and steps in flight.
#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "scheduler/batch_builder.h"
#include "scheduler/scheduler.h"

namespace minitron::scheduler {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr RunnerLimits kLimits = {.num_kv_blocks = 64,
                                  .block_size = 8,
                                  .max_num_tokens = 64,
                                  .max_num_sequences = 8,
                                  .max_context_tokens = 256,
                                  .vocab_size = 100};

using Plan = std::pair<RequestId, int>;

// Prompts are 1, 2, 3, ...: each is the beginning of every longer one.
Request MakeRequest(RequestId id, int num_prompt, int max_tokens) {
  Request request;
  request.id = id;
  request.prompt_token_ids.resize(num_prompt);
  std::iota(request.prompt_token_ids.begin(), request.prompt_token_ids.end(), 1);
  request.max_tokens = max_tokens;
  return request;
}

engine::StepResult Results(const SchedulerOutput& plan, TokenId token = 50) {
  engine::StepResult result;
  for (int i = 0; i < plan.num_result_rows; ++i) result.rows.emplace_back().token_id = token;
  return result;
}

std::vector<Plan> Planned(const SchedulerOutput& plan) {
  std::vector<Plan> planned;
  for (const auto& scheduled : plan.sequences) planned.emplace_back(scheduled.sequence->id(), scheduled.num_tokens);
  return planned;
}

class SchedulerCacheTest : public ::testing::Test {
 protected:
  void Make(const SchedulerOptions& options, int num_kv_blocks = kLimits.num_kv_blocks) {
    RunnerLimits limits = kLimits;
    limits.num_kv_blocks = num_kv_blocks;
    scheduler_ = std::make_unique<Scheduler>(options, limits);
  }
  StepOutput Step() {
    plan_ = scheduler_->Schedule(now_);
    return scheduler_->Update(plan_, Results(plan_), now_);
  }
  void Finish() {
    while (scheduler_->num_live_sequences() > 0) Step();
  }

  std::unique_ptr<Scheduler> scheduler_;
  SchedulerOutput plan_;
  TimePoint now_ = TimePoint(std::chrono::seconds(1));
};

TEST_F(SchedulerCacheTest, AWarmPromptComputesOnlyItsLastPartialBlock) {
  Make({});
  scheduler_->Add(MakeRequest(1, 20, 1), now_);
  EXPECT_EQ(Step().prompts_done.at(0).num_cached_tokens, 0);
  scheduler_->Add(MakeRequest(2, 20, 1), now_);
  const StepOutput output = Step();
  EXPECT_THAT(Planned(plan_), ElementsAre(Plan{2, 4}));
  EXPECT_EQ(output.prompts_done.at(0).num_cached_tokens, 16);
  EXPECT_EQ(output.finished.at(0).num_cached_tokens, 16);
  EXPECT_EQ(output.stats.num_prefix_query_tokens, 20);
  EXPECT_EQ(output.stats.num_prefix_hit_tokens, 16);
  EXPECT_EQ(output.stats.num_blocks_cached, 2);
}

TEST_F(SchedulerCacheTest, BlocksOfABrokenRowAreNotSharedAlsoWhenItsRequestEndedMeanwhile) {
  Make({});
  scheduler_->Add(MakeRequest(1, 20, 2), now_);
  plan_ = scheduler_->Schedule(now_);
  engine::StepResult broken = Results(plan_);
  broken.rows.back().failed = true;
  scheduler_->Abort(1);
  EXPECT_EQ(scheduler_->Update(plan_, broken, now_).finished.at(0).reason, FinishReason::kCancelled);
  scheduler_->Add(MakeRequest(2, 20, 1), now_);
  EXPECT_EQ(Step().prompts_done.at(0).num_cached_tokens, 0);
}

TEST_F(SchedulerCacheTest, APromptOfWholeBlocksRunsItsLastBlockAgain) {
  Make({});
  scheduler_->Add(MakeRequest(1, 16, 1), now_);
  Step();
  scheduler_->Add(MakeRequest(2, 16, 1), now_);
  Step();
  EXPECT_THAT(Planned(plan_), ElementsAre(Plan{2, 8}));
}

TEST_F(SchedulerCacheTest, SharingGoesAsFarAsTheOptionSays) {
  for (const PrefixSharing sharing : {PrefixSharing::kRequest, PrefixSharing::kTenant, PrefixSharing::kAll}) {
    Make({.prefix_sharing = sharing});
    RequestId id = 0;
    const auto num_cached = [&](const char* tenant, const char* salt) {
      Request request = MakeRequest(++id, 20, 1);
      request.tenant = tenant;
      request.cache_salt = salt;
      scheduler_->Add(request, now_);
      return Step().finished.at(0).num_cached_tokens;
    };
    EXPECT_EQ(num_cached("a", ""), 0);
    EXPECT_EQ(num_cached("a", ""), sharing == PrefixSharing::kRequest ? 0 : 16);
    EXPECT_EQ(num_cached("b", ""), sharing == PrefixSharing::kAll ? 16 : 0);
    EXPECT_EQ(num_cached("a", "s"), 0);
    EXPECT_EQ(num_cached("a:", "s"), sharing == PrefixSharing::kAll ? 16 : 0);  // no tenant can spell another's salt
  }
}

TEST_F(SchedulerCacheTest, ARequestWaitsForTheBlockAnotherIsComputing) {
  Make({.max_prefill_chunk = 16});
  scheduler_->Add(MakeRequest(1, 20, 5), now_);
  scheduler_->Add(MakeRequest(2, 20, 5), now_);
  scheduler_->Add(MakeRequest(3, 4, 5), now_);
  Step();
  EXPECT_THAT(Planned(plan_), ElementsAre(Plan{1, 16}, Plan{3, 4}));  // who shares nothing overtakes
  Step();
  EXPECT_THAT(Planned(plan_), ElementsAre(Plan{3, 1}, Plan{1, 4}, Plan{2, 4}));
}

TEST_F(SchedulerCacheTest, WaitingForOthersBlocksEndsAfterTheStepsItWouldTakeToComputeThem) {
  Make({.max_running_sequences = 3, .max_step_tokens = 3, .max_prefill_chunk = 20});
  scheduler_->Add(MakeRequest(1, 20, 5), now_);  // gets 3 tokens a step: 16 take it 6 steps
  Request other = MakeRequest(2, 20, 5);
  other.priority = -1;
  scheduler_->Add(other, now_);
  Step();
  EXPECT_THAT(Planned(plan_), ElementsAre(Plan{1, 3}));
  ASSERT_EQ(scheduler_->waiting().size(), 1u);
  Finish();
  EXPECT_EQ(scheduler_->kv_cache().num_used_blocks(), 0);
}

TEST_F(SchedulerCacheTest, RowsWhoseLogprobsAreWantedAreComputed) {
  Make({});
  scheduler_->Add(MakeRequest(1, 40, 1), now_);
  Step();
  Request scored = MakeRequest(2, 40, 0);
  scored.num_prompt_top_logprobs = 0;
  scored.prompt_logprobs_start = 30;  // from row 29: blocks of rows 0..23 are shared
  scheduler_->Add(scored, now_);
  const StepOutput output = Step();
  EXPECT_THAT(Planned(plan_), ElementsAre(Plan{2, 16}));
  EXPECT_EQ(output.prompt_logprobs.at(0).positions.size(), 10u);
}

TEST_F(SchedulerCacheTest, APreemptedSequenceFindsItsOwnBlocksAgain) {
  Make({}, 6);
  scheduler_->Add(MakeRequest(1, 8, 30), now_);
  Request other = MakeRequest(2, 16, 10);
  other.cache_salt = "other";
  scheduler_->Add(other, now_);
  while (plan_.preempted.empty()) Step();
  EXPECT_THAT(plan_.preempted, ElementsAre(2u));
  scheduler_->Abort(1);
  Step();
  EXPECT_THAT(Planned(plan_), ElementsAre(Plan{2, 1}));  // all but the row of its last token was kept
  EXPECT_EQ(plan_.sequences[0].first_position, 24);
}

TEST_F(SchedulerCacheTest, ReservationAdmitsOnlyWhatCanRunToItsEnd) {
  Make({.admission_mode = AdmissionMode::kReserve}, 6);
  scheduler_->Add(MakeRequest(1, 8, 24), now_);  // 4 blocks
  Request other = MakeRequest(2, 8, 16);         // 3 blocks: one too many
  other.cache_salt = "other";
  scheduler_->Add(other, now_);
  Step();
  EXPECT_THAT(Planned(plan_), ElementsAre(Plan{1, 8}));
  EXPECT_EQ(scheduler_->kv_cache().num_used_blocks(), 1);  // reserved is not taken: the cache may use it meanwhile
  while (scheduler_->num_live_sequences() > 0) EXPECT_EQ(Step().stats.num_preemptions, 0);
}

TEST_F(SchedulerCacheTest, AfterItsLastPreemptionASequenceIsReservedForAndLeftAlone) {
  Make({.max_preemptions = 1}, 6);
  scheduler_->Add(MakeRequest(1, 8, 30), now_);
  Request other = MakeRequest(2, 16, 24);
  other.cache_salt = "other";
  scheduler_->Add(other, now_);
  int num_preemptions = 0;
  while (scheduler_->num_live_sequences() > 0) {
    for (const FinishEvent& event : Step().finished) EXPECT_LE(event.num_preemptions, 1);
    num_preemptions += static_cast<int>(plan_.preempted.size());
  }
  EXPECT_EQ(num_preemptions, 1);
}

TEST_F(SchedulerCacheTest, AStepIsPlannedAheadAndTheLastTokenIsForeseen) {
  Make({});
  scheduler_->Add(MakeRequest(1, 4, 2), now_);
  const SchedulerOutput first = scheduler_->Schedule(now_);
  const SchedulerOutput second = scheduler_->Schedule(now_);
  EXPECT_THAT(Planned(second), ElementsAre(Plan{1, 1}));
  EXPECT_EQ(second.sequences[0].previous_result_row, 0);
  EXPECT_EQ(scheduler_->Update(first, Results(first), now_).tokens.size(), 1u);
  EXPECT_THAT(Planned(scheduler_->Schedule(now_)), IsEmpty());  // its last token is in flight
  EXPECT_EQ(scheduler_->Update(second, Results(second), now_).finished.at(0).reason, FinishReason::kLength);
}

TEST_F(SchedulerCacheTest, AStopWastesOneRowAndItsBlocksComeBackWithIt) {
  Make({});
  Request request = MakeRequest(1, 8, 5);
  request.stop_token_ids = {50};
  scheduler_->Add(request, now_);
  const SchedulerOutput first = scheduler_->Schedule(now_);
  const SchedulerOutput second = scheduler_->Schedule(now_);
  EXPECT_EQ(scheduler_->Update(first, Results(first), now_).finished.at(0).reason, FinishReason::kStopToken);
  EXPECT_EQ(scheduler_->num_live_sequences(), 0);
  EXPECT_EQ(scheduler_->kv_cache().num_used_blocks(), 2);
  EXPECT_TRUE(scheduler_->CheckConsistent().ok());
  EXPECT_THAT(Planned(scheduler_->Schedule(now_)), IsEmpty());
  const StepOutput output = scheduler_->Update(second, Results(second), now_);
  EXPECT_TRUE(output.tokens.empty() && output.finished.empty());
  EXPECT_EQ(scheduler_->kv_cache().num_used_blocks(), 0);
}

TEST_F(SchedulerCacheTest, WhoWaitsForEachTokenIsNotPlannedAhead) {
  Make({});
  Request request = MakeRequest(1, 4, 3);
  request.waits_for_each_token = true;
  scheduler_->Add(request, now_);
  scheduler_->Add(MakeRequest(2, 4, 3), now_);
  const SchedulerOutput first = scheduler_->Schedule(now_);
  const SchedulerOutput second = scheduler_->Schedule(now_);
  EXPECT_THAT(Planned(second), ElementsAre(Plan{2, 1}));
  scheduler_->Update(first, Results(first), now_);
  EXPECT_THAT(Planned(scheduler_->Schedule(now_)), ElementsAre(Plan{1, 1}, Plan{2, 1}));
}

TEST_F(SchedulerCacheTest, APreemptionWaitsForTheRowsInFlight) {
  Make({}, 3);
  scheduler_->Add(MakeRequest(1, 8, 16), now_);
  Request other = MakeRequest(2, 8, 16);
  other.cache_salt = "other";
  scheduler_->Add(other, now_);
  const SchedulerOutput first = scheduler_->Schedule(now_);
  const SchedulerOutput second = scheduler_->Schedule(now_);  // 1 takes the last block
  EXPECT_THAT(Planned(second), ElementsAre(Plan{1, 1}));
  EXPECT_TRUE(scheduler_->wants_drain());
  EXPECT_EQ(scheduler_->Update(first, Results(first), now_).tokens.size(), 2u);
  scheduler_->Update(second, Results(second), now_);
  EXPECT_FALSE(scheduler_->wants_drain());
  EXPECT_THAT(scheduler_->Schedule(now_).preempted, ElementsAre(2u));
  EXPECT_EQ(scheduler_->waiting().at(0)->num_output_tokens(), 1);
}

TEST_F(SchedulerCacheTest, NothingIsSentAfterTheDeadline) {
  Make({});
  Request request = MakeRequest(1, 4, 5);
  request.deadline = now_ + std::chrono::milliseconds(1);
  scheduler_->Add(request, now_);
  plan_ = scheduler_->Schedule(now_);
  const StepOutput output = scheduler_->Update(plan_, Results(plan_), request.deadline);
  EXPECT_TRUE(output.tokens.empty() && output.prompts_done.empty());
  EXPECT_EQ(output.finished.at(0).reason, FinishReason::kDeadline);
}

}  // namespace
}  // namespace minitron::scheduler
