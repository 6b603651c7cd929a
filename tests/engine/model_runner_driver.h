// Runs requests through a runner under a schedule, a scheduler in small: what the tests of the runner's contract
// compare.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/cpu/cpu_model_runner.h"
#include "engine/cpu/packed_weights.h"
#include "engine/model_runner.h"
#include "gtest/gtest.h"
#include "tests/engine/random_model.h"

namespace minitron::engine {

inline constexpr int kMaxSequences = 6;
inline constexpr int kMaxTokens = 48;
inline constexpr int kNumBlocks = 64;

// What one request is: everything its output may depend on.
struct Job {
  std::vector<TokenId> prompt;
  SamplingParams params;
  int num_output = 0;
  bool prompt_logprobs = false;
};

// Everything a request's rows produced, as bits.
struct Trace {
  std::vector<TokenId> tokens;
  std::vector<uint64_t> logprob_bits;  // chosen and top of every row; prompt rows first
  friend bool operator==(const Trace&, const Trace&) = default;
};

// How the work is cut up: what the output must not depend on.
struct Schedule {
  int threads = 1;
  int block_size = 16;
  int max_running = 1;            // sequences per batch
  int max_chunk = 1000;           // prompt tokens of one sequence per step
  uint64_t seed = 1;              // chunk sizes, block ids, order in the batch
  bool overlap = false;           // submit a step before the one before is collected
  bool constrained_wait = false;  // constrained jobs are not submitted ahead of their last token
  DType dtype = DType::kBf16;
  ActivationType rows = ActivationType::kF32;
};

struct Running {
  int job = 0;
  int slot = 0;
  int num_computed = 0;
  int num_sampled = 0;  // submitted
  int last_result_row = -1;
  std::vector<TokenId> tokens;  // prompt and collected output
  std::vector<BlockId> blocks;
};

struct InFlight {
  Batch batch;
  std::vector<int> job_of_row;
};

inline uint64_t Bits(const TokenLogprob& logprob) {
  return uint64_t{std::bit_cast<uint32_t>(logprob.logprob)} ^
         uint64_t { static_cast<uint32_t>(logprob.token_id) } << 40 ^
         uint64_t { static_cast<uint32_t>(logprob.rank) } << 32;
}

// Makes the runner under test. The model outlives it.
using MakeRunner = std::function<std::unique_ptr<ModelRunner>(const RandomModel& model, const RunnerLimits& limits)>;

// Runs jobs through a runner under a schedule, a scheduler in small.
class Driver {
 public:
  // Over the CPU backend and the small model, packed if the schedule's type says so.
  Driver(const std::vector<Job>& jobs, const Schedule& schedule)
      : Driver(jobs, schedule, SmallConfig(), SourceType(schedule.dtype)) {
    NemotronWeights weights = model_.weights();
    if (IsPanels(schedule.dtype)) {
      cpu::ThreadPool pool(2);
      const cpu::PackPlan plan(weights, schedule.dtype == DType::kInt8Panels   ? Quantization::kInt8
                                        : schedule.dtype == DType::kInt4Panels ? Quantization::kInt4
                                                                               : Quantization::kOff);
      packed_ = cpu::PackedWeights::Pack(weights, nullptr, plan, false, pool).value();
      weights = packed_->weights();
    }
    runner_ = cpu::CreateCpuModelRunner(model_.config(), weights, nullptr, limits_, schedule.threads);
  }

  // Over another backend and model.
  Driver(const std::vector<Job>& jobs, const Schedule& schedule, const NemotronConfig& config, const MakeRunner& make)
      : Driver(jobs, schedule, config, schedule.dtype) {
    runner_ = make(model_, limits_);
  }

  std::vector<Trace> Run() {
    size_t next_job = 0;
    while (true) {
      while (next_job < jobs_.size() && static_cast<int>(running_.size()) < schedule_.max_running) {
        Start(static_cast<int>(next_job++));
      }
      if (running_.empty()) break;
      SubmitStep();
      if (in_flight_.size() == (schedule_.overlap ? 2u : 1u)) CollectStep();
      Retire();
    }
    while (!in_flight_.empty()) CollectStep();
    return traces_;
  }

