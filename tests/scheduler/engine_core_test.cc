#include "scheduler/engine_core.h"

#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/fake_model_runner.h"

namespace minitron::scheduler {
namespace {

using ::testing::HasSubstr;

// Collects events; lets a test wait for them.
class RecordingSink : public StepSink {
 public:
  void OnStep(StepOutput output) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const TokenEvent& event : output.tokens) tokens_[{event.id, event.index}].push_back(event.output.token_id);
    for (const FinishEvent& event : output.finished) finished_.push_back(event);
    if (!output.engine_error.empty()) errors_.push_back(output.engine_error);
    changed_.notify_all();
  }
  void WaitForFinished(size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return finished_.size() >= count; });
  }
  void WaitForToken(RequestId id) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return tokens_.count({id, 0}) > 0; });
  }
  void WaitForError() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return !errors_.empty(); });
  }
  std::vector<FinishEvent> finished() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return finished_;
  }
  std::vector<std::string> errors() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return errors_;
  }
  size_t num_tokens(RequestId id, int index = 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return tokens_[{id, index}].size();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::pair<RequestId, int>, std::vector<TokenId>> tokens_;
  std::vector<FinishEvent> finished_;
  std::vector<std::string> errors_;
};

Request MakeRequest(RequestId id, int num_prompt, int max_tokens, int num_sequences = 1) {
  Request request;
  request.id = id;
  for (int i = 0; i < num_prompt; ++i) request.prompt_token_ids.push_back(4 + i % 20);
  request.max_tokens = max_tokens;
  request.num_sequences = num_sequences;
  return request;
}

class EngineCoreTest : public ::testing::Test {
 protected:
  void Make(const minitron::testing::FakeModelRunnerOptions& runner_options, const EngineCoreOptions& options = {}) {
    runner_ = std::make_unique<minitron::testing::FakeModelRunner>(runner_options);
    core_ = std::make_unique<EngineCore>(options, runner_.get(), &sink_, [] { return Clock::now(); });
  }
  void TearDown() override {
    if (runner_ != nullptr) runner_->Release();
  }

  RecordingSink sink_;
  std::unique_ptr<minitron::testing::FakeModelRunner> runner_;
  std::unique_ptr<EngineCore> core_;
};

class EngineCoreThreadsTest : public EngineCoreTest, public ::testing::WithParamInterface<Overlap> {};
INSTANTIATE_TEST_SUITE_P(Overlap, EngineCoreThreadsTest, ::testing::Values(Overlap::kOff, Overlap::kOn));

