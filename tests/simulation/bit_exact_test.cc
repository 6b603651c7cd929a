// The promise end to end: the real scheduler over the real CPU engine gives a request the same bits alone, in a full
// batch, chunked, preempted and recomputed. Tokens, logprobs and ranks are compared as bits.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/cpu/cpu_model_runner.h"
#include "gtest/gtest.h"
#include "scheduler/batch_builder.h"
#include "scheduler/scheduler.h"
#include "tests/engine/random_model.h"

namespace minitron::scheduler {
namespace {

constexpr int kNumSeeds = 60;
constexpr int kMaxPrompt = 40;
constexpr int kMaxOutput = 20;
constexpr int kBlockSize = 8;

// How the work is cut up: what the output must not depend on.
struct Schedule {
  int num_blocks = 1024;
  int max_running = 1;
  int max_step_tokens = 64;
  int max_prefill_chunk = 64;
  int threads = 1;
  uint64_t seed = 0;  // arrival steps
};

// Everything one sequence showed to the outside, as bits.
struct Trace {
  std::vector<TokenId> tokens;
  std::vector<uint64_t> logprob_bits;
  FinishReason reason = FinishReason::kError;
  friend bool operator==(const Trace&, const Trace&) = default;
};

// By request and sequence index; index -1 is the prompt's logprobs.
using Traces = std::map<std::pair<RequestId, int>, Trace>;

// States that a run must reach for its result to mean anything.
struct Marks {
  int preemptions = 0;
  int chunked_prompts = 0;
  int mixed_steps = 0;
  int shared_tokens = 0;
};

void AppendBits(const engine::ResultRowOutput& row, Trace& trace) {
  trace.tokens.push_back(row.token_id);
  std::vector<engine::TokenLogprob> all = row.top;
  all.push_back(row.chosen);
  for (const engine::TokenLogprob& logprob : all) {
    trace.logprob_bits.push_back(uint64_t{std::bit_cast<uint32_t>(logprob.logprob)} << 32 |
                                 static_cast<uint32_t>(logprob.token_id));
    trace.logprob_bits.push_back(static_cast<uint64_t>(logprob.rank));
  }
}

class BitExactTest : public testing::Test {
 protected:
  BitExactTest() : model_(engine::SmallConfig(), engine::DType::kBf16, 5) {}