 private:
  static DType SourceType(DType dtype) { return IsPanels(dtype) ? DType::kBf16 : dtype; }

  Driver(const std::vector<Job>& jobs, const Schedule& schedule, const NemotronConfig& config, DType dtype)
      : jobs_(jobs),
        schedule_(schedule),
        random_(schedule.seed),
        model_(config, dtype, 77),
        limits_{.block_size = schedule.block_size,
                .num_kv_blocks = kNumBlocks,
                .max_num_sequences = kMaxSequences,
                .max_num_tokens = kMaxTokens,
                .max_context_tokens = config.max_position_embeddings,
                .activation_type = schedule.rows} {
    for (BlockId block = 0; block < kNumBlocks; ++block) free_blocks_.push_back(block);
    std::shuffle(free_blocks_.begin(), free_blocks_.end(), random_);
    for (int slot = 0; slot < kMaxSequences; ++slot) free_slots_.push_back(slot);
    traces_.resize(jobs.size());
  }

  void Start(int job) {
    Running& sequence = running_.emplace_back();
    sequence.job = job;
    sequence.slot = free_slots_.back();
    free_slots_.pop_back();
    sequence.tokens = jobs_[job].prompt;
  }

  int TargetLength(const Running& sequence) const {
    return static_cast<int>(jobs_[sequence.job].prompt.size()) + sequence.num_sampled;
  }

  void SubmitStep() {
    auto step = std::make_unique<InFlight>();
    std::shuffle(running_.begin(), running_.end(), random_);
    int budget = kMaxTokens;
    for (Running& sequence : running_) {
      const int wanted = TargetLength(sequence) - sequence.num_computed;
      const int chunk = static_cast<int>(random_() % schedule_.max_chunk) + 1;
      const bool waits = schedule_.constrained_wait && jobs_[sequence.job].params.constraint != nullptr &&
                         static_cast<int>(sequence.tokens.size()) < TargetLength(sequence);
      const int count = waits ? 0 : std::min({wanted, chunk, budget});
      if (count == 0) {
        sequence.last_result_row = -1;
        continue;
      }
      budget -= count;
      AddSequence(sequence, count, *step);
    }
    if (step->batch.num_tokens() == 0) return CollectStep();  // all wait
    ASSERT_TRUE(runner_->Submit(step->batch).ok());
    in_flight_.push_back(std::move(step));
  }

  void AddSequence(Running& sequence, int count, InFlight& step) {
    const Job& job = jobs_[sequence.job];
    Batch& batch = step.batch;
    const int prompt_len = static_cast<int>(job.prompt.size());
    const int sequence_index = batch.num_sequences();
    if (sequence.num_computed == 0)
      batch.history_resets.push_back({sequence.slot, job.prompt, {}, job.params.constraint.get()});
    const int end = sequence.num_computed + count;
    while (static_cast<int>(sequence.blocks.size()) * schedule_.block_size < end) {
      sequence.blocks.push_back(free_blocks_.back());
      free_blocks_.pop_back();
    }
    for (int position = sequence.num_computed; position < end; ++position) {
      const int row = batch.num_tokens();
      const bool known = position < static_cast<int>(sequence.tokens.size());
      batch.token_ids.push_back(known ? sequence.tokens[position] : TokenFromPreviousResult(sequence.last_result_row));
      batch.positions.push_back(position);
      batch.slot_mapping.push_back(int64_t{sequence.blocks[position / schedule_.block_size]} * schedule_.block_size +
                                   position % schedule_.block_size);
      if (job.prompt_logprobs && position + 1 < prompt_len) {
        batch.results.push_back(
            {.token_row = row, .sequence = sequence_index, .target = job.prompt[position + 1], .num_top_logprobs = 2});
        step.job_of_row.push_back(sequence.job);
      }
    }
    sequence.num_computed = end;
    if (end == TargetLength(sequence)) {
      sequence.last_result_row = static_cast<int>(batch.results.size());
      batch.results.push_back({.token_row = batch.num_tokens() - 1,
                               .sequence = sequence_index,
                               .num_top_logprobs = 3,
                               .history_slot = sequence.slot,
                               .output_position = sequence.num_sampled,
                               .params = &job.params});
      step.job_of_row.push_back(sequence.job);
      ++sequence.num_sampled;
    }
    batch.query_start.push_back(batch.num_tokens());
    batch.block_ids.insert(batch.block_ids.end(), sequence.blocks.begin(), sequence.blocks.end());
    batch.block_start.push_back(static_cast<int>(batch.block_ids.size()));
    batch.kv_lens.push_back(end);
  }

