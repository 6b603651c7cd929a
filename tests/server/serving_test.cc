// Calls over a real channel, through the real engine and output threads, over a fake model.
#include "server/serving.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/grpc_status.h"
#include "tests/server/serving_harness.h"
#include "tests/server/wire.h"

namespace minitron::server {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

v1::GenerationTask Task(int max_tokens, uint64_t seed = 1) {
  v1::GenerationTask task;
  task.set_text("to be or not to be");
  task.mutable_sampling()->set_seed(seed);
  task.mutable_stopping()->set_max_tokens(static_cast<uint32_t>(max_tokens));
  task.mutable_stopping()->set_ignore_eos(true);
  return task;
}

// One sequence at a time, so that a second request waits.
ServingSetup OneAtATime() {
  ServingSetup setup;
  setup.runner.max_num_sequences = 1;
  return setup;
}

// Room for a completion that is never reached: a token costs the fake model time in proportion to the tokens before it.
constexpr int kEndless = 1 << 19;
ServingSetup WithEndlessContext() {
  ServingSetup setup;
  setup.runner.max_context_tokens = 1 << 20;
  setup.runner.block_size = 256;
  setup.runner.num_kv_blocks = 2 << 12;
  return setup;
}

grpc::Status Generate(ServingHarness& harness, const v1::GenerationTask& task, v1::GenerateResponse* response) {
  grpc::ClientContext context;
  v1::GenerateRequest request;
  *request.mutable_task() = task;
  return harness.generation->Generate(&context, request, response);
}

TEST(ServingTest, AnAnswerIsTheSameAloneInACrowdAndCollectedByTheServer) {
  ServingHarness harness;
  const StreamResult alone = ReadStream(*harness.generation, Task(60));
  ASSERT_TRUE(alone.status.ok()) << alone.status.error_message();
  EXPECT_EQ(alone.TokenIds().size(), 60u);
  EXPECT_EQ(alone.FinishedOf()->usage().completion_tokens(), 60u);
  std::vector<std::future<StreamResult>> crowd;
  for (int i = 0; i < 12; ++i) crowd.push_back(ReadStreamInBackground(*harness.generation, Task(60, i % 4)));
  v1::GenerateResponse collected;
  ASSERT_TRUE(Generate(harness, Task(60), &collected).ok());
  EXPECT_EQ(collected.sequences(0).text(), alone.Text());
  for (int i = 0; i < 12; ++i) {
    const StreamResult result = crowd[i].get();
    ASSERT_TRUE(result.status.ok()) << result.status.error_message();
    EXPECT_EQ(result.TokenIds() == alone.TokenIds(), i % 4 == 1) << i;
  }
  harness.WaitUntilIdle();
}

TEST(ServingTest, AnswersAreTheSameWhenTheCacheIsTooSmallForAllOfThem) {
  ServingHarness roomy;
  ServingSetup setup;
  setup.runner.num_kv_blocks = 16;  // one request of the test needs 11
  ServingHarness tight(setup);
  std::vector<std::future<StreamResult>> crowd;
  for (int i = 0; i < 6; ++i) crowd.push_back(ReadStreamInBackground(*tight.generation, Task(70, i)));
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(crowd[i].get().TokenIds(), ReadStream(*roomy.generation, Task(70, i)).TokenIds()) << i;
  }
  EXPECT_THAT(tight.MetricsText(), ::testing::Not(HasSubstr("minitron_preemptions_total{model_name=\"fake\"} 0\n")));
}

