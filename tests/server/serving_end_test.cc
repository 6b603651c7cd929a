// How a server ends, seen by its clients and by the health service: drain, drain timeout, engine failure.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <set>

#include "server/grpc_status.h"
#include "tests/server/serving_harness.h"
#include "tests/server/wire.h"

namespace minitron::server {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

v1::GenerationTask Task(int max_tokens) {
  v1::GenerationTask task;
  task.set_text("to be or not to be");
  task.mutable_sampling()->set_seed(1);
  task.mutable_stopping()->set_max_tokens(static_cast<uint32_t>(max_tokens));
  task.mutable_stopping()->set_ignore_eos(true);
  return task;
}

// A health watch of one service.
class Watch {
 public:
  Watch(const ServingHarness& harness, const std::string& service)
      : stub_(grpc::health::v1::Health::NewStub(harness.Connect())) {
    HealthCheckRequest request;
    request.set_service(service);
    reader_ = stub_->Watch(&context_, request);
  }
  ~Watch() {
    context_.TryCancel();
    HealthCheckResponse response;
    while (reader_->Read(&response)) {
    }
    reader_->Finish();
  }

  // Waits for the next change.
  HealthCheckResponse::ServingStatus Next() {
    HealthCheckResponse response;
    return reader_->Read(&response) ? response.status() : HealthCheckResponse::UNKNOWN;
  }

