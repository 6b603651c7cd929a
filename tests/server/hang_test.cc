// An engine that hangs: health tells, and the process ends with its own exit code.
#include <grpc/health/v1/health.grpc.pb.h>
#include <gtest/gtest.h>
#include <minitron/v1/generation.grpc.pb.h>

#include <future>

#include "server/serving.h"
#include "tests/testing/fake_model_runner.h"

namespace minitron::server {
namespace {

using grpc::health::v1::HealthCheckResponse;

class HangTest : public ::testing::Test {
 protected:
  HangTest() { BlockSignals(); }

  void Start() {
    auto loaded = Tokenizer::Load(std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny", 2048);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    tokenizer_ = *std::move(loaded);
    lifecycle_ = std::make_unique<Lifecycle>();
    ServerOptions options;
    options.host = "127.0.0.1";
    options.port = 0;
    options.hang_timeout_s = 0.2;
    auto serving = Serving::Start(options, {"fake", &runner_, tokenizer_.get(), {}}, lifecycle_.get());
    ASSERT_TRUE(serving.ok()) << serving.status();
    serving_ = *std::move(serving);
    channel_ = grpc::CreateChannel("127.0.0.1:" + std::to_string(serving_->port()), grpc::InsecureChannelCredentials());
  }
  HealthCheckResponse::ServingStatus Health(const std::string& service) {
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    HealthCheckResponse response;
    EXPECT_TRUE(grpc::health::v1::Health::NewStub(channel_)->Check(&context, request, &response).ok());
    return response.status();
  }
  grpc::Status Generate() {
    grpc::ClientContext context;
    v1::GenerateRequest request;
    request.mutable_task()->mutable_token_ids()->add_ids(5);
    request.mutable_task()->mutable_stopping()->set_max_tokens(4);
    v1::GenerateResponse response;
    return v1::GenerationService::NewStub(channel_)->Generate(&context, request, &response);
  }

  testing::FakeModelRunner runner_{{.vocab_size = 2048}};
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Lifecycle> lifecycle_;
  std::unique_ptr<Serving> serving_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(HangTest, HealthFallsClientsAreToldAndTheEndIsAskedForWhenAStepNeverReturns) {
  Start();
  std::promise<void> asked;
  std::atomic<bool> once{false};
  serving_->SetOnHang([&] {
    if (!once.exchange(true)) asked.set_value();
  });
  EXPECT_TRUE(Generate().ok());
  EXPECT_EQ(Health("liveness"), HealthCheckResponse::SERVING);
  EXPECT_EQ(Health(""), HealthCheckResponse::SERVING);
  runner_.Hold();
  auto call = std::async(std::launch::async, [this] { return Generate(); });
  runner_.WaitUntilHeld();
  asked.get_future().wait();
  EXPECT_EQ(Health("liveness"), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Health(""), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Health("minitron.v1.GenerationService"), HealthCheckResponse::NOT_SERVING);
  const grpc::Status told = call.get();
  EXPECT_EQ(told.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(told.error_message(), "the engine hangs; this server will restart");
  runner_.Release();
}

using HangDeathTest = HangTest;

TEST_F(HangDeathTest, TheProcessEndsWithACodeOfItsOwn) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        Start();
        runner_.Hold();
        Generate();
        std::promise<void>().get_future().wait();
      },
      ::testing::ExitedWithCode(kExitHang), "engine hung");
}

}  // namespace
}  // namespace minitron::server