  void CollectStep() {
    const std::unique_ptr<InFlight> step = std::move(in_flight_.front());
    in_flight_.erase(in_flight_.begin());
    const auto result = runner_->Collect();
    ASSERT_TRUE(result.ok());
    ASSERT_EQ(result->rows.size(), step->job_of_row.size());
    for (size_t r = 0; r < result->rows.size(); ++r) {
      const ResultRowOutput& output = result->rows[r];
      const int job = step->job_of_row[r];
      ASSERT_FALSE(output.failed);
      Trace& trace = traces_[job];
      trace.logprob_bits.push_back(Bits(output.chosen));
      for (const TokenLogprob& top : output.top) trace.logprob_bits.push_back(Bits(top));
      if (step->batch.results[r].target != kNone) continue;
      trace.tokens.push_back(output.token_id);
      for (Running& sequence : running_) {
        if (sequence.job == job) sequence.tokens.push_back(output.token_id);
      }
    }
  }

  void Retire() {
    std::erase_if(running_, [&](const Running& sequence) {
      if (sequence.num_sampled < jobs_[sequence.job].num_output) return false;
      free_blocks_.insert(free_blocks_.begin(), sequence.blocks.begin(), sequence.blocks.end());
      free_slots_.push_back(sequence.slot);
      return true;
    });
  }

  const std::vector<Job>& jobs_;
  const Schedule schedule_;
  std::mt19937_64 random_;
  RandomModel model_;
  const RunnerLimits limits_;
  std::unique_ptr<cpu::PackedWeights> packed_;
  std::unique_ptr<ModelRunner> runner_;
  std::vector<BlockId> free_blocks_;
  std::vector<int> free_slots_;
  std::vector<Running> running_;
  std::vector<std::unique_ptr<InFlight>> in_flight_;
  std::vector<Trace> traces_;
};

// Prompts of up to max_prompt tokens, all kinds of sampling.
inline std::vector<Job> RandomJobs(uint64_t seed, int count, int max_prompt = 60) {
  std::mt19937_64 random(seed);
  std::vector<Job> jobs(count);
  for (Job& job : jobs) {
    job.prompt.resize(1 + random() % max_prompt);
    for (TokenId& token : job.prompt) token = static_cast<TokenId>(random() % 131);
    job.num_output = 1 + static_cast<int>(random() % 12);
    job.params.seed = random();
    job.params.temperature = random() % 3 == 0 ? 0.0f : 0.9f;
    if (random() % 2 == 0) job.params.top_k = 20;
    if (random() % 2 == 0) job.params.top_p = 0.9f;
    if (random() % 2 == 0) job.params.repetition_penalty = 1.3f;
    if (random() % 2 == 0) job.params.frequency_penalty = 0.4f;
    job.prompt_logprobs = random() % 2 == 0;
  }
  return jobs;
}

inline void ExpectSame(const std::vector<Trace>& expected, const std::vector<Trace>& actual, const std::string& what) {
  ASSERT_EQ(expected.size(), actual.size());
  for (size_t job = 0; job < expected.size(); ++job) {
    EXPECT_EQ(expected[job].tokens, actual[job].tokens) << what << ", job " << job;
    EXPECT_EQ(expected[job].logprob_bits, actual[job].logprob_bits) << what << ", job " << job;
  }
}

}  // namespace minitron::engine