 private:
  std::unique_ptr<grpc::health::v1::Health::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<HealthCheckResponse>> reader_;
};

grpc::Status Check(const ServingHarness& harness, const std::string& service, HealthCheckResponse* response) {
  grpc::ClientContext context;
  HealthCheckRequest request;
  request.set_service(service);
  return harness.health->Check(&context, request, response);
}

TEST(ServingEndTest, HealthKnowsEveryServiceAndRefusesUnknownOnes) {
  const ServingHarness harness;
  for (const char* service : {"", "minitron.v1.GenerationService", "minitron.v1.ModelService", "liveness"}) {
    HealthCheckResponse response;
    ASSERT_TRUE(Check(harness, service, &response).ok()) << service;
    EXPECT_EQ(response.status(), HealthCheckResponse::SERVING) << service;
  }
  HealthCheckResponse response;
  EXPECT_EQ(Check(harness, "nobody", &response).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST(ServingEndTest, ADrainFinishesTheLiveStreamAndRefusesNewCalls) {
  ServingHarness harness;
  Watch ready(harness, "");
  Watch alive(harness, "liveness");
  EXPECT_EQ(ready.Next(), HealthCheckResponse::SERVING);
  EXPECT_EQ(alive.Next(), HealthCheckResponse::SERVING);
  harness.runner.Hold();
  auto live = ReadStreamInBackground(*harness.generation, Task(50));
  harness.runner.WaitUntilHeld();
  grpc::ClientContext context;
  v1::DrainResponse drained;
  ASSERT_TRUE(harness.admin->Drain(&context, {}, &drained).ok());
  EXPECT_EQ(ready.Next(), HealthCheckResponse::NOT_SERVING);
  harness.WaitForLoad([](const v1::GetLoadResponse& load) { return load.draining(); });
  const StreamResult refused = ReadStream(*harness.generation, Task(5));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(InfoOf(refused.status).reason(), reason::kDraining);
  EXPECT_EQ(refused.pushback_trailer, "100");
  HealthCheckResponse liveness;
  ASSERT_TRUE(Check(harness, "liveness", &liveness).ok());
  EXPECT_EQ(liveness.status(), HealthCheckResponse::SERVING) << "a restart would lose the live stream";
  harness.runner.Release();
  const StreamResult result = live.get();
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(result.TokenIds().size(), 50u);
  EXPECT_EQ(harness.WaitForExit(), kExitOk);
}

TEST(ServingEndTest, ADrainThatTakesTooLongEndsTheRestWithAReason) {
  ServingSetup setup;
  setup.server.drain_timeout_s = 0.1;
  setup.runner.max_context_tokens = 1 << 20;
  setup.runner.block_size = 256;
  setup.runner.num_kv_blocks = 2 << 12;
  ServingHarness harness(setup);
  grpc::ClientContext context;
  v1::GenerateStreamRequest request;
  *request.mutable_task() = Task(1 << 19);
  const auto reader = harness.generation->GenerateStream(&context, request);
  v1::GenerateStreamResponse first;
  ASSERT_TRUE(reader->Read(&first));
  harness.lifecycle.RequestDrain();
  StreamResult result;
  ReadToEnd(*reader, context, result);
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(InfoOf(result.status).reason(), reason::kDraining) << result.status.error_message();
  EXPECT_EQ(harness.WaitForExit(), kExitOk);
}

TEST(ServingEndTest, AnEngineFailureFailsEveryLiveCallTypedAndEndsTheServerWithCode5) {
  ServingSetup setup;
  setup.runner.max_num_sequences = 1;
  setup.runner.fail_at_step = 3;
  ServingHarness harness(setup);
  Watch ready(harness, "minitron.v1.GenerationService");
  Watch alive(harness, "liveness");
  EXPECT_EQ(ready.Next(), HealthCheckResponse::SERVING);
  EXPECT_EQ(alive.Next(), HealthCheckResponse::SERVING);
  harness.runner.Hold();
  auto running = ReadStreamInBackground(*harness.generation, Task(50));
  harness.runner.WaitUntilHeld();
  auto queued = ReadStreamInBackground(*harness.generation, Task(50));
  auto scored = std::async(std::launch::async, [&harness] {
    grpc::ClientContext context;
    v1::ScoreRequest request;
    request.set_target_text("to be or not");
    v1::ScoreResponse response;
    return harness.generation->Score(&context, request, &response);
  });
  harness.WaitUntilQueued(2);
  harness.runner.Release();
  const StreamResult first = running.get();
  EXPECT_FALSE(first.events.empty()) << "what was computed before the failure arrives";
  for (const grpc::Status& status : {first.status, queued.get().status, scored.get()}) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INTERNAL) << status.error_message();
    EXPECT_EQ(InfoOf(status).reason(), reason::kEngineFailure);
    EXPECT_EQ(status.error_message(), "the engine has failed; this server will restart");
  }
  EXPECT_GE(std::stoul(MetadataOf(first.status, "completion_tokens")), first.TokenIds().size());
  EXPECT_EQ(ready.Next(), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(alive.Next(), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(harness.WaitForExit(), kExitEngine);
}

TEST(ServingEndTest, AFailureInAnyStepReachesEveryCall) {
  for (int step = 0; step < 12; ++step) {
    ServingSetup setup;
    setup.runner.fail_at_step = step;
    ServingHarness harness(setup);
    std::vector<std::future<StreamResult>> calls;
    for (int i = 0; i < 3; ++i) calls.push_back(ReadStreamInBackground(*harness.generation, Task(500)));
    for (auto& call : calls) {
      const StreamResult result = call.get();
      // A call that comes after the failure finds an engine that has failed, or a listener that is closing.
      EXPECT_TRUE(result.status.error_code() == grpc::StatusCode::INTERNAL ||
                  result.status.error_code() == grpc::StatusCode::UNAVAILABLE)
          << step << ": " << result.status.error_message();
      EXPECT_EQ(result.FinishedOf(), nullptr);
    }
    EXPECT_EQ(harness.WaitForExit(), kExitEngine) << step;
  }
}

// gRPC itself ends a call that arrives while it shuts down with CANCELLED, which no client tries again elsewhere.
TEST(ServingEndTest, ACallThatComesWithTheEndIsAnsweredOrUnavailable) {
  for (int round = 0; round < 20; ++round) {
    ServingHarness harness;
    std::atomic<bool> ended = false;
    std::vector<std::future<std::set<grpc::StatusCode>>> callers;
    for (int i = 0; i < 4; ++i) {
      callers.push_back(std::async(std::launch::async, [&harness, &ended, channel = harness.Connect()] {
        const auto stub = v1::GenerationService::NewStub(channel);
        std::set<grpc::StatusCode> codes;
        while (!ended.load()) codes.insert(ReadStream(*stub, Task(1)).status.error_code());
        return codes;
      }));
    }
    ReadStream(*harness.generation, Task(5));  // the callers have begun, more or less
    harness.lifecycle.RequestDrain();
    EXPECT_EQ(harness.WaitForExit(), kExitOk);
    ended.store(true);
    for (auto& caller : callers) {
      EXPECT_THAT(caller.get(), ::testing::IsSubsetOf({grpc::StatusCode::OK, grpc::StatusCode::UNAVAILABLE}));
    }
  }
}

}  // namespace
}  // namespace minitron::server
