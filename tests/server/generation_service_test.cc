// Every RPC over a real channel on port 0, against a scripted engine.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/grpc_status.h"
#include "server/limits.h"
#include "tests/server/server_harness.h"
#include "tests/server/wire.h"

namespace minitron::server {
namespace {

using ::testing::HasSubstr;

v1::GenerationTask Task(int max_tokens) {
  v1::GenerationTask task;
  task.set_text("to be or not to be");
  task.mutable_stopping()->set_max_tokens(static_cast<uint32_t>(max_tokens));
  return task;
}

class GenerationServiceTest : public ::testing::Test {
 protected:
  StreamResult Stream(const v1::GenerationTask& task) { return ReadStream(*harness_.generation, task); }
  std::future<StreamResult> StreamInBackground(const v1::GenerationTask& task,
                                               std::shared_ptr<grpc::ClientContext> context = nullptr) {
    return ReadStreamInBackground(*harness_.generation, task, std::move(context));
  }

  ServerHarness harness_;
};

TEST_F(GenerationServiceTest, StreamIsStartedThenDeltasThenFinished) {
  harness_.RunEngine();
  v1::GenerationTask task = Task(5);
  task.set_request_id("mine");
  const StreamResult result = Stream(task);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  ASSERT_GE(result.events.size(), 3u);
  const v1::Started& started = result.events.front().started();
  EXPECT_EQ(started.request_id(), "mine");
  EXPECT_EQ(started.model(), "tiny");
  EXPECT_EQ(started.prompt_token_count(), harness_.Encode("to be or not to be").size());
  ASSERT_TRUE(result.events.back().has_finished());
  EXPECT_EQ(result.events.back().finished().reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(result.events.back().finished().usage().completion_tokens(), 5u);
  EXPECT_EQ(result.request_id_trailer, "mine");
}

TEST_F(GenerationServiceTest, ConcatenatedDeltasEqualTheUnaryText) {
  harness_.RunEngine();
  v1::GenerationTask task = Task(9);
  task.mutable_output()->set_logprobs(2);
  const StreamResult streamed = Stream(task);
  grpc::ClientContext context;
  v1::GenerateRequest request;
  *request.mutable_task() = task;
  v1::GenerateResponse response;
  const grpc::Status status = harness_.generation->Generate(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.sequences_size(), 1);
  EXPECT_EQ(response.sequences(0).text(), streamed.Text());
  EXPECT_FALSE(response.sequences(0).text().empty());
  EXPECT_EQ(response.sequences(0).token_ids_size(), 9);
  ASSERT_EQ(response.sequences(0).logprobs_size(), 9);
  for (int i = 0; i < 9; ++i) {
    EXPECT_EQ(response.sequences(0).logprobs(i).chosen().token_id(), response.sequences(0).token_ids(i));
    EXPECT_EQ(response.sequences(0).logprobs(i).top_size(), 2);
  }
  EXPECT_EQ(response.sequences(0).finished().usage().completion_tokens(), 9u);
}

TEST_F(GenerationServiceTest, SeveralSequencesFinishEachOnce) {
  harness_.RunEngine();
  v1::GenerationTask task = Task(4);
  task.mutable_sampling()->set_num_sequences(3);
  const StreamResult result = Stream(task);
  ASSERT_TRUE(result.status.ok());
  for (uint32_t i = 0; i < 3; ++i) {
    ASSERT_NE(result.FinishedOf(i), nullptr);
    EXPECT_EQ(result.Text(i), result.Text(0));
  }
}

TEST_F(GenerationServiceTest, StopStringAcrossTokensEndsTheText) {
  v1::GenerationTask task = Task(40);
  task.mutable_stopping()->add_stop_sequences("n fox j");
  auto future = StreamInBackground(task);
  harness_.engine->WaitForRequests(1);
  harness_.Step(41);
  const StreamResult result = future.get();
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_THAT(result.Text(), ::testing::EndsWith("the quick brow"));
  ASSERT_NE(result.FinishedOf(), nullptr);
  EXPECT_EQ(result.FinishedOf()->reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(result.FinishedOf()->stop_sequence(), "n fox j");
  EXPECT_LT(result.FinishedOf()->usage().completion_tokens(), 40u);
  EXPECT_EQ(harness_.engine->num_live(), 0) << "the engine was told to stop";
}

TEST_F(GenerationServiceTest, EndOfSequenceTokenIsReportedAndItsTextIsNot) {
  harness_.engine->script = harness_.Encode("good night");
  harness_.engine->script.push_back(3);
  harness_.RunEngine();
  const StreamResult result = Stream(Task(40));
  ASSERT_TRUE(result.status.ok());
  EXPECT_EQ(result.FinishedOf()->eos_token_id(), 3u);
  EXPECT_THAT(result.Text(), ::testing::EndsWith("good night"));
}

TEST_F(GenerationServiceTest, ClientCancelFreesTheEngine) {
  auto context = std::make_shared<grpc::ClientContext>();
  auto future = StreamInBackground(Task(1000), context);
  harness_.engine->WaitForRequests(1);
  harness_.Step(3);
  context->TryCancel();
  harness_.engine->WaitForAborts(1);
  harness_.Step(1);
  EXPECT_EQ(future.get().status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(harness_.engine->num_live(), 0);
  EXPECT_EQ(harness_.output->num_live(), 0);
  EXPECT_THAT(harness_.MetricsText(), HasSubstr("finish_reason=\"cancelled\"} 1"));
}

TEST_F(GenerationServiceTest, ServerSideDeadlineTellsPartialUsage) {
  auto future = StreamInBackground(Task(1000));
  harness_.engine->WaitForRequests(1);
  harness_.Step(3);
  harness_.clock_ms += 11 * 60 * 1000;  // beyond max_request_timeout
  harness_.Step(1);
  const StreamResult result = future.get();
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(InfoOf(result.status).reason(), reason::kDeadlineExceeded);
  EXPECT_EQ(InfoOf(result.status).metadata().at("completion_tokens"), "3");
}

TEST_F(GenerationServiceTest, RefusalsAreTypedAndCounted) {
  v1::GenerationTask task = Task(4);
  task.set_model("gpt");
  StreamResult result = Stream(task);
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(InfoOf(result.status).reason(), reason::kModelNotFound);

  task = Task(4);
  for (int i = 0; i < 5000; ++i) task.mutable_token_ids()->add_ids(7);
  result = Stream(task);
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(InfoOf(result.status).reason(), reason::kPromptTooLong);
  EXPECT_EQ(InfoOf(result.status).metadata().at("actual"), "5000");
  EXPECT_EQ(InfoOf(result.status).metadata().at("limit"), "4095");

  harness_.engine->refusal = ReasonError(absl::StatusCode::kUnavailable, reason::kQueueFull, "queue full");
  result = Stream(Task(4));
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(InfoOf(result.status).reason(), reason::kQueueFull);
  EXPECT_EQ(result.pushback_trailer, "500");
  EXPECT_EQ(harness_.output->num_live(), 0);
  EXPECT_THAT(harness_.MetricsText(), HasSubstr("reason=\"queue_full\"} 1"));
  EXPECT_THAT(harness_.MetricsText(), HasSubstr("reason=\"invalid\"} 2"));
}

TEST_F(GenerationServiceTest, AnUnreachableDeadlineIsRefusedEarlyWithTheTimeToComeBack) {
  absl::Status early = ReasonError(absl::StatusCode::kUnavailable, reason::kDeadlineUnreachable, "too long a queue",
                                   {{"queue_depth", "12"}, {"estimated_wait_ms", "900"}});
  SetRetryDelayMs(early, 340);
  harness_.engine->early_refusal = early;
  const StreamResult refused = Stream(Task(4));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(InfoOf(refused.status).reason(), reason::kDeadlineUnreachable);
  EXPECT_EQ(InfoOf(refused.status).metadata().at("queue_depth"), "12");
  EXPECT_EQ(refused.pushback_trailer, "340");
  EXPECT_EQ(harness_.output->num_live(), 0);
  EXPECT_THAT(harness_.MetricsText(), HasSubstr("reason=\"deadline\"} 1"));
}

TEST_F(GenerationServiceTest, DrainingRefusesNewCallsAndFinishesLiveOnes) {
  auto future = StreamInBackground(Task(10));
  harness_.engine->WaitForRequests(1);
  harness_.Step(2);
  harness_.context.draining = true;
  const StreamResult refused = Stream(Task(4));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(InfoOf(refused.status).reason(), reason::kDraining);
  harness_.Step(8);
  const StreamResult live = future.get();
  EXPECT_TRUE(live.status.ok());
  EXPECT_EQ(live.FinishedOf()->usage().completion_tokens(), 10u);
}

TEST_F(GenerationServiceTest, SecondLiveRequestOfANameIsRefusedAndTheFirstUndisturbed) {
  v1::GenerationTask task = Task(3);
  task.set_request_id("twin");
  auto future = StreamInBackground(task);
  harness_.engine->WaitForRequests(1);
  const StreamResult second = Stream(task);
  EXPECT_EQ(second.status.error_code(), grpc::StatusCode::ALREADY_EXISTS);
  harness_.Step(3);
  EXPECT_TRUE(future.get().status.ok());
  auto again = StreamInBackground(task);
  harness_.engine->WaitForRequests(2);
  harness_.Step(3);
  EXPECT_TRUE(again.get().status.ok()) << "the name is free again";
}

TEST_F(GenerationServiceTest, FailureOfOneRequestLeavesTheOthers) {
  auto first = StreamInBackground(Task(5));
  harness_.engine->WaitForRequests(1);
  auto second = StreamInBackground(Task(5));
  harness_.engine->WaitForRequests(2);
  harness_.engine->fail_next_request = true;
  harness_.Step(6);
  const grpc::Status a = first.get().status;
  const grpc::Status b = second.get().status;
  EXPECT_NE(a.ok(), b.ok());
  EXPECT_EQ(InfoOf(a.ok() ? b : a).reason(), reason::kNonFiniteLogits);
}

TEST_F(GenerationServiceTest, EngineFailureFailsAllCallsAndRefusesLaterOnes) {
  auto future = StreamInBackground(Task(50));
  harness_.engine->WaitForRequests(1);
  harness_.Step(2);
  harness_.engine->engine_error = "device lost at 0xdeadbeef";
  harness_.Step(1);
  const StreamResult result = future.get();
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(InfoOf(result.status).reason(), reason::kEngineFailure);
  EXPECT_THAT(result.status.error_message(), ::testing::Not(HasSubstr("0x")));
  EXPECT_EQ(harness_.num_engine_failures, 1);
  EXPECT_EQ(Stream(Task(4)).status.error_code(), grpc::StatusCode::INTERNAL);
}

TEST_F(GenerationServiceTest, ClientThatStopsReadingIsCutOff) {
  v1::GenerateStreamRequest request;
  *request.mutable_task() = Task(4000);
  request.mutable_task()->mutable_output()->set_logprobs(20);
  grpc::ClientContext context;
  auto reader = harness_.generation->GenerateStream(&context, request);
  harness_.engine->WaitForRequests(1);
  harness_.Step(3500);  // some MiB, far beyond the window of 64 KiB
  EXPECT_EQ(harness_.engine->num_live(), 1);
  harness_.output->CutOffStalledCalls();
  EXPECT_EQ(harness_.engine->num_live(), 1) << "not yet";
  harness_.clock_ms += 6000;
  harness_.output->CutOffStalledCalls();
  harness_.Step(1);
  EXPECT_EQ(harness_.engine->num_live(), 0);
  EXPECT_THAT(harness_.MetricsText(), HasSubstr("minitron_stream_write_stalls_total{model_name=\"tiny\"} 1"));
  v1::GenerateStreamResponse response;
  while (reader->Read(&response)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(GenerationServiceTest, TokensThatCameDuringAWriteTravelTogetherAndInOrder) {
  constexpr int kTokens = 3000;
  v1::GenerateStreamRequest request;
  *request.mutable_task() = Task(kTokens);
  request.mutable_task()->mutable_sampling()->set_num_sequences(2);
  request.mutable_task()->mutable_output()->set_logprobs(5);
  grpc::ClientContext context;
  auto reader = harness_.generation->GenerateStream(&context, request);
  harness_.engine->WaitForRequests(1);
  harness_.Step(kTokens);  // nobody reads: beyond the window of 64 KiB writes wait
  StreamResult result;
  ReadToEnd(*reader, context, result);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  int num_deltas = 0;
  for (const v1::GenerateStreamResponse& event : result.events) {
    if (!event.has_delta()) continue;
    ++num_deltas;
    EXPECT_LE(event.delta().token_ids_size(), limits::kMaxTokensPerDelta);
    EXPECT_EQ(event.delta().token_ids_size(), event.delta().logprobs_size());
  }
  EXPECT_LT(num_deltas, kTokens) << "of " << 2 * kTokens << " tokens";
  for (const uint32_t index : {0u, 1u}) {
    std::vector<uint32_t> expected;
    for (int i = 0; i < kTokens; ++i) {
      expected.push_back(static_cast<uint32_t>(harness_.engine->script[i % harness_.engine->script.size()]));
    }
    EXPECT_EQ(result.TokenIds(index), expected);
    EXPECT_EQ(result.Text(index), harness_.tokenizer->Decode({expected.begin(), expected.end()}, {}));
    ASSERT_NE(result.FinishedOf(index), nullptr);
  }
}

TEST_F(GenerationServiceTest, ScoreReportsEveryTargetToken) {
  harness_.RunEngine();
  grpc::ClientContext context;
  v1::ScoreRequest request;
  request.set_context_text("to be or not ");
  request.set_target_text("to be");
  v1::ScoreResponse response;
  const grpc::Status status = harness_.generation->Score(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  const int expected =
      static_cast<int>(harness_.Encode("to be or not to be").size() - harness_.Encode("to be or not").size());
  ASSERT_EQ(response.positions_size(), expected);
  EXPECT_DOUBLE_EQ(response.total_logprob(), -0.5 * expected);
  EXPECT_TRUE(response.is_greedy());
  EXPECT_EQ(response.usage().completion_tokens(), 0u);
}

TEST_F(GenerationServiceTest, TokenizeAndDetokenizeRoundTrip) {
  v1::TokenizeRequest request;
  request.set_text("Good night, good night!");
  v1::TokenizeResponse tokens;
  grpc::ClientContext first;
  ASSERT_TRUE(harness_.generation->Tokenize(&first, request, &tokens).ok());
  EXPECT_EQ(tokens.token_ids_size(), tokens.token_bytes_size());
  v1::DetokenizeRequest back;
  *back.mutable_token_ids() = tokens.token_ids();
  v1::DetokenizeResponse text;
  grpc::ClientContext second;
  ASSERT_TRUE(harness_.generation->Detokenize(&second, back, &text).ok());
  EXPECT_EQ(text.text(), request.text());
}

TEST_F(GenerationServiceTest, AdminCancelsByNameAndDrains) {
  v1::GenerationTask task = Task(100);
  task.set_request_id("victim");
  auto future = StreamInBackground(task);
  harness_.engine->WaitForRequests(1);
  v1::CancelRequestsRequest request;
  request.add_request_ids("victim");
  request.add_request_ids("nobody");
  v1::CancelRequestsResponse response;
  grpc::ClientContext first;
  ASSERT_TRUE(harness_.admin->CancelRequests(&first, request, &response).ok());
  EXPECT_EQ(response.cancelled(), 1u);
  harness_.Step(1);
  EXPECT_EQ(future.get().status.error_code(), grpc::StatusCode::CANCELLED);
  v1::DrainResponse drained;
  grpc::ClientContext second;
  ASSERT_TRUE(harness_.admin->Drain(&second, {}, &drained).ok());
  EXPECT_EQ(harness_.num_drain_requests, 1);
}

TEST_F(GenerationServiceTest, ModelIsDescribedWithDefaults) {
  grpc::ClientContext context;
  v1::GetModelResponse response;
  ASSERT_TRUE(harness_.model->GetModel(&context, {}, &response).ok());
  EXPECT_EQ(response.model().name(), "tiny");
  EXPECT_EQ(response.model().max_context_tokens(), 4096u);
  EXPECT_TRUE(response.model().default_sampling().has_temperature());
  grpc::ClientContext second;
  v1::GetModelRequest request;
  request.set_name("nobody");
  const grpc::Status status = harness_.model->GetModel(&second, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(InfoOf(status).reason(), reason::kModelNotFound);
}

TEST_F(GenerationServiceTest, ModelsAreListedAsTheyAreDescribed) {
  grpc::ClientContext first;
  grpc::ClientContext second;
  v1::GetModelResponse described;
  v1::ListModelsResponse listed;
  ASSERT_TRUE(harness_.model->GetModel(&first, {}, &described).ok());
  ASSERT_TRUE(harness_.model->ListModels(&second, {}, &listed).ok());
  ASSERT_EQ(listed.models_size(), 1);
  EXPECT_EQ(listed.models(0).SerializeAsString(), described.model().SerializeAsString());
}

TEST_F(GenerationServiceTest, TheServerTellsItsVersionAndItsLimits) {
  grpc::ClientContext context;
  v1::GetServerInfoResponse info;
  harness_.context.ready_since = scheduler::TimePoint(std::chrono::milliseconds(harness_.clock_ms));
  harness_.clock_ms += 1500;
  ASSERT_TRUE(harness_.admin->GetServerInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.version(), MINITRON_VERSION);
  EXPECT_EQ(info.backend(), harness_.context.model.info.backend);
  EXPECT_EQ(info.model(), "tiny");
  EXPECT_EQ(info.kv_block_size(), static_cast<uint32_t>(harness_.context.limits.kv_block_size));
  EXPECT_EQ(info.kv_blocks(), static_cast<uint32_t>(harness_.context.limits.kv_blocks));
  EXPECT_EQ(info.max_running_sequences(), static_cast<uint32_t>(harness_.context.limits.max_num_sequences));
  EXPECT_EQ(info.max_step_tokens(), static_cast<uint32_t>(harness_.context.limits.max_step_tokens));
  EXPECT_EQ(info.max_queued_requests(), static_cast<uint32_t>(harness_.context.limits.max_queued_requests));
  EXPECT_EQ(info.max_context_tokens(), 4096u);
  EXPECT_EQ(info.uptime().seconds(), 1);
  EXPECT_EQ(info.uptime().nanos(), 500'000'000);
}

}  // namespace
}  // namespace minitron::server
