// The whole CUDA backend in emulation, recorded steps included: the same bits under any schedule, and the CPU backend's
// tokens.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/checkpoint/checkpoint.h"
#include "engine/cpu/cpu_model_runner.h"
#include "engine/cuda/cuda_model_runner.h"
#include "engine/cuda/device.h"
#include "engine/model_config.h"
#include "engine/nemotron_weights.h"
#include "gtest/gtest.h"
#include "tests/engine/cuda/runner_fixture.h"
#include "tests/engine/model_runner_driver.h"
#include "tests/engine/test_constraints.h"

namespace minitron::engine::cuda {
namespace {

std::vector<Trace> RunJobs(const std::vector<Job>& jobs, const Schedule& schedule) {
  return Driver(jobs, schedule, CudaConfig(), &MakeCuda).Run();
}

TEST(CudaRunnerTest, BatchedEqualsAloneBitForBit) {
  const std::vector<Job> jobs = RandomJobs(2, 10);
  Schedule schedule{.max_running = kMaxSequences};
  ExpectSame(RunJobs(jobs, {}), RunJobs(jobs, schedule), "batched");
}

TEST(CudaRunnerTest, ChunkedAtAnySizeEqualsWholeBitForBit) {
  const std::vector<Job> jobs = RandomJobs(3, 3);
  const std::vector<Trace> alone = RunJobs(jobs, {});
  for (const int chunk : {1, 2, 7, 16, 21, 33}) {
    ExpectSame(alone, RunJobs(jobs, {.max_chunk = chunk}), "chunks up to " + std::to_string(chunk));
  }
}

TEST(CudaRunnerTest, BlockIdsAndBlockSizeDoNotMatter) {
  const std::vector<Job> jobs = RandomJobs(4, 4);
  const std::vector<Trace> alone = RunJobs(jobs, {});
  for (const int block_size : {8, 32, 256}) {
    ExpectSame(alone, RunJobs(jobs, {.block_size = block_size, .seed = 9}), "blocks of " + std::to_string(block_size));
  }
}

TEST(CudaRunnerTest, TokensThatStayOnTheDeviceEqualHostTokens) {
  const std::vector<Job> jobs = RandomJobs(6, 8);
  ExpectSame(RunJobs(jobs, {}), RunJobs(jobs, {.max_running = 4, .overlap = true}), "submitted ahead");
}

// A freed slot is taken while the last row of its former, constrained sequence is still in flight.
TEST(CudaRunnerTest, AConstraintHoldsAtEveryTokenAndInEveryBatch) {
  std::vector<Job> jobs = RandomJobs(9, 8, 20);
  const std::vector<Trace> unconstrained = RunJobs(jobs, {});
  const auto constraint = std::make_shared<Sets>(Sets::ByCount(CudaConfig().vocab_size));
  for (size_t job = 0; job < jobs.size(); job += 2) jobs[job].params.constraint = constraint;
  const std::vector<Trace> alone = RunJobs(jobs, {});
  const Schedule mixed{.max_running = 4, .max_chunk = 7, .overlap = true, .constrained_wait = true};
  ExpectSame(alone, RunJobs(jobs, mixed), "constrained among others");
  for (size_t job = 0; job < jobs.size(); ++job) {
    EXPECT_EQ(alone[job] == unconstrained[job], job % 2 == 1) << job;
    if (job % 2 == 1) continue;
    for (size_t i = 0; i < alone[job].tokens.size(); ++i) EXPECT_TRUE(Has(constraint->At(i), alone[job].tokens[i]));
  }
}

TEST(CudaRunnerTest, LongContextsCrossChunksWithTheSameBits) {
  std::vector<Job> jobs = RandomJobs(7, 2);
  for (Job& job : jobs) {
    job.prompt_logprobs = false;
    job.num_output = 6;
    job.prompt.resize(&job == &jobs[0] ? 253 : 510);  // the output crosses 256 and 512
    for (size_t i = 0; i < job.prompt.size(); ++i) job.prompt[i] = static_cast<TokenId>(i * 37 % 131);
  }
  const std::vector<Trace> alone = RunJobs(jobs, {});
  ExpectSame(alone, RunJobs(jobs, {.max_running = 2, .max_chunk = 48, .seed = 3}), "batched");
  ExpectSame(alone, RunJobs(jobs, {.max_running = 2, .max_chunk = 19, .seed = 4, .overlap = true}), "chunked");
}

TEST(CudaRunnerTest, RandomSchedulesEqualAloneBitForBit) {
  for (uint64_t seed = 100; seed < 104; ++seed) {
    std::mt19937_64 random(seed);
    const std::vector<Job> jobs = RandomJobs(seed, 6, 40);
    Schedule schedule{.max_running = 1 + static_cast<int>(random() % kMaxSequences),
                      .max_chunk = 1 + static_cast<int>(random() % 24),
                      .seed = seed,
                      .overlap = random() % 2 == 0};
    ExpectSame(RunJobs(jobs, {}), RunJobs(jobs, schedule), "seed " + std::to_string(seed));
  }
}

TEST(CudaRunnerTest, Fp8CachesKeepTheSameBitsInAnySchedule) {
  const std::vector<Job> jobs = RandomJobs(31, 5, 50);
  const auto run = [&jobs](const Schedule& schedule) {
    return Driver(jobs, schedule, CudaConfig(), &MakeCudaFp8).Run();
  };
  const std::vector<Trace> alone = run({});
  ExpectSame(alone, run({.max_running = kMaxSequences}), "batched");
  ExpectSame(alone, run({.max_running = 3, .max_chunk = 9, .seed = 2, .overlap = true}), "chunked");
  ExpectSame(alone, run({.block_size = 8, .max_chunk = 1}), "a token at a time");
}

#if defined(MINITRON_CUDA_EMULATION)
// The emulation aborts when a kernel that may start early does not wait for those in front.
TEST(CudaRunnerTest, KernelsOfRecordedStepsMayStartEarlyWithTheSameBits) {
  const std::vector<Job> jobs = RandomJobs(51, 3, 40);
  const auto run = [&jobs](KvCacheType kv, Quantization quantization, bool early_launch) {
    const auto make = [=](const RandomModel& model, RunnerLimits limits) {
      limits.kv_cache_type = kv;
      return *CreateCudaModelRunner(model.config(), model.weights(), limits, kDevice, MakeMatMul(),
                                    {.quantization = quantization, .early_launch = early_launch});
    };
    return Driver(jobs, {.max_running = 3}, CudaConfig(), make).Run();
  };
  for (const auto& [kv, quantization] :
       {std::pair{KvCacheType::kBf16, Quantization::kOff}, {KvCacheType::kFp8, Quantization::kInt4}}) {
    const int before = emulation::NumEarlyKernels();
    const std::vector<Trace> expected = run(kv, quantization, false);
    EXPECT_EQ(emulation::NumEarlyKernels(), before) << "off unless asked for";
    ExpectSame(expected, run(kv, quantization, true), "started early");
    EXPECT_GT(emulation::NumEarlyKernels(), before + 20);
  }
}
#endif

TEST(CudaRunnerTest, QuantizedWeightsKeepTheSameBitsInAnySchedule) {
  const std::vector<Job> jobs = RandomJobs(41, 4, 50);
  for (const Quantization quantization : {Quantization::kInt8, Quantization::kInt4, Quantization::kFp8}) {
    const auto run = [&jobs, quantization](const Schedule& schedule) {
      const auto make = [quantization](const RandomModel& model, const RunnerLimits& limits) {
        return MakeQuantized(model, limits, quantization);
      };
      return Driver(jobs, schedule, CudaConfig(), make).Run();
    };
    const std::vector<Trace> alone = run({});
    ExpectSame(alone, run({.max_running = kMaxSequences}), "batched");
    ExpectSame(alone, run({.max_running = 3, .max_chunk = 9, .seed = 2, .overlap = true}), "chunked");
  }
}

#if defined(MINITRON_CUDA_EMULATION)
TEST(CudaRunnerTest, FiberOrderDoesNotMatter) {
  const std::vector<Job> jobs = RandomJobs(5, 4, 30);
  const std::vector<Trace> expected = RunJobs(jobs, {.max_running = 3});
  for (const auto order : {emulation::Order::kReverse, emulation::Order::kRandom}) {
    emulation::SetOrder(order, 11);
    ExpectSame(expected, RunJobs(jobs, {.max_running = 3}), "fiber order");
  }
  emulation::SetOrder(emulation::Order::kForward);
}
#endif

TEST(CudaRunnerTest, F16AndF32CheckpointsAreServedAsBf16) {
  const std::vector<Job> jobs = RandomJobs(8, 3, 20);
  for (const DType dtype : {DType::kF16, DType::kF32}) {
    ExpectSame(RunJobs(jobs, {.dtype = dtype}), RunJobs(jobs, {.max_running = 3, .dtype = dtype}), DTypeName(dtype));
  }
}

// bf16 rounds each activation by up to 2^-9 of its size; through two layers and a head that is a few hundredths of a
// nat here. The CPU computes in fp32. A token may differ only where the CPU's two best are closer than that.
TEST(CudaRunnerTest, LogprobsAndGreedyTokensAreTheCpuBackendsWithinBf16) {
  constexpr double kMeanTolerance = 0.05, kTie = 0.2;
  const RandomModel model(CudaConfig(), DType::kBf16, 77);
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 16, .max_num_sequences = 2, .max_num_tokens = 128, .max_context_tokens = 128};
  const auto cpu = cpu::CreateCpuModelRunner(model.config(), model.weights(), nullptr, limits, 1);
  const auto cuda = MakeCuda(model, limits);
  std::mt19937_64 random(12);
  std::vector<TokenId> prompt(120);
  for (TokenId& token : prompt) token = static_cast<TokenId>(random() % 131);
  const SamplingParams greedy{.temperature = 0.0f};
  const StepResult expected = Score(*cpu, prompt, greedy), actual = Score(*cuda, prompt, greedy);
  double difference = 0.0;
  int decided = 0;
  for (size_t r = 0; r < expected.rows.size(); ++r) {
    const ResultRowOutput &want = expected.rows[r], &got = actual.rows[r];
    difference += std::abs(want.chosen.logprob - got.chosen.logprob) / static_cast<double>(expected.rows.size());
    if (want.top[0].logprob - want.top[1].logprob < kTie) continue;
    ++decided;
    EXPECT_EQ(got.top[0].token_id, want.top[0].token_id) << "row " << r;
  }
  EXPECT_LT(difference, kMeanTolerance);
  EXPECT_GT(decided, 80) << "too many near ties to say anything";
}

// The greedy continuation of a prompt, one recorded step per token.
std::vector<TokenId> Continue(ModelRunner& runner, std::vector<TokenId> tokens, int count) {
  const SamplingParams greedy{.temperature = 0.0f};
  const size_t prompt_len = tokens.size();
  for (int computed = 0; static_cast<int>(tokens.size() - prompt_len) < count;) {
    Batch batch;
    for (; computed < static_cast<int>(tokens.size()); ++computed) {
      batch.token_ids.push_back(tokens[computed]);
      batch.positions.push_back(computed);
      batch.slot_mapping.push_back(computed);
    }
    batch.query_start.push_back(batch.num_tokens());
    for (int block = 0; block * 16 < computed; ++block) batch.block_ids.push_back(block);
    batch.block_start.push_back(static_cast<int>(batch.block_ids.size()));
    batch.kv_lens.push_back(computed);
    batch.results = {{.token_row = batch.num_tokens() - 1, .params = &greedy}};
    EXPECT_TRUE(runner.Submit(batch).ok());
    const auto result = runner.Collect();
    tokens.push_back(result->rows[0].token_id);
  }
  return {tokens.begin() + static_cast<int64_t>(prompt_len), tokens.end()};
}

TEST(CudaRunnerTest, TheShippedModelContinuesPromptsAsOnTheCpu) {
  const std::string folder = std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny";
  const auto config = LoadNemotronConfig(folder);
  ASSERT_TRUE(config.ok());
  const auto checkpoint = Checkpoint::Open(folder);
  ASSERT_TRUE(checkpoint.ok());
  const auto weights = MapNemotronWeights(**checkpoint, *config);
  ASSERT_TRUE(weights.ok());
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 8, .max_num_sequences = 1, .max_num_tokens = 32, .max_context_tokens = 128};
  const auto cpu = cpu::CreateCpuModelRunner(*config, *weights, nullptr, limits, 1);
  const auto cuda = CreateCudaModelRunner(*config, *weights, limits, kDevice, MakeMatMul());
  ASSERT_TRUE(cuda.ok()) << cuda.status();
  for (const std::vector<TokenId>& prompt :
       {std::vector<TokenId>{5, 20, 300, 41}, std::vector<TokenId>{900, 17, 1200, 33, 64, 7, 1999, 400}}) {
    EXPECT_EQ(Continue(**cuda, prompt, 12), Continue(*cpu, prompt, 12));
  }
}