  std::vector<Request> RandomRequests(std::mt19937_64& random) const {
    const auto pick = [&random](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    std::vector<Request> requests(pick(3, 8));
    for (size_t i = 0; i < requests.size(); ++i) {
      Request& request = requests[i];
      request.id = i + 1;
      request.prompt_token_ids.resize(pick(1, kMaxPrompt));
      for (TokenId& token : request.prompt_token_ids) token = pick(0, model_.config().vocab_size - 1);
      request.max_tokens = pick(1, kMaxOutput);
      request.min_tokens = pick(0, 1) * request.max_tokens / 2;
      request.eos_token_ids = {pick(0, model_.config().vocab_size - 1)};
      request.num_sequences = pick(0, 3) == 0 ? pick(2, 3) : 1;
      request.num_top_logprobs = pick(-1, 3);
      request.num_prompt_top_logprobs = pick(0, 2) == 0 ? pick(0, 2) : -1;
      request.params.temperature = pick(0, 2) == 0 ? 0.0f : 0.5f + 0.25f * static_cast<float>(pick(0, 4));
      request.params.top_k = pick(0, 1) * pick(1, 40);
      request.params.top_p = pick(0, 1) == 0 ? 1.0f : 0.9f;
      request.params.repetition_penalty = pick(0, 1) == 0 ? 1.0f : 1.3f;
      request.params.frequency_penalty = pick(0, 2) == 0 ? 0.5f : 0.0f;
      request.params.seed = random();
      request.priority = pick(-1, 1);
    }
    return requests;
  }

  // Runs the requests to their end and returns what each sequence showed.
  Traces Run(const std::vector<Request>& requests, const Schedule& schedule, Marks* marks) const {
    const engine::RunnerLimits limits{.block_size = kBlockSize,
                                      .num_kv_blocks = schedule.num_blocks,
                                      .max_num_sequences = schedule.max_running,
                                      .max_num_tokens = schedule.max_step_tokens,
                                      .max_context_tokens = model_.config().max_position_embeddings};
    const auto runner =
        engine::cpu::CreateCpuModelRunner(model_.config(), model_.weights(), nullptr, limits, schedule.threads);
    Scheduler scheduler({.max_prefill_chunk = schedule.max_prefill_chunk}, RunnerLimits::Of(*runner));
    std::mt19937_64 random(schedule.seed);
    Traces traces;
    size_t next = 0;
    while (next < requests.size() || scheduler.num_live_sequences() > 0) {
      while (next < requests.size() && (scheduler.num_live_sequences() == 0 || random() % 3 == 0)) {
        scheduler.Add(requests[next++], TimePoint{});
      }
      const SchedulerOutput plan = scheduler.Schedule(TimePoint{});
      const engine::Batch batch = BuildBatch(plan);
      EXPECT_TRUE(runner->Submit(batch).ok());
      const absl::StatusOr<engine::StepResult> result = runner->Collect();
      EXPECT_TRUE(result.ok());
      Record(scheduler.Update(plan, *result, TimePoint{}), traces);
      if (marks != nullptr) Mark(plan, *marks);
    }
    return traces;
  }

  static void Record(const StepOutput& output, Traces& traces) {
    for (const PromptLogprobsEvent& event : output.prompt_logprobs) {
      for (const auto& row : event.positions) AppendBits(row, traces[{event.id, -1}]);
    }
    for (const TokenEvent& event : output.tokens) {
      Trace& trace = traces[{event.id, event.index}];
      EXPECT_EQ(event.output_position, static_cast<int>(trace.tokens.size()));
      AppendBits(event.output, trace);
    }
    for (const FinishEvent& event : output.finished) traces[{event.id, event.index}].reason = event.reason;
  }

  static void Mark(const SchedulerOutput& plan, Marks& marks) {
    marks.preemptions += static_cast<int>(plan.preempted.size());
    bool decodes = false;
    bool prefills = false;
    for (const ScheduledSequence& scheduled : plan.sequences) {
      const Sequence& sequence = *scheduled.sequence;
      const bool prefill = scheduled.first_position < sequence.num_prompt_tokens();
      (prefill ? prefills : decodes) = true;
      if (prefill && scheduled.first_position > sequence.num_cached_tokens()) ++marks.chunked_prompts;
      if (scheduled.first_position > 0 && scheduled.first_position == sequence.num_cached_tokens()) {
        marks.shared_tokens += scheduled.first_position;
      }
    }
    marks.mixed_steps += decodes && prefills ? 1 : 0;
  }

  engine::RandomModel model_;
};

TEST_F(BitExactTest, ARequestHasTheSameBitsAloneBatchedChunkedSharedAndPreempted) {
  Marks marks;
  for (uint64_t seed = 1; seed <= kNumSeeds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    const std::vector<Request> requests = RandomRequests(random);
    const auto pick = [&random](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    // From a pool in which one sequence barely fits to one that holds a few.
    const int one_sequence = (kMaxPrompt + kMaxOutput + kBlockSize - 1) / kBlockSize;
    const Schedule crowded{.num_blocks = pick(one_sequence, 3 * one_sequence),
                           .max_running = pick(2, 8),
                           .max_step_tokens = pick(8, 64),
                           .max_prefill_chunk = pick(1, 32),
                           .threads = pick(1, 2),
                           .seed = random()};
    const Traces together = Run(requests, crowded, &marks);

    Traces alone;
    for (const Request& request : requests) {
      for (auto& [key, trace] : Run({request}, Schedule{}, nullptr)) alone[key] = trace;
    }
    ASSERT_EQ(together.size(), alone.size());
    for (const auto& [key, trace] : alone) {
      const auto found = together.find(key);
      ASSERT_NE(found, together.end());
      EXPECT_EQ(found->second.tokens, trace.tokens) << "request " << key.first << " sequence " << key.second;
      EXPECT_EQ(found->second.logprob_bits, trace.logprob_bits)
          << "request " << key.first << " sequence " << key.second;
      EXPECT_EQ(found->second.reason, trace.reason) << "request " << key.first << " sequence " << key.second;
    }
    if (HasFailure()) return;
  }
  std::printf("preemptions %d, chunks after the first %d, steps that mix prefill and decode %d, shared tokens %d\n",
              marks.preemptions, marks.chunked_prompts, marks.mixed_steps, marks.shared_tokens);
  EXPECT_GT(marks.preemptions, 0);
  EXPECT_GT(marks.chunked_prompts, 0);
  EXPECT_GT(marks.mixed_steps, 0);
  EXPECT_GT(marks.shared_tokens, 0);
}

}  // namespace
}  // namespace minitron::scheduler
