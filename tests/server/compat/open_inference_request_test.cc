// The messages against bytes made by the real client (tritonclient 2.73), and what becomes of a request.
#include "server/compat/open_inference_request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "absl/strings/escaping.h"
#include "server/compat/open_inference_tensors.h"
#include "server/grpc_status.h"

namespace minitron::server::compat {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// infer(request_id="q7", priority=2, timeout=1000000) with raw tensors, and enable_empty_final_response.
constexpr char kRequest[] =
    "0a0474696e791201311a027137220e0a087072696f7269747912022802220f0a0774696d656f7574120410c0843d22280a22"
    "747269746f6e5f656e61626c655f656d7074795f66696e616c5f726573706f6e7365120208012a160a0a746578745f696e70"
    "7574120542595445531a01012a110a0673747265616d1204424f4f4c1a01012a160a0a6d61785f746f6b656e731205494e54"
    "33321a01012a100a05746f705f701204465033321a01012a180a0b72616e646f6d5f73656564120655494e5436341a010132"
    "0d0a0b746578745f6f75747075743a060200000068693a01013a04050000003a040000003f3a080100000000000080";
// The same kind of request with typed contents.
constexpr char kTyped[] =
    "0a0474696e791a0574797065642a1c0a0a746578745f696e707574120542595445531a01012a04420268692a160a06737472"
    "65616d1204424f4f4c1a01012a030a01002a1b0a0a6d61785f746f6b656e731205494e5433321a01012a031201052a1e0a0b"
    "74656d70657261747572651204465033321a01012a0632040000803e2a160a0473656564120655494e5436341a01012a032a"
    "0109";
constexpr char kStreamResponse[] =
    "124c0a0474696e791201311a027137221b0a15747269746f6e5f66696e616c5f726573706f6e7365120208002a170a0b7465"
    "78745f6f7574707574120542595445531a0101320703000000616263";
constexpr char kErrorResponse[] =
    "0a0362616412270a0474696e791a027137221b0a15747269746f6e5f66696e616c5f726573706f6e736512020801";
constexpr char kConfig[] =
    "0a5f0a0474696e7912086d696e6974726f6e2a110a0a746578745f696e707574100d2201012a0d0a04736565641005220101"
    "4001321b0a0b746578745f6f7574707574100d1a0affffffffffffffffff018a01086d696e6974726f6e9a01020801";
constexpr char kStatistics[] =
    "0a300a0474696e791201311880d095ffbc312003280c321a0a0508031088271204080110071a04080410082a05080410a01f";
constexpr char kMetadata[] =
    "0a0474696e791201311a086d696e6974726f6e22160a0a746578745f696e707574120542595445531a01012a200a0b746578"
    "745f6f7574707574120542595445531a0affffffffffffffffff01";

template <typename Message>
Message Parse(const char* hex) {
  Message message;
  EXPECT_TRUE(message.ParseFromString(absl::HexStringToBytes(hex)));
  return message;
}

std::string Hex(const google::protobuf::Message& message) {
  return absl::BytesToHexString(message.SerializeAsString());
}

// A request with one raw tensor per call.
class Request {
 public:
  Request() { Text("text_input", {"hi"}); }
  Request& Text(const std::string& name, const std::vector<std::string>& values) {
    std::string raw;
    for (const std::string& value : values) {
      const auto size = static_cast<uint32_t>(value.size());
      raw.append(reinterpret_cast<const char*>(&size), sizeof(size)).append(value);
    }
    return Raw(name, "BYTES", static_cast<int64_t>(values.size()), raw);
  }
  template <typename Value>
  Request& One(const std::string& name, const std::string& type, Value value) {
    return Raw(name, type, 1, std::string(reinterpret_cast<const char*>(&value), sizeof(value)));
  }
  Request& Raw(const std::string& name, const std::string& type, int64_t extent, const std::string& raw) {
    auto& input = *message.add_inputs();
    input.set_name(name);
    input.set_datatype(type);
    input.add_shape(extent);
    message.add_raw_input_contents(raw);
    return *this;
  }
  InferTask Read() const {
    auto task = ReadInferRequest(message);
    EXPECT_TRUE(task.ok()) << task.status();
    return task.ok() ? *std::move(task) : InferTask();
  }
  std::string FieldOfError() const {
    const auto task = ReadInferRequest(message);
    if (task.ok()) return "accepted";
    EXPECT_EQ(task.status().code(), absl::StatusCode::kInvalidArgument) << task.status();
    return GetField(task.status());
  }