TEST(CudaRunnerTest, ASequenceThatIsNotFiniteFailsAlone) {
  const RandomModel model(CudaConfig(), DType::kF32, 5);
  constexpr TokenId kPoison = 9;
  const WeightView& embedding = model.weights().embedding;
  std::vector<float> poisoned(static_cast<const float*>(embedding.data),
                              static_cast<const float*>(embedding.data) + embedding.size());
  std::fill_n(poisoned.begin() + kPoison * embedding.cols, embedding.cols, std::nanf(""));
  NemotronWeights weights = model.weights();
  weights.embedding.data = poisoned.data();
  const RunnerLimits limits{
      .block_size = 16, .num_kv_blocks = 4, .max_num_sequences = 4, .max_num_tokens = 64, .max_context_tokens = 64};
  const auto create = [&] { return *CreateCudaModelRunner(model.config(), weights, limits, kDevice, MakeMatMul()); };
  const SamplingParams params{.seed = 3};
  const auto run = [&params](ModelRunner& runner, const std::vector<std::vector<TokenId>>& sequences) {
    Batch batch;
    for (int s = 0; s < static_cast<int>(sequences.size()); ++s) {
      for (int i = 0; i < static_cast<int>(sequences[s].size()); ++i) {
        batch.token_ids.push_back(sequences[s][i]);
        batch.positions.push_back(i);
        batch.slot_mapping.push_back(16 * s + i);
      }
      batch.results.push_back(
          {.token_row = batch.num_tokens() - 1, .sequence = s, .num_top_logprobs = 3, .params = &params});
      batch.query_start.push_back(batch.num_tokens());
      batch.block_ids.push_back(s);
      batch.block_start.push_back(s + 1);
      batch.kv_lens.push_back(static_cast<int32_t>(sequences[s].size()));
    }
    EXPECT_TRUE(runner.Submit(batch).ok());
    return runner.Collect()->rows;
  };
  const auto same = [](const ResultRowOutput& a, const ResultRowOutput& b) {
    return !a.failed && !b.failed && a.token_id == b.token_id && a.chosen == b.chosen && a.top == b.top;
  };
  const std::vector<TokenId> clean = {4, 5, 6, 7}, bad = {1, 2, kPoison, 3, 4, 5, 6};
  const ResultRowOutput expected = run(*create(), {clean})[0];
  const auto runner = create();
  const std::vector<ResultRowOutput> mixed = run(*runner, {bad, clean});
  EXPECT_TRUE(mixed[0].failed);
  EXPECT_TRUE(same(mixed[1], expected));
  EXPECT_TRUE(same(run(*runner, {clean})[0], expected)) << "in the block that held NaN";
}

}  // namespace
}  // namespace minitron::engine::cuda
