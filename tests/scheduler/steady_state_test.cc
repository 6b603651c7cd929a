// The engine loop at 256 decoding sequences of 2k context: no heap allocation, with and without overlap.
#include <vector>

#include "gtest/gtest.h"
#include "scheduler/engine_core.h"
#include "tests/testing/counting_new.h"
#include "tests/testing/instant_runner.h"

namespace minitron::scheduler {
namespace {

constexpr int kNumSequences = 256;
constexpr int kContext = 2048;
constexpr int kBlockSize = 16;

// Hands each output's memory back, as the output thread does.
class RecyclingSink : public StepSink {
 public:
  void OnStep(StepOutput output) override {
    num_tokens += static_cast<int>(output.tokens.size());
    recycled_ = std::move(output);
  }
  StepOutput Recycled() override { return std::move(recycled_); }

  int num_tokens = 0;

 private:
  StepOutput recycled_;
};

class SteadyStateTest : public ::testing::TestWithParam<Overlap> {};

TEST_P(SteadyStateTest, DecodingAllocatesNothing) {
  minitron::testing::InstantRunner runner(kNumSequences * (kContext / kBlockSize + 8), kBlockSize,
                                          kNumSequences * kContext, kNumSequences, GetParam() == Overlap::kOn);
  RecyclingSink sink;
  EngineCoreOptions options;
  options.scheduler.max_prefill_chunk = kContext;
  options.queue.max_prompt_tokens = int64_t{kNumSequences} * kContext;  // all of them come at once
  options.overlap = GetParam();
  EngineCore core(options, &runner, &sink, [] { return TimePoint(std::chrono::seconds(1)); });
  for (int i = 0; i < kNumSequences; ++i) {
    Request request;
    request.id = i + 1;
    request.prompt_token_ids.assign(kContext - 20, i);
    request.max_tokens = 120;
    request.eos_token_ids = {1};
    ASSERT_TRUE(core.Submit(request).ok());
  }
  while (sink.num_tokens < 20 * kNumSequences) ASSERT_TRUE(core.Step());
  // Blocks are completed, hashed and entered, and new ones taken: two for each sequence in these steps.
  ASSERT_EQ(core.scheduler().running().size(), size_t{kNumSequences});
  const int num_tokens = sink.num_tokens;
  const int64_t before = minitron::testing::NumAllocations();
  for (int step = 0; step < 32; ++step) core.Step();
  EXPECT_EQ(minitron::testing::NumAllocations(), before);
  EXPECT_EQ(sink.num_tokens, num_tokens + 32 * kNumSequences);
}

INSTANTIATE_TEST_SUITE_P(Overlap, SteadyStateTest, ::testing::Values(Overlap::kOff, Overlap::kOn));

}  // namespace
}  // namespace minitron::scheduler
