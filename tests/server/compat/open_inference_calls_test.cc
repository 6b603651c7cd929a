// ModelInfer and ModelStreamInfer over a real channel, against a scripted engine.
#include <compat/open_inference.grpc.pb.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/server/server_harness.h"

namespace minitron::server {
namespace {

using ::testing::HasSubstr;

inference::ModelInferRequest Request(const std::string& id, bool stream, const std::string& sampling) {
  inference::ModelInferRequest request;
  request.set_model_name("tiny");
  request.set_id(id);
  const auto add = [&](const char* name, const char* type) {
    auto* input = request.add_inputs();
    input->set_name(name);
    input->set_datatype(type);
    input->add_shape(1);
    return input->mutable_contents();
  };
  add("text_input", "BYTES")->add_bytes_contents("to be or not to be");
  add("stream", "BOOL")->add_bool_contents(stream);
  add("exclude_input_in_output", "BOOL")->add_bool_contents(true);
  add("sampling_parameters", "BYTES")->add_bytes_contents(sampling);
  return request;
}

std::string TextOf(const inference::ModelInferResponse& response) {
  for (int i = 0; i < response.outputs_size(); ++i) {
    if (response.outputs(i).name() == "text_output") return response.raw_output_contents(i).substr(4);
  }
  return "";
}

bool IsFinal(const inference::ModelStreamInferResponse& message) {
  return message.infer_response().parameters().at("triton_final_response").bool_param();
}

class OpenInferenceCallsTest : public ::testing::Test {
 protected:
  using Stream = grpc::ClientReaderWriter<inference::ModelInferRequest, inference::ModelStreamInferResponse>;

  std::unique_ptr<Stream> Open(grpc::ClientContext* context) { return stub_->ModelStreamInfer(context); }

  ServerHarness harness_;
  std::unique_ptr<inference::GRPCInferenceService::Stub> stub_ =
      inference::GRPCInferenceService::NewStub(harness_.Connect());
};

TEST_F(OpenInferenceCallsTest, AnswersGatherWhileTheReaderIsSlow) {
  grpc::ClientContext context;
  const auto stream = Open(&context);
  stream->Write(Request("a", true, R"({"max_tokens":4000})"));
  harness_.engine->WaitForRequests(1);
  harness_.Step(4000);  // nobody reads: more than the client's window holds
  std::string text;
  int num_messages = 0;
  inference::ModelStreamInferResponse message;
  while (stream->Read(&message)) {
    ++num_messages;
    text += TextOf(message.infer_response());
    if (IsFinal(message)) break;
  }
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_LT(num_messages, 4000);
  std::vector<TokenId> ids;
  for (size_t i = 0; i < 4000; ++i) ids.push_back(harness_.engine->script[i % harness_.engine->script.size()]);
  EXPECT_EQ(text, harness_.tokenizer->Decode(ids, {}));
}

TEST_F(OpenInferenceCallsTest, ARequestThatFailsLeavesItsNeighboursAlone) {
  grpc::ClientContext context;
  const auto stream = Open(&context);
  stream->Write(Request("good", false, R"({"max_tokens":3})"));
  stream->Write(Request("bad", false, R"({"temperature":9})"));
  inference::ModelStreamInferResponse message;
  ASSERT_TRUE(stream->Read(&message));
  EXPECT_EQ(message.infer_response().id(), "bad");
  EXPECT_THAT(message.error_message(), HasSubstr("sampling.temperature: 9 outside [0, 2]"));
  EXPECT_TRUE(IsFinal(message));
  harness_.RunEngine();
  ASSERT_TRUE(stream->Read(&message));
  EXPECT_EQ(message.infer_response().id(), "good");
  EXPECT_EQ(message.error_message(), "");
  EXPECT_FALSE(TextOf(message.infer_response()).empty());
  stream->WritesDone();
  EXPECT_FALSE(stream->Read(&message));
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_THAT(harness_.MetricsText(), HasSubstr("reason=\"invalid\"} 1"));
}

TEST_F(OpenInferenceCallsTest, WithTheHeaderAnErrorEndsTheStreamAndItsRequests) {
  grpc::ClientContext context;
  context.AddMetadata("triton_grpc_error", "true");
  const auto stream = Open(&context);
  stream->Write(Request("running", true, R"({"max_tokens":1000})"));
  harness_.engine->WaitForRequests(1);
  stream->Write(Request("bad", false, R"({"temperature":9})"));
  inference::ModelStreamInferResponse message;
  while (stream->Read(&message)) EXPECT_EQ(message.error_message(), "");
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  harness_.engine->WaitForAborts(1);
}

TEST_F(OpenInferenceCallsTest, CancellingTheStreamAbortsEveryRequest) {
  grpc::ClientContext context;
  const auto stream = Open(&context);
  for (const char* id : {"a", "b", "c"}) stream->Write(Request(id, true, R"({"max_tokens":1000})"));
  harness_.engine->WaitForRequests(3);
  context.TryCancel();
  harness_.engine->WaitForAborts(3);
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  harness_.Step(2);
  EXPECT_EQ(harness_.output->num_live(), 0);
}

TEST_F(OpenInferenceCallsTest, AReaderThatStopsIsCutOff) {
  grpc::ClientContext context;
  const auto stream = Open(&context);
  for (int i = 0; i < 8; ++i) stream->Write(Request("s", true, R"({"max_tokens":4000,"logprobs":20})"));
  harness_.engine->WaitForRequests(8);
  harness_.Step(4000);
  harness_.clock_ms += 60'000;
  harness_.output->CutOffStalledCalls();
  inference::ModelStreamInferResponse message;
  while (stream->Read(&message)) {
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(OpenInferenceCallsTest, AnEngineFailureEndsRequestsWithAMessageAndUnaryCallsWithAStatus) {
  grpc::ClientContext context;
  const auto stream = Open(&context);
  stream->Write(Request("a", false, R"({"max_tokens":5})"));
  harness_.engine->WaitForRequests(1);
  harness_.engine->engine_error = "device lost";
  harness_.Step();
  inference::ModelStreamInferResponse message;
  ASSERT_TRUE(stream->Read(&message));
  EXPECT_THAT(message.error_message(), HasSubstr("the engine has failed"));
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());

  grpc::ClientContext unary_context;
  inference::ModelInferResponse response;
  const grpc::Status status = stub_->ModelInfer(&unary_context, Request("b", false, "{}"), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INTERNAL);
}

TEST_F(OpenInferenceCallsTest, ReadinessFollowsTheServer) {
  const auto ready = [&] {
    grpc::ClientContext context;
    inference::ServerReadyResponse response;
    EXPECT_TRUE(stub_->ServerReady(&context, {}, &response).ok());
    return response.ready();
  };
  EXPECT_TRUE(ready());
  harness_.server->SetReady(false);
  EXPECT_FALSE(ready());
}

TEST_F(OpenInferenceCallsTest, CallsAreCountedByMethod) {
  harness_.RunEngine();
  grpc::ClientContext context;
  inference::ModelInferResponse response;
  ASSERT_TRUE(stub_->ModelInfer(&context, Request("u", true, R"({"max_tokens":3})"), &response).ok());
  EXPECT_EQ(response.id(), "u");
  EXPECT_THAT(harness_.MetricsText(), HasSubstr("code=\"OK\",method=\"ModelInfer\"} 1"));
}

}  // namespace
}  // namespace minitron::server