TEST(ServingTest, AFullQueueRefusesWithDepthAndLimitAndDisturbsNobody) {
  ServingSetup setup = OneAtATime();
  setup.server.max_queued_requests = 2;
  ServingHarness harness(setup);
  const StreamResult alone = ReadStream(*harness.generation, Task(20));
  harness.runner.Hold();
  std::vector<std::future<StreamResult>> accepted;
  accepted.push_back(ReadStreamInBackground(*harness.generation, Task(20)));
  harness.runner.WaitUntilHeld();
  for (int i = 0; i < 2; ++i) accepted.push_back(ReadStreamInBackground(*harness.generation, Task(20)));
  harness.WaitUntilQueued(2);
  const StreamResult streamed = ReadStream(*harness.generation, Task(20));
  v1::GenerateResponse response;
  const grpc::Status collected = Generate(harness, Task(20), &response);
  grpc::ClientContext context;
  v1::ScoreRequest score;
  score.set_target_text("to be or not");
  v1::ScoreResponse scored;
  const grpc::Status scoring = harness.generation->Score(&context, score, &scored);
  for (const grpc::Status& status : {streamed.status, collected, scoring}) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
    EXPECT_EQ(InfoOf(status).reason(), reason::kQueueFull);
    EXPECT_EQ(status.error_message(), "queue full: 2 sequences queued, limit 2, 1 more asked for");
  }
  EXPECT_EQ(streamed.pushback_trailer, "500");
  EXPECT_TRUE(streamed.events.empty());
  harness.runner.Release();
  for (auto& future : accepted) {
    const StreamResult result = future.get();
    ASSERT_TRUE(result.status.ok()) << result.status.error_message();
    EXPECT_EQ(result.TokenIds(), alone.TokenIds());
  }
  EXPECT_TRUE(ReadStream(*harness.generation, Task(20)).status.ok()) << "there is room again";
  EXPECT_THAT(harness.MetricsText(), HasSubstr("reason=\"queue_full\"} 3\n"));
}