  inference::ModelInferRequest message;
};

TEST(OpenInferenceRequestTest, TheRealClientsRequestBecomesTheNativeTask) {
  const auto task = ReadInferRequest(Parse<inference::ModelInferRequest>(kRequest));
  ASSERT_TRUE(task.ok()) << task.status();
  EXPECT_EQ(task->task.model(), "tiny");
  EXPECT_EQ(task->task.text(), "hi");
  EXPECT_EQ(task->task.priority(), -2);
  EXPECT_EQ(task->task.stopping().max_tokens(), 5u);
  EXPECT_EQ(task->task.sampling().top_p(), 0.5f);
  EXPECT_EQ(task->task.sampling().seed(), (uint64_t{1} << 63) + 1);
  EXPECT_EQ(task->timeout, std::chrono::seconds(1));
  EXPECT_EQ(task->options.id, "q7");
  EXPECT_TRUE(task->options.stream);
  EXPECT_TRUE(task->options.empty_final);
  EXPECT_EQ(task->options.prepended_text, "");
  EXPECT_THAT(task->options.requested, ElementsAre("text_output"));
}

TEST(OpenInferenceRequestTest, TypedContentsAreReadToo) {
  const auto task = ReadInferRequest(Parse<inference::ModelInferRequest>(kTyped));
  ASSERT_TRUE(task.ok()) << task.status();
  EXPECT_EQ(task->task.text(), "hi");
  EXPECT_EQ(task->task.stopping().max_tokens(), 5u);
  EXPECT_EQ(task->task.sampling().temperature(), 0.25f);
  EXPECT_EQ(task->task.sampling().seed(), 9u);
  EXPECT_FALSE(task->options.stream);
  EXPECT_EQ(task->options.prepended_text, "hi");  // Triton's rule: an answer in one piece echoes its prompt
}

TEST(OpenInferenceRequestTest, AnswersAreTheBytesTheRealClientWouldMake) {
  inference::ModelStreamInferResponse message;
  auto& response = *message.mutable_infer_response();
  response.set_model_name("tiny");
  response.set_model_version(kModelVersion);
  response.set_id("q7");
  (*response.mutable_parameters())["triton_final_response"].set_bool_param(false);
  AddBytes("text_output", {"abc"}, response);
  EXPECT_EQ(Hex(message), kStreamResponse);

  inference::ModelStreamInferResponse error;
  error.set_error_message("bad");
  error.mutable_infer_response()->set_model_name("tiny");
  error.mutable_infer_response()->set_id("q7");
  (*error.mutable_infer_response()->mutable_parameters())["triton_final_response"].set_bool_param(true);
  EXPECT_EQ(Hex(error), kErrorResponse);
}

TEST(OpenInferenceRequestTest, DescriptionsKeepEveryByteOfTheRealClient) {
  const auto config = Parse<inference::ModelConfigResponse>(kConfig);
  EXPECT_EQ(config.config().input(1).data_type(), inference::TYPE_UINT64);
  EXPECT_TRUE(config.config().input(1).optional());
  EXPECT_TRUE(config.config().model_transaction_policy().decoupled());
  EXPECT_EQ(Hex(config), kConfig);
  const auto statistics = Parse<inference::ModelStatisticsResponse>(kStatistics);
  EXPECT_EQ(statistics.model_stats(0).execution_count(), 12u);
  EXPECT_EQ(statistics.model_stats(0).inference_stats().compute_infer().ns(), 4000u);
  EXPECT_EQ(Hex(statistics), kStatistics);
  const auto metadata = Parse<inference::ModelMetadataResponse>(kMetadata);
  EXPECT_EQ(metadata.outputs(0).shape(0), -1);
  EXPECT_EQ(Hex(metadata), kMetadata);
}

// Bytes -> message -> the same bytes, and no field in them that the message does not know.
template <typename Message>
Message Kept(const char* hex) {
  auto message = Parse<Message>(hex);
  EXPECT_EQ(message.GetReflection()->GetUnknownFields(message).field_count(), 0) << message.ShortDebugString();
  EXPECT_EQ(Hex(message), hex);
  return message;
}

TEST(OpenInferenceRequestTest, QuestionsAndAnswersOfHealthKeepEveryByteOfTheRealClient) {
  constexpr char kTiny[] = "0a0474696e79120131";  // name and version, the same in all questions about a model
  Kept<inference::ServerLiveRequest>("");
  Kept<inference::ServerReadyRequest>("");
  Kept<inference::ServerMetadataRequest>("");
  EXPECT_TRUE(Kept<inference::ServerLiveResponse>("0801").live());
  EXPECT_TRUE(Kept<inference::ServerReadyResponse>("0801").ready());
  EXPECT_TRUE(Kept<inference::ModelReadyResponse>("0801").ready());
  EXPECT_EQ(Kept<inference::ModelReadyRequest>(kTiny).version(), "1");
  EXPECT_EQ(Kept<inference::ModelMetadataRequest>(kTiny).version(), "1");
  EXPECT_EQ(Kept<inference::ModelConfigRequest>(kTiny).version(), "1");
  EXPECT_EQ(Kept<inference::ModelStatisticsRequest>(kTiny).name(), "tiny");
  const auto metadata = Kept<inference::ServerMetadataResponse>(
      "0a0f6d696e6974726f6e2d7365727665721205302e312e301a0a737461746973746963731a0873657175656e6365");
  EXPECT_EQ(metadata.name(), "minitron-server");
  EXPECT_THAT(metadata.extensions(), ElementsAre("statistics", "sequence"));
}

TEST(OpenInferenceRequestTest, AConstraintIsAParameter) {
  const auto parameter = [](const std::string& name, const std::string& value) {
    Request request;
    (*request.message.mutable_parameters())[name].set_string_param(value);
    return request.Read().task.constraint();
  };
  EXPECT_EQ(parameter("guided_regex", "a+").regex(), "a+");
  EXPECT_EQ(parameter("guided_json", R"({"type":"null"})").json_schema(), R"({"type":"null"})");
  EXPECT_EQ(parameter("guided_grammar", "root ::= \"a\"").grammar(), "root ::= \"a\"");
}

TEST(OpenInferenceRequestTest, SamplingParametersMayBeStrings) {
  const InferTask read =
      Request()
          .Text("sampling_parameters",
                {R"({"max_tokens":"128","temperature":"0.5","top_k":-1,"ignore_eos":"true","stop":["a","b"],"n":2,
                     "seed":"-1","logit_bias":{"7":-1.5},"min_p":null,"logprobs":3,"best_of":1,
                     "stop_token_ids":[4,5],"frequency_penalty":1})"})
          .Read();
  const v1::GenerationTask& task = read.task;
  EXPECT_EQ(task.stopping().max_tokens(), 128u);
  EXPECT_EQ(task.sampling().temperature(), 0.5f);
  EXPECT_EQ(task.sampling().top_k(), 0u);
  EXPECT_TRUE(task.stopping().ignore_eos());
  EXPECT_THAT(task.stopping().stop_sequences(), ElementsAre("a", "b"));
  EXPECT_THAT(task.stopping().stop_token_ids(), ElementsAre(4u, 5u));
  EXPECT_EQ(task.sampling().num_sequences(), 2u);
  EXPECT_EQ(task.sampling().seed(), ~uint64_t{0});
  EXPECT_EQ(task.sampling().logit_bias().at(7), -1.5f);
  EXPECT_FALSE(task.sampling().has_min_p());
  EXPECT_EQ(task.output().logprobs(), 3u);
  EXPECT_EQ(task.sampling().frequency_penalty(), 1.0f);
}

TEST(OpenInferenceRequestTest, ParametersOfTheRequestAreSamplingParametersUnlessTheTensorIsThere) {
  Request request;
  (*request.message.mutable_parameters())["max_tokens"].set_int64_param(7);
  (*request.message.mutable_parameters())["temperature"].set_double_param(0.5);
  EXPECT_EQ(request.Read().task.stopping().max_tokens(), 7u);
  EXPECT_EQ(request.Read().task.sampling().temperature(), 0.5f);
  request.Text("sampling_parameters", {"{}"});
  EXPECT_THAT(request.FieldOfError(), HasSubstr("parameters."));
}

TEST(OpenInferenceRequestTest, EndIdReplacesTheModelsEndOfSequence) {
  const InferTask replaced = Request().One<int32_t>("end_id", "INT32", 9).Read();
  EXPECT_TRUE(replaced.task.stopping().ignore_eos());
  EXPECT_THAT(replaced.task.stopping().stop_token_ids(), ElementsAre(9u));
  const InferTask none = Request().One<int32_t>("end_id", "INT32", -1).Read();
  EXPECT_TRUE(none.task.stopping().ignore_eos());
  EXPECT_EQ(none.task.stopping().stop_token_ids_size(), 0);
}

TEST(OpenInferenceRequestTest, EveryBadTensorIsNamed) {
  const std::string text("\2\0\0\0hi", 6);
  EXPECT_EQ(Request().Text("no_such_tensor", {"a"}).FieldOfError(), "inputs.no_such_tensor");
  EXPECT_EQ(Request().Text("text_input", {"again"}).FieldOfError(), "inputs.text_input");
  EXPECT_EQ(Request().Text("top_p", {"0.5"}).FieldOfError(), "inputs.top_p");
  EXPECT_EQ(Request().Raw("top_p", "FP16", 1, "ab").FieldOfError(), "inputs.top_p");
  EXPECT_EQ(Request().Raw("top_p", "FP32", 1, "abc").FieldOfError(), "inputs.top_p");
  EXPECT_EQ(Request().Raw("top_p", "FP32", 2, "abcdabcd").FieldOfError(), "inputs.top_p");
  EXPECT_EQ(Request().Raw("top_p", "FP32", -1, "abcd").FieldOfError(), "inputs.top_p");
  EXPECT_EQ(Request().Raw("top_p", "FP32", int64_t{1} << 62, "abcd").FieldOfError(), "inputs.top_p");
  EXPECT_EQ(Request().Raw("stop_words", "BYTES", 1, text.substr(0, 3)).FieldOfError(), "inputs.stop_words");
  EXPECT_EQ(Request().Raw("stop_words", "BYTES", 1, text.substr(0, 5)).FieldOfError(), "inputs.stop_words");
  EXPECT_EQ(Request().Raw("stop_words", "BYTES", 1, text + text).FieldOfError(), "inputs.stop_words");
  EXPECT_EQ(Request().Raw("stop_words", "BYTES", 2, text).FieldOfError(), "inputs.stop_words");
  EXPECT_EQ(Request().Raw("stop_words", "BYTES", 1, "\xff\xff\xff\xffhi").FieldOfError(), "inputs.stop_words");
  EXPECT_EQ(Request().One<int32_t>("max_tokens", "INT32", -5).FieldOfError(), "inputs.max_tokens");
  EXPECT_EQ(Request().One<int32_t>("beam_width", "INT32", 2).FieldOfError(), "inputs.beam_width");
  EXPECT_EQ(Request().One<int32_t>("end_id", "INT32", -2).FieldOfError(), "inputs.end_id");
  EXPECT_EQ(Request().Text("bad_words", {"", "x"}).FieldOfError(), "inputs.bad_words");
}

TEST(OpenInferenceRequestTest, EveryBadParameterIsNamed) {
  EXPECT_EQ(Request().Text("sampling_parameters", {"{"}).FieldOfError(), "inputs.sampling_parameters");
  EXPECT_EQ(Request().Text("sampling_parameters", {"[]"}).FieldOfError(), "inputs.sampling_parameters");
  for (const auto& [json, field] :
       std::vector<std::pair<std::string, std::string>>{{R"({"temperature":"hot"})", "temperature"},
                                                        {R"({"top_k":1.5})", "top_k"},
                                                        {R"({"n":-1})", "n"},
                                                        {R"({"max_tokens":4294967296})", "max_tokens"},
                                                        {R"({"stop":[1]})", "stop"},
                                                        {R"({"stop_token_ids":[-1]})", "stop_token_ids"},
                                                        {R"({"logit_bias":{"x":1}})", "logit_bias"},
                                                        {R"({"ignore_eos":"perhaps"})", "ignore_eos"},
                                                        {R"({"best_of":2})", "best_of"},
                                                        {R"({"use_beam_search":true})", "use_beam_search"},
                                                        {R"({"priority":99999999999})", "priority"},
                                                        {R"({"lora_name":"x"})", "sampling_parameters.lora_name"}}) {
    EXPECT_EQ(Request().Text("sampling_parameters", {json}).FieldOfError(), field) << json;
  }
  Request request;
  (*request.message.mutable_parameters())["timeout"].set_int64_param(-1);
  EXPECT_EQ(request.FieldOfError(), "parameters.timeout");
  Request levels;
  (*levels.message.mutable_parameters())["priority"].set_uint64_param(101);
  EXPECT_EQ(levels.FieldOfError(), "parameters.priority");
}

TEST(OpenInferenceRequestTest, WhatIsMissingTwofoldOrTooLongIsNamed) {
  EXPECT_EQ(GetField(ReadInferRequest(inference::ModelInferRequest()).status()), "inputs.text_input");
  Request raw;
  raw.message.add_raw_input_contents("x");
  EXPECT_EQ(raw.FieldOfError(), "raw_input_contents");
  Request output;
  output.message.add_outputs()->set_name("logits");
  EXPECT_EQ(output.FieldOfError(), "outputs.logits");
  Request id;
  id.message.set_id(std::string(257, 'a'));
  EXPECT_EQ(id.FieldOfError(), "id");
  Request version;
  version.message.set_model_version("2");
  EXPECT_EQ(ReadInferRequest(version.message).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(
      Request().One<bool>("stream", "BOOL", true).One<bool>("exclude_input_in_output", "BOOL", false).FieldOfError(),
      "inputs.exclude_input_in_output");
}

}  // namespace
}  // namespace minitron::server::compat
