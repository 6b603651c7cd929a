#include "scheduler/batch_builder.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "scheduler/scheduler.h"

namespace minitron::scheduler {
namespace {

using ::testing::ElementsAre;

constexpr RunnerLimits kLimits = {.num_kv_blocks = 16,
                                  .block_size = 8,
                                  .max_num_tokens = 64,
                                  .max_num_sequences = 4,
                                  .max_context_tokens = 100,
                                  .vocab_size = 100};

TEST(BatchBuilderTest, ChunkAndDecodeRowsBecomeArrays) {
  Scheduler scheduler({.max_prefill_chunk = 9}, kLimits);
  Request request;
  request.id = 1;
  request.prompt_token_ids = {10, 11};
  request.max_tokens = 5;
  request.min_tokens = 2;
  request.eos_token_ids = {1};
  request.params.presence_penalty = 0.5f;
  scheduler.Add(request, TimePoint{});
  SchedulerOutput plan = scheduler.Schedule({});
  engine::Batch batch = BuildBatch(plan);
  ASSERT_EQ(batch.history_resets.size(), 1u);
  EXPECT_THAT(batch.history_resets[0].prompt, ElementsAre(10, 11));
  ASSERT_NE(batch.results.at(0).banned_tokens, nullptr);
  EXPECT_THAT(*batch.results[0].banned_tokens, ElementsAre(1));
  engine::StepResult result;
  result.rows.emplace_back().token_id = 30;
  scheduler.Update(plan, result, {});

  Request scored;
  scored.id = 2;
  scored.prompt_token_ids = {20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30};
  scored.max_tokens = 0;
  scored.num_prompt_top_logprobs = 2;
  scored.prompt_logprobs_start = 8;
  scheduler.Add(scored, TimePoint{});
  plan = scheduler.Schedule({});
  batch = BuildBatch(plan);
  EXPECT_THAT(batch.token_ids, ElementsAre(30, 20, 21, 22, 23, 24, 25, 26, 27, 28));
  EXPECT_THAT(batch.positions, ElementsAre(2, 0, 1, 2, 3, 4, 5, 6, 7, 8));
  EXPECT_THAT(batch.query_start, ElementsAre(0, 1, 10));
  EXPECT_THAT(batch.block_start, ElementsAre(0, 1, 3));
  EXPECT_THAT(batch.kv_lens, ElementsAre(3, 9));
  EXPECT_EQ(batch.slot_mapping[0], int64_t{8} * batch.block_ids[0] + 2);
  EXPECT_EQ(batch.slot_mapping[9], int64_t{8} * batch.block_ids[2]);
  EXPECT_TRUE(batch.history_resets.empty());
  ASSERT_EQ(batch.results.size(), 3u);
  EXPECT_EQ(batch.results[0].output_position, 1);
  EXPECT_EQ(batch.results[0].target, engine::kNone);
  EXPECT_EQ(batch.results[1].token_row, 8);  // position 7 predicts position 8
  EXPECT_EQ(batch.results[1].target, 28);
  EXPECT_EQ(batch.results[2].token_row, 9);
  EXPECT_EQ(batch.results[2].target, 29);
  EXPECT_EQ(batch.results[2].num_top_logprobs, 2);
  EXPECT_EQ(batch.results[2].params, nullptr);
}

TEST(BatchBuilderTest, ATokenNotReadYetIsNamedByItsResultRow) {
  Scheduler scheduler({}, kLimits);
  for (RequestId id = 1; id <= 2; ++id) {
    Request request;
    request.id = id;
    request.prompt_token_ids = {10, 11, static_cast<TokenId>(id)};
    request.max_tokens = 3;
    scheduler.Add(request, TimePoint{});
  }
  const SchedulerOutput first = scheduler.Schedule({});
  const engine::Batch first_batch = BuildBatch(first);
  const SchedulerOutput second = scheduler.Schedule({});
  engine::Batch batch = BuildBatch(second);
  EXPECT_THAT(batch.token_ids, ElementsAre(engine::TokenFromPreviousResult(0), engine::TokenFromPreviousResult(1)));
  EXPECT_THAT(batch.positions, ElementsAre(3, 3));
  EXPECT_EQ(batch.results.at(1).output_position, 1);
  // Filled again, the same arrays say the same.
  const int64_t* memory = batch.slot_mapping.data();
  batch = BuildBatch(second, std::move(batch));
  EXPECT_THAT(batch.token_ids, ElementsAre(engine::TokenFromPreviousResult(0), engine::TokenFromPreviousResult(1)));
  EXPECT_THAT(batch.query_start, ElementsAre(0, 1, 2));
  EXPECT_EQ(batch.slot_mapping.data(), memory);
}

}  // namespace
}  // namespace minitron::scheduler
