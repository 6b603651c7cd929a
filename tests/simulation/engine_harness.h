// A whole engine for tests: the real EngineCore over a runner, requests of every kind, and everything a sequence shows
// to the outside as bits. What the tests of bit-exactness compare, whichever backend runs.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/model_config.h"
#include "engine/model_runner_impl.h"
#include "gtest/gtest.h"
#include "scheduler/engine_core.h"
#include "tests/engine/test_constraints.h"

namespace minitron::scheduler {

// How the work is cut up: what the output must not depend on.
struct Schedule {
  int block_size = 8;
  int num_blocks = 1024;
  int max_running = 1;
  int max_step_tokens = 64;
  int max_prefill_chunk = 64;
  int threads = 1;
  Overlap overlap = Overlap::kOff;
  AdmissionMode admission_mode = AdmissionMode::kOptimistic;
  int max_preemptions = 1000000;
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
  int64_t preemptions = 0;
  int64_t preempted_twice = 0;
  int64_t chunked_prompts = 0;
  int64_t mixed_steps = 0;
  int64_t cold_hit_tokens = 0;
  int64_t warm_hit_tokens = 0;
  int64_t rows_in_flight_at_the_end = 0;
};

inline void AppendBits(const engine::ResultRowOutput& row, Trace& trace) {
  trace.tokens.push_back(row.token_id);
  std::vector<engine::TokenLogprob> all = row.top;
  all.push_back(row.chosen);
  for (const engine::TokenLogprob& logprob : all) {
    trace.logprob_bits.push_back(uint64_t{std::bit_cast<uint32_t>(logprob.logprob)} << 32 |
                                 static_cast<uint32_t>(logprob.token_id));
    trace.logprob_bits.push_back(static_cast<uint64_t>(logprob.rank));
  }
}

// Sizes of random requests.
struct RequestSizes {
  int vocab_size = 0;
  int min_requests = 3, max_requests = 8;
  int max_prompt = 40, max_output = 20;
  int max_pool = 3;  // full sequences the crowded pool holds at most
};

// Requests with every kind of sampling, logprobs and several sequences.
inline std::vector<Request> RandomRequests(std::mt19937_64& random, const RequestSizes& sizes) {
  const auto pick = [&random](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  std::vector<Request> requests(pick(sizes.min_requests, sizes.max_requests));
  for (size_t i = 0; i < requests.size(); ++i) {
    Request& request = requests[i];
    request.id = i + 1;
    request.prompt_token_ids.resize(pick(1, sizes.max_prompt));
    for (TokenId& token : request.prompt_token_ids) token = pick(0, sizes.vocab_size - 1);
    request.max_tokens = pick(1, sizes.max_output);
    request.min_tokens = pick(0, 1) * request.max_tokens / 2;
    request.eos_token_ids = {pick(0, sizes.vocab_size - 1)};
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
    if (request.min_tokens == 0 && i % 3 == 2) {
      request.params.constraint = std::make_shared<engine::Sets>(engine::Sets::ByCount(sizes.vocab_size));
    }
  }
  return requests;
}

// Makes the runner of a schedule. Whatever it runs on outlives it.
using MakeRunner =
    std::function<std::unique_ptr<engine::ModelRunner>(const engine::RunnerLimits& limits, const Schedule& schedule)>;

// A runner and an engine core that go on from one lot of requests to the next, with their prefix cache.
class Engine : public StepSink {
 public:
  Engine(const MakeRunner& make, int max_context_tokens, const Schedule& schedule)
      : runner_(make({.block_size = schedule.block_size,
                      .num_kv_blocks = schedule.num_blocks,
                      .max_num_sequences = schedule.max_running,
                      .max_num_tokens = schedule.max_step_tokens,
                      .max_context_tokens = max_context_tokens},
                     schedule)),
        core_(Options(schedule), runner_.get(), this, [] { return TimePoint(std::chrono::seconds(1)); }),
        random_(schedule.seed) {}

  // Runs the requests to their end and returns what each sequence showed.
  Traces Run(const std::vector<Request>& requests, Marks* marks = nullptr) {
    traces_.clear();
    hit_tokens_ = 0;
    size_t next = 0;
    while (next < requests.size() || !core_.idle()) {
      while (next < requests.size() && (core_.idle() || random_() % 3 == 0)) {
        Request request = requests[next++];
        request.id += first_id_;
        EXPECT_TRUE(core_.Submit(request).ok());
      }
      core_.Step();
      if (marks != nullptr) Mark(*marks);
    }
    while (core_.Step()) continue;  // the last rows in flight
    EXPECT_EQ(core_.scheduler().kv_cache().num_used_blocks(), 0);
    first_id_ += requests.size();
    return std::exchange(traces_, {});
  }

  void OnStep(StepOutput output) override {
    for (const PromptLogprobsEvent& event : output.prompt_logprobs) {
      for (const auto& row : event.positions) AppendBits(row, traces_[{event.id - first_id_, -1}]);
    }
    for (const TokenEvent& event : output.tokens) {
      Trace& trace = traces_[{event.id - first_id_, event.index}];
      EXPECT_EQ(event.output_position, static_cast<int>(trace.tokens.size()));
      AppendBits(event.output, trace);
    }
    for (const FinishEvent& event : output.finished) {
      traces_[{event.id - first_id_, event.index}].reason = event.reason;
      preempted_twice_ += event.num_preemptions >= 2 ? 1 : 0;
    }
    if (!output.engine_error.empty()) engine_error_ = output.engine_error;
    stats_ = output.stats;
    hit_tokens_ += output.stats.num_prefix_hit_tokens;
  }

  int64_t hit_tokens() const { return hit_tokens_; }  // of the latest Run
  engine::ModelRunner& runner() { return *runner_; }
  EngineCore& core() { return core_; }
  const std::string& engine_error() const { return engine_error_; }  // empty: it has not failed

 private:
  static EngineCoreOptions Options(const Schedule& schedule) {
    EngineCoreOptions options;
    options.scheduler.max_prefill_chunk = schedule.max_prefill_chunk;
    options.scheduler.admission_mode = schedule.admission_mode;
    options.scheduler.max_preemptions = schedule.max_preemptions;
    options.overlap = schedule.overlap;
    return options;
  }

  void Mark(Marks& marks) {
    marks.preemptions += stats_.num_preemptions;
    marks.preempted_twice += std::exchange(preempted_twice_, 0);
    marks.mixed_steps += stats_.num_prompt_tokens > 0 && stats_.num_prompt_tokens < stats_.num_batch_tokens ? 1 : 0;
    marks.rows_in_flight_at_the_end += static_cast<int64_t>(core_.scheduler().retiring().size());
    for (const auto& sequence : core_.scheduler().running()) {
      const int computed = sequence->num_computed_tokens();
      marks.chunked_prompts += computed > sequence->num_cached_tokens() && computed < sequence->num_prompt_tokens();
    }
  }

  const std::unique_ptr<engine::ModelRunner> runner_;
  EngineCore core_;
  std::mt19937_64 random_;
  Traces traces_;
  StepStats stats_;
  RequestId first_id_ = 0;  // ids are used once
  int64_t hit_tokens_ = 0;
  int64_t preempted_twice_ = 0;
  std::string engine_error_;
};

inline void ExpectSame(const Traces& actual, const Traces& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (const auto& [key, trace] : expected) {
    SCOPED_TRACE("request " + std::to_string(key.first) + " sequence " + std::to_string(key.second));
    const auto found = actual.find(key);
    ASSERT_NE(found, actual.end());
    EXPECT_EQ(found->second.tokens, trace.tokens);
    EXPECT_EQ(found->second.logprob_bits, trace.logprob_bits);
    EXPECT_EQ(found->second.reason, trace.reason);
  }
}

// One seed: random requests, each alone in a new runner (what a restart or another replica gives), then all together,
// twice in one engine, with a pool in which one sequence barely fits to one that holds max_pool.
inline void ExpectSameBitsHoweverTheWorkIsCutUp(const MakeRunner& make, int max_context_tokens,
                                                const RequestSizes& sizes, const std::vector<Overlap>& overlaps,
                                                uint64_t seed, Marks& marks) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const std::vector<Request> requests = RandomRequests(random, sizes);
  const auto pick = [&random](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  Traces alone;
  for (const Request& request : requests) {
    for (auto& [key, trace] : Engine(make, max_context_tokens, Schedule{}).Run({request})) alone[key] = trace;
  }
  Schedule crowded;
  const int one_sequence = (sizes.max_prompt + sizes.max_output + crowded.block_size - 1) / crowded.block_size;
  crowded.num_blocks = pick(one_sequence, sizes.max_pool * one_sequence);
  crowded.max_running = pick(2, 8);
  crowded.max_step_tokens = pick(8, 64);
  crowded.max_prefill_chunk = pick(1, 32);
  crowded.threads = pick(1, 2);
  for (const Overlap overlap : overlaps) {
    SCOPED_TRACE(overlap == Overlap::kOff ? "no overlap" : "overlap");
    crowded.overlap = overlap;
    crowded.admission_mode = pick(0, 3) == 0 ? AdmissionMode::kReserve : AdmissionMode::kOptimistic;
    crowded.max_preemptions = pick(0, 1) == 0 ? pick(0, 2) : 1000000;
    crowded.seed = random();
    Engine engine(make, max_context_tokens, crowded);
    ExpectSame(engine.Run(requests, &marks), alone);
    marks.cold_hit_tokens += engine.hit_tokens();
    ExpectSame(engine.Run(requests, &marks), alone);
    marks.warm_hit_tokens += engine.hit_tokens();
  }
}

// Prints the marks and expects each to be there.
inline void ExpectAllReached(const Marks& marks) {
  std::printf(
      "preemptions %ld, sequences preempted twice %ld, steps with a prompt half-way %ld, steps that mix prefill "
      "and decode %ld, tokens shared cold %ld and warm %ld, rows wasted %ld\n",
      marks.preemptions, marks.preempted_twice, marks.chunked_prompts, marks.mixed_steps, marks.cold_hit_tokens,
      marks.warm_hit_tokens, marks.rows_in_flight_at_the_end);
  for (const int64_t count : {marks.preemptions, marks.preempted_twice, marks.chunked_prompts, marks.mixed_steps,
                              marks.cold_hit_tokens, marks.warm_hit_tokens, marks.rows_in_flight_at_the_end}) {
    EXPECT_GT(count, 0);
  }
  EXPECT_GT(marks.warm_hit_tokens, marks.cold_hit_tokens);
}

}  // namespace minitron::scheduler
