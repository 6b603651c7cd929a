// A row's bits do not depend on its batch: the contract of ModelRunner, over random schedules.
#include "engine/model_runner.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/cpu/aligned_buffer.h"
#include "gtest/gtest.h"
#include "tests/engine/model_runner_driver.h"
#include "tests/engine/test_constraints.h"

namespace minitron::engine {
namespace {

struct Format {
  const char* name;
  DType dtype;
  ActivationType rows = ActivationType::kF32;
};
constexpr Format kFormats[] = {{"bf16", DType::kBf16},
                               {"f16", DType::kF16},
                               {"f32", DType::kF32},
                               {"bf16_panels", DType::kBf16Panels},
                               {"bf16_panels_rows_in_bf16", DType::kBf16Panels, ActivationType::kBf16},
                               {"int8_panels", DType::kInt8Panels},
                               {"int4_panels", DType::kInt4Panels}};

class ModelRunnerTest : public testing::TestWithParam<Format> {
 protected:
  // One request at a time, each prompt in as few steps as the batch allows.
  std::vector<Trace> Alone(const std::vector<Job>& jobs) const { return Driver(jobs, Base()).Run(); }
  Schedule Base() const { return {.dtype = GetParam().dtype, .rows = GetParam().rows}; }
};

TEST_P(ModelRunnerTest, EveryRequestGetsItsTokens) {
  const std::vector<Job> jobs = RandomJobs(1, 8);
  const std::vector<Trace> traces = Alone(jobs);
  for (size_t job = 0; job < jobs.size(); ++job) {
    EXPECT_EQ(traces[job].tokens.size(), static_cast<size_t>(jobs[job].num_output));
    const size_t prompt_rows = jobs[job].prompt_logprobs ? jobs[job].prompt.size() - 1 : 0;
    EXPECT_EQ(traces[job].logprob_bits.size(), prompt_rows * 3 + traces[job].tokens.size() * 4);
  }
}

TEST_P(ModelRunnerTest, BatchedEqualsAloneBitForBit) {
  const std::vector<Job> jobs = RandomJobs(2, 14);
  Schedule schedule = Base();
  schedule.max_running = kMaxSequences;
  ExpectSame(Alone(jobs), Driver(jobs, schedule).Run(), "batched");
}

TEST_P(ModelRunnerTest, ChunkedAtAnySizeEqualsWholeBitForBit) {
  const std::vector<Job> jobs = RandomJobs(3, 5);
  const std::vector<Trace> alone = Alone(jobs);
  for (const int chunk : {1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33}) {
    Schedule schedule = Base();
    schedule.max_chunk = chunk;
    ExpectSame(alone, Driver(jobs, schedule).Run(), "chunks up to " + std::to_string(chunk));
  }
}

TEST_P(ModelRunnerTest, BlockIdsDoNotMatter) {
  const std::vector<Job> jobs = RandomJobs(4, 5);
  const std::vector<Trace> alone = Alone(jobs);
  for (const uint64_t seed : {5, 6, 7}) {
    Schedule schedule = Base();
    schedule.seed = seed;
    ExpectSame(alone, Driver(jobs, schedule).Run(), "block order " + std::to_string(seed));
  }
}

// From 16 on no instruction set has more lanes than a block has tokens.
TEST_P(ModelRunnerTest, BlockSizeDoesNotMatterFromTheLaneCountUp) {
  const std::vector<Job> jobs = RandomJobs(8, 5);
  const std::vector<Trace> alone = Alone(jobs);
  for (const int block_size : {32, 64, 256}) {
    Schedule schedule = Base();
    schedule.block_size = block_size;
    ExpectSame(alone, Driver(jobs, schedule).Run(), "blocks of " + std::to_string(block_size));
  }
}

TEST_P(ModelRunnerTest, ThreadCountDoesNotMatter) {
  const std::vector<Job> jobs = RandomJobs(5, 6);
  const std::vector<Trace> alone = Alone(jobs);
  for (const int threads : {2, 3, 5}) {
    Schedule schedule = Base();
    schedule.threads = threads;
    schedule.max_running = 3;
    ExpectSame(alone, Driver(jobs, schedule).Run(), std::to_string(threads) + " threads");
  }
}

TEST_P(ModelRunnerTest, TokenFromPreviousResultEqualsHostToken) {
  const std::vector<Job> jobs = RandomJobs(6, 10);
  Schedule schedule = Base();
  schedule.max_running = 4;
  schedule.overlap = true;
  ExpectSame(Alone(jobs), Driver(jobs, schedule).Run(), "submitted ahead");
}

TEST_P(ModelRunnerTest, AConstraintHoldsAtEveryTokenAndInEveryBatch) {
  std::vector<Job> jobs = RandomJobs(10, 9);
  const auto constraint = std::make_shared<Sets>(Sets::ByCount(SmallConfig().vocab_size));
  for (size_t job = 0; job < jobs.size(); job += 2) jobs[job].params.constraint = constraint;
  const std::vector<Trace> alone = Alone(jobs);
  for (size_t job = 0; job < jobs.size(); job += 2) {
    for (size_t i = 0; i < alone[job].tokens.size(); ++i) EXPECT_EQ(alone[job].tokens[i] % 3, static_cast<int>(i % 3));
  }
  Schedule schedule = Base();
  schedule.max_running = 4;
  schedule.max_chunk = 7;
  schedule.overlap = true;
  ExpectSame(alone, Driver(jobs, schedule).Run(), "constrained among others");
}

TEST_P(ModelRunnerTest, NothingIsReadThatWasNotWritten) {
  const std::vector<Job> jobs = RandomJobs(9, 8);
  const std::vector<Trace> alone = Alone(jobs);
  Schedule schedule = Base();
  schedule.max_running = 4;
  schedule.max_chunk = 11;
  cpu::fresh_byte_for_testing.store(0xFF);
  EXPECT_TRUE(std::isnan(*cpu::AlignedBuffer<float>(1).data()));
  const std::vector<Trace> poisoned = Driver(jobs, schedule).Run();
  cpu::fresh_byte_for_testing.store(0);
  ExpectSame(alone, poisoned, "memory that is NaN until it is written");
}

TEST_P(ModelRunnerTest, RandomSchedulesEqualAloneBitForBit) {
  for (uint64_t seed = 100; seed < 112; ++seed) {
    std::mt19937_64 random(seed);
    const std::vector<Job> jobs = RandomJobs(seed, 8);
    Schedule schedule = Base();
    schedule.threads = 1 + static_cast<int>(random() % 3);
    schedule.max_running = 1 + static_cast<int>(random() % kMaxSequences);
    schedule.max_chunk = 1 + static_cast<int>(random() % 24);
    schedule.overlap = random() % 2 == 0;
    schedule.seed = seed;
    ExpectSame(Alone(jobs), Driver(jobs, schedule).Run(), "seed " + std::to_string(seed));
  }
}

// One sequence of `tokens` in block `block`, its last row to be sampled; appended to `batch`.
void AddWhole(const std::vector<TokenId>& tokens, BlockId block, const SamplingParams& params, Batch& batch) {
  const int sequence = batch.num_sequences();
  for (size_t i = 0; i < tokens.size(); ++i) {
    batch.token_ids.push_back(tokens[i]);
    batch.positions.push_back(static_cast<int32_t>(i));
    batch.slot_mapping.push_back(int64_t{block} * 16 + static_cast<int64_t>(i));
  }
  batch.results.push_back(
      {.token_row = batch.num_tokens() - 1, .sequence = sequence, .num_top_logprobs = 3, .params = &params});
  batch.query_start.push_back(batch.num_tokens());
  batch.block_ids.push_back(block);
  batch.block_start.push_back(static_cast<int>(batch.block_ids.size()));
  batch.kv_lens.push_back(static_cast<int>(tokens.size()));
}

TEST(ModelRunnerFailureTest, NotFiniteSequenceFailsAloneAndLeavesNoTraceInItsBlock) {
  constexpr TokenId kPoison = 9;
  RandomModel model(SmallConfig(), DType::kF32, 5);
  const WeightView& embedding = model.weights().embedding;
  std::vector<float> poisoned(static_cast<const float*>(embedding.data),
                              static_cast<const float*>(embedding.data) + embedding.size());
  std::fill_n(poisoned.begin() + kPoison * embedding.cols, embedding.cols, std::nanf(""));
  NemotronWeights weights = model.weights();
  weights.embedding.data = poisoned.data();
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 4, .max_num_sequences = 4, .max_num_tokens = 64, .max_context_tokens = 64};
  const SamplingParams params{.seed = 3};
  const auto run = [&params](ModelRunner& runner, const std::vector<std::vector<TokenId>>& sequences) {
    Batch batch;
    for (size_t i = 0; i < sequences.size(); ++i) AddWhole(sequences[i], static_cast<BlockId>(i), params, batch);
    EXPECT_TRUE(runner.Submit(batch).ok());
    return runner.Collect()->rows;
  };
  const auto same = [](const ResultRowOutput& a, const ResultRowOutput& b) {
    return !a.failed && !b.failed && a.token_id == b.token_id && a.chosen == b.chosen && a.top == b.top;
  };
  const std::vector<TokenId> clean = {4, 5, 6, 7}, bad = {1, 2, kPoison, 3, 4, 5, 6};
  const auto fresh = cpu::CreateCpuModelRunner(model.config(), weights, nullptr, limits, 1);
  const ResultRowOutput expected = run(*fresh, {clean})[0];
  const auto runner = cpu::CreateCpuModelRunner(model.config(), weights, nullptr, limits, 2);
  const std::vector<ResultRowOutput> mixed = run(*runner, {bad, clean});
  EXPECT_TRUE(mixed[0].failed);
  EXPECT_TRUE(same(mixed[1], expected));
  EXPECT_TRUE(same(run(*runner, {clean})[0], expected));  // in the block that held NaN
}

TEST(ModelRunnerLogitsTest, RowsOfLaterChunksEqualRowsAskedAlone) {
  NemotronConfig config = SmallConfig();
  config.vocab_size = 1 << 20;  // 64 MiB hold 16 rows of it
  config.hidden_size = 8;
  const RandomModel model(config, DType::kBf16, 5);
  const RunnerLimits limits{
      .block_size = 64, .num_kv_blocks = 1, .max_num_sequences = 1, .max_num_tokens = 40, .max_context_tokens = 64};
  const auto runner = cpu::CreateCpuModelRunner(config, model.weights(), nullptr, limits, 2);
  Batch batch;
  for (int i = 0; i < 40; ++i) {
    batch.token_ids.push_back(7 * i);
    batch.positions.push_back(i);
    batch.slot_mapping.push_back(i);
    batch.results.push_back({.token_row = 39 - i, .target = 1000 * i, .num_top_logprobs = 0});
  }
  batch.query_start.push_back(40);
  batch.block_ids = {0};
  batch.block_start.push_back(1);
  batch.kv_lens.push_back(40);
  ASSERT_TRUE(runner->Submit(batch).ok());
  const std::vector<ResultRowOutput> all = runner->Collect()->rows;
  const std::vector<ResultRow> rows = batch.results;
  for (const int r : {0, 15, 16, 17, 39}) {
    batch.results = {rows[r]};
    ASSERT_TRUE(runner->Submit(batch).ok());
    EXPECT_EQ(runner->Collect()->rows[0].chosen, all[r].chosen) << r;
  }
}

INSTANTIATE_TEST_SUITE_P(WeightTypes, ModelRunnerTest, testing::ValuesIn(kFormats),
                         [](const auto& format) { return format.param.name; });

}  // namespace
}  // namespace minitron::engine
