// The registry of live calls, the outbox and what ends calls from outside.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <future>

#include "server/grpc_status.h"
#include "tests/server/output_fixture.h"
#include "tests/server/wire.h"

namespace minitron::server {
namespace {

using scheduler::FinishReason;
using scheduler::StepOutput;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

using OutputThreadTest = OutputProcessorTest;

TEST_F(OutputThreadTest, ANameIsLiveOnceAndFreeAgainAfterARefusal) {
  Register(1);
  CallSpec spec;
  spec.request_id = "r1";
  const auto sink = std::make_shared<RecordingSink>();
  const absl::Status status = output_->Register(2, spec, sink);
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(GetField(status), "request_id");
  EXPECT_TRUE(output_->CancelByName("r1"));
  EXPECT_FALSE(output_->CancelByName("r2"));
  EXPECT_THAT(aborts_, ElementsAre(Pair(1, -1)));
  output_->Unregister(1);
  EXPECT_TRUE(output_->Register(2, spec, sink).ok());
}

TEST_F(OutputThreadTest, EventsOfUnknownRequestsAreIgnored) {
  StepOutput step = Started(9);
  AddToken(step, 9, 10);
  AddFinish(step, 9, FinishReason::kLength);
  output_->Process(std::move(step));
  EXPECT_EQ(output_->num_live(), 0);
}

TEST_F(OutputThreadTest, AnEngineFailureFailsEveryLiveCallAndRefusesLaterOnes) {
  const auto first = Register(1);
  const auto second = Register(2);
  output_->Process(Started(1));
  StepOutput step;
  step.engine_error = "INTERNAL: device lost at 0xdeadbeef";
  output_->Process(std::move(step));
  EXPECT_THAT(first->log, ElementsAre("started 7", "failed"));
  EXPECT_THAT(second->log, ElementsAre("failed"));
  EXPECT_EQ(InfoOf(second->failure).reason(), reason::kEngineFailure);
  EXPECT_THAT(second->failure.error_message(), ::testing::Not(HasSubstr("0x")));
  EXPECT_EQ(num_failures_, 1);
  EXPECT_EQ(output_->Register(3, {}, first).code(), absl::StatusCode::kInternal);
  EXPECT_THAT(MetricsText(), HasSubstr("finish_reason=\"error\"} 2\n"));
}

TEST_F(OutputThreadTest, AStalledWriteIsCutOffAfterTheTimeout) {
  OutputProcessorOptions options;
  options.write_stall_timeout = std::chrono::seconds(5);
  Make(options);
  const auto stalled = Register(1);
  const auto healthy = Register(2);
  auto gone = Register(3);
  output_->Unregister(3);
  gone.reset();
  stalled->write_started = now_;
  now_ += std::chrono::milliseconds(4999);
  output_->CutOffStalledCalls();
  EXPECT_TRUE(stalled->write_started.has_value()) << "not yet";
  healthy->write_started = now_;
  now_ += std::chrono::milliseconds(1);
  output_->CutOffStalledCalls();
  EXPECT_FALSE(stalled->write_started.has_value());
  EXPECT_TRUE(healthy->write_started.has_value());
  EXPECT_THAT(MetricsText(), HasSubstr("minitron_stream_write_stalls_total{model_name=\"tiny\"} 1\n"));
}

TEST_F(OutputThreadTest, AFullOutboxHoldsTheEngineUpUntilThereIsRoomAndNoStepIsLost) {
  OutputProcessorOptions options;
  options.max_outbox_steps = 1;
  Make(options);
  const auto sink = Register(1);
  std::promise<void> entered;
  std::promise<void> go_on;
  sink->on_delta = [&, first = true]() mutable {
    if (!first) return;
    first = false;
    entered.set_value();
    go_on.get_future().wait();
  };
  output_->Start();
  const std::vector<TokenId> tokens = Encode("the quick brown fox");
  StepOutput step = Started(1);
  AddToken(step, 1, tokens[0]);
  output_->OnStep(std::move(step));
  entered.get_future().wait();
  std::atomic<size_t> num_handed_over{0};
  auto engine = std::async(std::launch::async, [&] {
    for (size_t i = 1; i < tokens.size(); ++i) {
      StepOutput next;
      AddToken(next, 1, tokens[i]);
      if (i + 1 == tokens.size()) AddFinish(next, 1, FinishReason::kLength);
      output_->OnStep(std::move(next));
      ++num_handed_over;
    }
  });
  EXPECT_LE(num_handed_over, 1u) << "one step in work, one in the box";
  go_on.set_value();
  engine.get();
  output_->Stop();
  EXPECT_EQ(sink->ids[0], tokens);
  EXPECT_THAT(sink->log, ElementsAre("started 7", "finished 0", "complete"));
}

TEST_F(OutputThreadTest, EndLiveCallsGivesEachItsReasonAndToleratesWhatTheEngineStillSays) {
  const auto sink = Register(1);
  output_->Process(Started(1));
  std::promise<void> ended;
  sink->on_end = [&] { ended.set_value(); };
  output_->Start();
  output_->EndLiveCalls(ReasonError(absl::StatusCode::kUnavailable, reason::kDraining, "the drain timeout passed"));
  ended.get_future().wait();
  StepOutput step;
  AddToken(step, 1, 10);
  AddFinish(step, 1, FinishReason::kCancelled);
  output_->OnStep(std::move(step));
  output_->Stop();
  EXPECT_THAT(sink->log, ElementsAre("started 7", "failed"));
  EXPECT_EQ(sink->failure.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(InfoOf(sink->failure).reason(), reason::kDraining);
  EXPECT_THAT(aborts_, ElementsAre(Pair(1, -1)));
  EXPECT_EQ(output_->num_live(), 0);
}

}  // namespace
}  // namespace minitron::server
