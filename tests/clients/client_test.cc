#include "clients/cpp/client.h"

#include <gtest/gtest.h>

#include <thread>

#include "tests/clients/fake_server.h"

namespace minitron::client {
namespace {

class ClientTest : public testing::Test {
 protected:
  v1::GenerateStreamRequest Request(const std::string& text) {
    v1::GenerateStreamRequest request;
    request.mutable_task()->set_text(text);
    return request;
  }

  FakeServer server_;
  Client client_{ClientOptions{server_.target(), std::nullopt, {}}};
};

TEST_F(ClientTest, StreamDeliversEveryEventInOrder) {
  std::string text;
  std::vector<int> cases;
  const Outcome outcome = client_.GenerateStream(Request("hello"), [&](const v1::GenerateStreamResponse& event) {
    cases.push_back(event.event_case());
    text += event.delta().text();
    return true;
  });
  EXPECT_FALSE(outcome.has_value());
  EXPECT_EQ(text, "Hello");
  EXPECT_EQ(cases, (std::vector<int>{1, 2, 2, 3}));
}

TEST_F(ClientTest, RefusalCarriesAllDetails) {
  const Outcome error = client_.GenerateStream(Request("fail"), [](const auto&) { return true; });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(error->message, "temperature 3.5 outside [0, 2]");
  EXPECT_EQ(error->reason, "OUT_OF_RANGE");
  EXPECT_EQ(error->metadata.at("limit"), "2");
  ASSERT_EQ(error->field_violations.size(), 1u);
  EXPECT_EQ(error->field_violations[0].subject, "task.sampling.temperature");
  ASSERT_EQ(error->quota_violations.size(), 1u);
  EXPECT_EQ(error->retry_delay, std::chrono::milliseconds(1500));
}

TEST_F(ClientTest, AStreamCutShortIsAnErrorAfterItsText) {
  std::string text;
  const Outcome error = client_.GenerateStream(Request("cut"), [&](const v1::GenerateStreamResponse& event) {
    text += event.delta().text();
    return true;
  });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, grpc::StatusCode::INTERNAL);
  EXPECT_EQ(text, "Hel");
}

TEST_F(ClientTest, ARefusingCallbackCancelsOnTheServer) {
  int events = 0;
  const Outcome error = client_.GenerateStream(Request("forever"), [&](const auto&) { return ++events < 3; });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, grpc::StatusCode::CANCELLED);
  EXPECT_EQ(events, 3);
  server_.generation.WaitForCancellation();
}

TEST_F(ClientTest, CancellationFromAnotherThreadEndsTheStream) {
  Cancellation cancellation;
  std::thread canceller;
  const Outcome error = client_.GenerateStream(
      Request("forever"),
      [&](const v1::GenerateStreamResponse& event) {
        if (event.has_started()) canceller = std::thread([&] { cancellation.Cancel(); });
        return true;
      },
      &cancellation);
  canceller.join();
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, grpc::StatusCode::CANCELLED);
  server_.generation.WaitForCancellation();
}

TEST_F(ClientTest, ACallThatStartsAfterItsCancellationEndsAtOnce) {
  Cancellation cancellation;
  cancellation.Cancel();
  v1::GenerateRequest request;
  request.mutable_task()->set_text("forever");
  v1::GenerateResponse response;
  const Outcome error = client_.Generate(request, &response, &cancellation);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, grpc::StatusCode::CANCELLED);
}

TEST_F(ClientTest, TimeoutAndMetadataAreSentWithEachCall) {
  Client client({server_.target(), std::chrono::milliseconds(50), {{"x-minitron-tenant", "blue"}}});
  v1::GenerateRequest request;
  request.mutable_task()->set_text("forever");
  v1::GenerateResponse response;
  const Outcome error = client.Generate(request, &response);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, grpc::StatusCode::DEADLINE_EXCEEDED);

  Client patient({server_.target(), std::chrono::minutes(5), {{"x-minitron-tenant", "blue"}}});
  request.mutable_task()->set_text("hello");
  ASSERT_FALSE(patient.Generate(request, &response).has_value());
  EXPECT_EQ(response.started().model(), "blue");
  EXPECT_EQ(response.sequences(0).text(), "Hello");
}

TEST_F(ClientTest, UnaryCallsReachTheirMethods) {
  v1::ScoreResponse score;
  EXPECT_FALSE(client_.Score({}, &score).has_value());
  EXPECT_EQ(score.total_logprob(), -1.5);
  v1::TokenizeRequest tokenize;
  tokenize.set_text("four");
  v1::TokenizeResponse tokens;
  EXPECT_FALSE(client_.Tokenize(tokenize, &tokens).has_value());
  EXPECT_EQ(tokens.token_ids(0), 4u);
  v1::DetokenizeRequest detokenize;
  detokenize.add_token_ids(1);
  v1::DetokenizeResponse text;
  EXPECT_FALSE(client_.Detokenize(detokenize, &text).has_value());
  EXPECT_EQ(text.text(), "1");
  v1::ListModelsResponse models;
  EXPECT_FALSE(client_.ListModels(&models).has_value());
  EXPECT_EQ(models.models(0).name(), "tiny");
  v1::Model model;
  EXPECT_FALSE(client_.GetModel("", &model).has_value());
  EXPECT_EQ(model.name(), "tiny");
  EXPECT_EQ(client_.GetModel("other", &model)->code, grpc::StatusCode::NOT_FOUND);
  v1::GetServerInfoResponse info;
  EXPECT_FALSE(client_.GetServerInfo(&info).has_value());
  EXPECT_EQ(info.backend(), "cpu");
  v1::GetLoadResponse load;
  EXPECT_FALSE(client_.GetLoad(&load).has_value());
  EXPECT_EQ(load.running_sequences(), 3u);
  v1::CancelRequestsResponse cancelled;
  EXPECT_FALSE(client_.CancelRequests({"a", "b"}, &cancelled).has_value());
  EXPECT_EQ(cancelled.cancelled(), 2u);
  EXPECT_FALSE(client_.Drain().has_value());
  grpc::health::v1::HealthCheckResponse health;
  EXPECT_FALSE(client_.CheckHealth("", &health).has_value());
  EXPECT_EQ(health.status(), grpc::health::v1::HealthCheckResponse::SERVING);
  EXPECT_EQ(client_.CheckHealth("nobody", &health)->code, grpc::StatusCode::NOT_FOUND);
}

TEST(ErrorTest, DetailsThatDoNotParseAreLeftOut) {
  const Error error = DecodeError({grpc::StatusCode::UNAVAILABLE, "busy", "\xFF\xFF not a status"});
  EXPECT_EQ(error.code, grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(error.message, "busy");
  EXPECT_TRUE(error.reason.empty());
  EXPECT_FALSE(error.retry_delay.has_value());
  EXPECT_EQ(CodeName(static_cast<grpc::StatusCode>(42)), "CODE_42");
}

}  // namespace
}  // namespace minitron::client