TEST_P(EngineCoreThreadsTest, ManyThreadsSubmitAndEverySequenceFinishesOnce) {
  EngineCoreOptions options;
  options.overlap = GetParam();
  Make({.compute_late = true}, options);
  core_->Start();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([this, t] {
      for (int i = 0; i < 20; ++i) {
        const RequestId id = 100 * t + i + 1;
        EXPECT_TRUE(core_->Submit(MakeRequest(id, 10 + i, 5, 2)).ok());
        if (i % 3 == 0) core_->Abort(id);
        if (i % 3 == 1) core_->AbortSequence(id, 1);
        EXPECT_GE(core_->queue_depth(), 0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  core_->BeginDrain();
  EXPECT_TRUE(core_->WaitIdle(TimePoint::max()));
  EXPECT_EQ(sink_.finished().size(), 4u * 20 * 2);
  EXPECT_TRUE(core_->idle());
  EXPECT_EQ(core_->queue_depth(), 0);
  core_->Stop();
  core_->Stop();
}

TEST_F(EngineCoreTest, DrainRefusesNewRequestsAndFinishesLiveOnes) {
  Make({});
  runner_->Hold();
  core_->Start();
  ASSERT_TRUE(core_->Submit(MakeRequest(1, 4, 3)).ok());
  runner_->WaitUntilHeld();
  core_->BeginDrain();
  const absl::Status refused = core_->Submit(MakeRequest(2, 4, 3));
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(refused.GetPayload(kReasonTypeUrl), absl::Cord(kReasonDraining));
  EXPECT_FALSE(core_->WaitIdle(TimePoint{}));
  runner_->Release();
  EXPECT_TRUE(core_->WaitIdle(TimePoint::max()));
  EXPECT_EQ(sink_.num_tokens(1), 3u);
}

TEST_F(EngineCoreTest, QueueFullIsRefusedWithDepthAndLimit) {
  EngineCoreOptions options;
  options.queue.max_sequences = 3;
  Make({}, options);
  ASSERT_TRUE(core_->Submit(MakeRequest(1, 4, 3, 2)).ok());
  EXPECT_EQ(core_->queue_depth(), 2);
  const absl::Status refused = core_->Submit(MakeRequest(2, 4, 3, 2));
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(refused.GetPayload(kReasonTypeUrl), absl::Cord(kReasonQueueFull));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("2 sequences queued, limit 3"));
  EXPECT_TRUE(core_->Submit(MakeRequest(3, 4, 3, 1)).ok());
  EXPECT_TRUE(core_->Step());
  EXPECT_EQ(core_->queue_depth(), 0);
  EXPECT_TRUE(core_->Submit(MakeRequest(4, 4, 3, 3)).ok());
}

TEST_F(EngineCoreTest, WhatCanNeverFitIsRefusedWithTheArithmetic) {
  Make({.num_kv_blocks = 4, .block_size = 8, .max_context_tokens = 100});
  EXPECT_TRUE(core_->Submit(MakeRequest(1, 20, 12)).ok());
  const absl::Status refused = core_->Submit(MakeRequest(2, 20, 13));
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("= 33 needs 5 KV blocks of 8 tokens, there are 4"));
  EXPECT_THAT(std::string(core_->CheckFits(MakeRequest(3, 90, 11)).message()), HasSubstr("= 101 exceeds"));
  EXPECT_EQ(core_->CheckFits(MakeRequest(4, 0, 1)).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(EngineCoreTest, AFailingCollectEndsTheEngineWithOneError) {
  Make({.fail_at_step = 1});
  core_->Start();
  ASSERT_TRUE(core_->Submit(MakeRequest(1, 4, 50)).ok());
  sink_.WaitForError();
  EXPECT_TRUE(core_->failed());
  EXPECT_TRUE(core_->WaitIdle(TimePoint::max()));
  EXPECT_EQ(core_->Submit(MakeRequest(2, 4, 3)).code(), absl::StatusCode::kInternal);
  core_->Abort(1);
  core_->Stop();
  EXPECT_EQ(sink_.errors().size(), 1u);
  EXPECT_EQ(sink_.num_tokens(1), 1u);
}

TEST_F(EngineCoreTest, EveryFailingStepLeavesNoFurtherEvents) {
  for (int64_t step = 0; step < 8; ++step) {
    RecordingSink sink;
    minitron::testing::FakeModelRunner runner({.fail_at_step = step});
    EngineCore core({}, &runner, &sink, [] { return TimePoint{}; });
    ASSERT_TRUE(core.Submit(MakeRequest(1, 4, 20, 2)).ok());
    for (int64_t i = 0; i <= step; ++i) EXPECT_TRUE(core.Step());
    EXPECT_TRUE(core.failed());
    EXPECT_FALSE(core.Step());
    EXPECT_EQ(sink.errors().size(), 1u);
    EXPECT_TRUE(sink.finished().empty());
  }
}

TEST_F(EngineCoreTest, AbortDuringAStepDropsItsTokenAndFreesTheBlocks) {
  Make({});
  runner_->Hold();
  core_->Start();
  ASSERT_TRUE(core_->Submit(MakeRequest(1, 4, 50)).ok());
  runner_->WaitUntilHeld();
  core_->Abort(1);
  runner_->Release();
  ASSERT_TRUE(core_->WaitIdle(TimePoint::max()));
  core_->Stop();
  ASSERT_EQ(sink_.finished().size(), 1u);
  EXPECT_EQ(sink_.finished()[0].reason, FinishReason::kCancelled);
  EXPECT_LE(sink_.num_tokens(1), 1u);  // of the step that ran when the abort came
  EXPECT_EQ(core_->scheduler().kv_cache().num_used_blocks(), 0);
}

TEST_F(EngineCoreTest, AbortOfARequestStillInTheInboxFinishesIt) {
  Make({});
  ASSERT_TRUE(core_->Submit(MakeRequest(1, 4, 50, 2)).ok());
  core_->Abort(1);
  EXPECT_TRUE(core_->Step());
  EXPECT_EQ(sink_.finished().size(), 2u);
  EXPECT_EQ(sink_.num_tokens(1), 0u);
  EXPECT_EQ(runner_->num_steps(), 0);
  EXPECT_FALSE(core_->Step());
  EXPECT_TRUE(core_->idle());
}

TEST_F(EngineCoreTest, AbortSequenceEndsOneOfSeveral) {
  Make({});
  ASSERT_TRUE(core_->Submit(MakeRequest(1, 4, 6, 2)).ok());
  EXPECT_TRUE(core_->Step());
  core_->AbortSequence(1, 0);
  while (core_->Step()) {
  }
  EXPECT_EQ(sink_.num_tokens(1, 0), 1u);
  EXPECT_EQ(sink_.finished()[0].reason, FinishReason::kCancelled);
  EXPECT_EQ(sink_.finished()[0].index, 0);
  EXPECT_NE(sink_.finished()[1].reason, FinishReason::kCancelled);
}

TEST_F(EngineCoreTest, StopLeavesLiveRequestsWithoutEvents) {
  Make({});
  runner_->Hold();
  core_->Start();
  ASSERT_TRUE(core_->Submit(MakeRequest(1, 4, 200)).ok());
  runner_->WaitUntilHeld();
  std::thread stopper([this] { core_->Stop(); });
  const absl::Cord draining(kReasonDraining);
  RequestId id = 2;
  while (core_->Submit(MakeRequest(id, 4, 1)).GetPayload(kReasonTypeUrl) != draining) ++id;
  runner_->Release();
  stopper.join();
  EXPECT_TRUE(sink_.finished().empty());
  EXPECT_EQ(sink_.num_tokens(1), 1u);  // of the step that was running
}

TEST_F(EngineCoreTest, OverlapIsTheRunnersChoiceUnlessAskedFor) {
  for (const bool asynchronous : {false, true}) {
    for (const Overlap overlap : {Overlap::kAuto, Overlap::kOn, Overlap::kOff}) {
      EngineCoreOptions options;
      options.overlap = overlap;
      Make({.compute_late = asynchronous}, options);
      ASSERT_TRUE(core_->Submit(MakeRequest(1, 4, 5)).ok());
      EXPECT_TRUE(core_->Step());
      const bool ahead = overlap == Overlap::kOn || (overlap == Overlap::kAuto && asynchronous);
      EXPECT_EQ(core_->scheduler().running().at(0)->num_steps_in_flight(), ahead ? 1 : 0);
    }
  }
}

TEST_F(EngineCoreTest, IdleEngineDoesNotStep) {
  Make({});
  EXPECT_FALSE(core_->Step());
  EXPECT_EQ(core_->num_steps(), 0u);
  ASSERT_TRUE(core_->Submit(MakeRequest(1, 4, 1)).ok());
  EXPECT_FALSE(core_->idle());
  EXPECT_TRUE(core_->Step());
  EXPECT_EQ(core_->num_steps(), 1u);
  EXPECT_TRUE(core_->idle());
}

TEST(EngineCoreOptionsTest, OutOfRangeNamesTheField) {
  EngineCoreOptions options;
  EXPECT_TRUE(options.Validate().ok());
  options.queue.max_sequences = 0;
  EXPECT_THAT(std::string(options.Validate().message()), HasSubstr("queue.max_sequences 0 outside [1,"));
  options = {};
  options.scheduler.max_prefill_chunk = 0;
  EXPECT_THAT(std::string(options.Validate().message()), HasSubstr("max_prefill_chunk 0 outside [1,"));
}

}  // namespace
}  // namespace minitron::scheduler