TEST(ServingTest, AClientThatStopsReadingIsCutOffAndNobodyElse) {
  ServingSetup setup = WithEndlessContext();
  setup.server.write_stall_timeout_s = 1;
  ServingHarness harness(setup);
  v1::GenerateStreamRequest request;
  *request.mutable_task() = Task(kEndless);
  request.mutable_task()->mutable_output()->set_logprobs(20);
  grpc::ClientContext context;
  const auto stub = v1::GenerationService::NewStub(harness.Connect());
  const auto reader = stub->GenerateStream(&context, request);
  v1::GenerateStreamResponse first;
  ASSERT_TRUE(reader->Read(&first));
  const StreamResult other = ReadStream(*harness.generation, Task(20));
  harness.WaitForMetric("minitron_stream_write_stalls_total{model_name=\"fake\"} 1");
  harness.WaitUntilIdle();
  StreamResult stalled;
  ReadToEnd(*reader, context, stalled);
  EXPECT_EQ(stalled.status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(stalled.FinishedOf(), nullptr);
  EXPECT_TRUE(other.status.ok()) << other.status.error_message();
  EXPECT_EQ(ReadStream(*harness.generation, Task(20)).TokenIds(), other.TokenIds());
}

TEST(ServingTest, ACancelledCallFreesItsBlocksAndLeavesTheOthersAlone) {
  ServingHarness harness(WithEndlessContext());
  const StreamResult alone = ReadStream(*harness.generation, Task(200));
  auto context = std::make_shared<grpc::ClientContext>();
  v1::GenerateStreamRequest request;
  *request.mutable_task() = Task(kEndless);
  const auto reader = harness.generation->GenerateStream(context.get(), request);
  v1::GenerateStreamResponse first;
  ASSERT_TRUE(reader->Read(&first));
  auto other = ReadStreamInBackground(*harness.generation, Task(200));
  context->TryCancel();
  StreamResult cancelled;
  ReadToEnd(*reader, *context, cancelled);
  EXPECT_EQ(cancelled.status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(other.get().TokenIds(), alone.TokenIds());
  harness.WaitUntilIdle();
  EXPECT_THAT(harness.MetricsText(), HasSubstr("finish_reason=\"cancelled\"} 1\n"));
}

TEST(ServingTest, AQueuedCallThatIsCancelledOrExpiresNeverReachesTheEngine) {
  ServingHarness harness(OneAtATime());
  harness.runner.Hold();
  auto running = ReadStreamInBackground(*harness.generation, Task(20));
  harness.runner.WaitUntilHeld();
  auto cancelled_context = std::make_shared<grpc::ClientContext>();
  auto cancelled = ReadStreamInBackground(*harness.generation, Task(20), cancelled_context);
  harness.WaitUntilQueued(1);
  cancelled_context->TryCancel();
  EXPECT_EQ(cancelled.get().status.error_code(), grpc::StatusCode::CANCELLED);
  auto expiring_context = std::make_shared<grpc::ClientContext>();
  expiring_context->set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
  const StreamResult expired = ReadStream(*harness.generation, Task(20), expiring_context);
  EXPECT_EQ(expired.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  harness.runner.Release();
  const StreamResult survivor = running.get();
  ASSERT_TRUE(survivor.status.ok()) << survivor.status.error_message();
  harness.WaitUntilIdle();
  const std::string metrics = harness.MetricsText();
  const uint32_t prompt = survivor.events.front().started().prompt_token_count();
  EXPECT_THAT(metrics, HasSubstr("minitron_prompt_tokens_total{model_name=\"fake\"} " + std::to_string(prompt) + "\n"));
  EXPECT_THAT(metrics, HasSubstr("minitron_generation_tokens_total{model_name=\"fake\"} 20\n"));
}

TEST(ServingTest, AStormOfCancelledCallsLeavesNothingBehind) {
  ServingHarness harness;
  for (int round = 0; round < 10; ++round) {
    std::vector<std::shared_ptr<grpc::ClientContext>> contexts;
    std::vector<std::future<StreamResult>> calls;
    for (int i = 0; i < 20; ++i) {
      contexts.push_back(std::make_shared<grpc::ClientContext>());
      calls.push_back(ReadStreamInBackground(*harness.generation, Task(40, i), contexts.back()));
    }
    for (const auto& context : contexts) context->TryCancel();
    for (auto& call : calls) call.get();
  }
  harness.WaitUntilIdle();
  harness.WaitForMetric("minitron_grpc_streams_active{model_name=\"fake\"} 0");
  EXPECT_TRUE(ReadStream(*harness.generation, Task(40)).status.ok());
}

TEST(ServingTest, TheServersLongestDeadlineEndsACallWithWhatItUsed) {
  ServingSetup setup = WithEndlessContext();
  setup.server.max_request_timeout_s = 0.2;
  ServingHarness harness(setup);
  const StreamResult result = ReadStream(*harness.generation, Task(kEndless));
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(InfoOf(result.status).reason(), reason::kDeadlineExceeded);
  EXPECT_EQ(MetadataOf(result.status, "prompt_tokens"),
            std::to_string(result.events.front().started().prompt_token_count()));
  EXPECT_GE(std::stoul(MetadataOf(result.status, "completion_tokens")), result.TokenIds().size());
  harness.WaitUntilIdle();
}

TEST(ServingTest, PromptLogprobsComeInOnePieceFromAPromptInManyChunks) {
  ServingSetup setup;
  setup.server.max_prefill_chunk = 7;
  ServingHarness chunked(setup);
  ServingHarness whole;
  v1::GenerationTask task = Task(4);
  for (int i = 0; i < 100; ++i) task.mutable_token_ids()->add_ids(5 + i * 13 % 2000);
  task.mutable_output()->set_prompt_logprobs(3);
  const StreamResult result = ReadStream(*chunked.generation, task);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  const v1::Started& started = result.events.front().started();
  ASSERT_EQ(started.prompt_logprobs_size(), 100);
  EXPECT_FALSE(started.prompt_logprobs(0).has_chosen()) << "nothing predicts the first token";
  for (int i = 1; i < 100; ++i) {
    EXPECT_EQ(started.prompt_logprobs(i).chosen().token_id(), task.token_ids().ids(i)) << i;
    EXPECT_EQ(started.prompt_logprobs(i).top_size(), 3) << i;
  }
  const StreamResult at_once = ReadStream(*whole.generation, task);
  const v1::Started& expected = at_once.events.front().started();
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(started.prompt_logprobs(i).SerializeAsString(), expected.prompt_logprobs(i).SerializeAsString()) << i;
  }
}

TEST(ServingTest, ScoreOfAnAnswerEqualsTheLogprobsItCameWith) {
  ServingSetup setup;
  setup.server.max_prefill_chunk = 7;
  ServingHarness harness(setup);
  v1::GenerationTask task = Task(30);
  for (int i = 0; i < 20; ++i) task.mutable_token_ids()->add_ids(5 + i);
  task.mutable_output()->set_logprobs(2);
  const StreamResult answer = ReadStream(*harness.generation, task);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  v1::ScoreRequest request;
  *request.mutable_context_token_ids() = task.token_ids();
  for (const uint32_t id : answer.TokenIds()) request.mutable_target_token_ids()->add_ids(id);
  request.set_top_logprobs(2);
  grpc::ClientContext context;
  v1::ScoreResponse response;
  const grpc::Status status = harness.generation->Score(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  const std::vector<v1::PositionLogprobs> expected = answer.Logprobs();
  ASSERT_EQ(response.positions_size(), 30);
  ASSERT_EQ(expected.size(), 30u);
  double total = 0;
  for (int i = 0; i < 30; ++i) {
    EXPECT_EQ(response.positions(i).SerializeAsString(), expected[i].SerializeAsString()) << i;
    total += expected[i].chosen().logprob();
  }
  EXPECT_DOUBLE_EQ(response.total_logprob(), total);
  EXPECT_EQ(response.usage().prompt_tokens(), 50u);
  EXPECT_EQ(response.usage().completion_tokens(), 0u);
}

TEST(ServingTest, AStopStringEndsTheSequenceInTheEngineToo) {
  ServingHarness harness(WithEndlessContext());
  const StreamResult free_run = ReadStream(*harness.generation, Task(40));
  ASSERT_TRUE(free_run.status.ok());
  // Some text from its middle, so that the stop string lies across tokens.
  const std::string text = free_run.Text();
  size_t begin = text.size() / 2;
  while ((text[begin] & 0xC0) == 0x80) ++begin;
  size_t end = begin + 6;
  while (end < text.size() && (text[end] & 0xC0) == 0x80) ++end;
  const std::string stop = text.substr(begin, end - begin);
  v1::GenerationTask task = Task(kEndless);
  task.mutable_stopping()->add_stop_sequences(stop);
  const StreamResult stopped = ReadStream(*harness.generation, task);
  ASSERT_TRUE(stopped.status.ok()) << stopped.status.error_message();
  EXPECT_EQ(stopped.Text(), text.substr(0, text.find(stop)));
  EXPECT_EQ(stopped.FinishedOf()->stop_sequence(), stop);
  EXPECT_LE(stopped.FinishedOf()->usage().completion_tokens(), 40u);
  harness.WaitUntilIdle();
}

TEST(ServingTest, OneRequestsNonFiniteLogitsAreItsAlone) {
  ServingSetup setup;
  setup.runner.nan_one_in = 100;
  ServingHarness harness(setup);
  std::vector<std::future<StreamResult>> crowd;
  for (int i = 0; i < 16; ++i) crowd.push_back(ReadStreamInBackground(*harness.generation, Task(60, i)));
  int num_failed = 0;
  for (auto& call : crowd) {
    const StreamResult result = call.get();
    if (result.status.ok()) {
      EXPECT_EQ(result.TokenIds().size(), 60u);
      continue;
    }
    ++num_failed;
    EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INTERNAL);
    EXPECT_EQ(InfoOf(result.status).reason(), reason::kNonFiniteLogits);
    EXPECT_EQ(MetadataOf(result.status, "completion_tokens"), std::to_string(result.TokenIds().size()));
  }
  EXPECT_GT(num_failed, 0);
  EXPECT_LT(num_failed, 16);
  harness.WaitUntilIdle();
}

}  // namespace
}  // namespace minitron::server
