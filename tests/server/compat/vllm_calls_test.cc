// vLLM's gRPC services over a real channel, against a scripted engine.
#include <compat/vllm.grpc.pb.h>
#include <compat/vllm_engine.grpc.pb.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <climits>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_replace.h"
#include "server/compat/tokenizer_bundle.h"
#include "server/compat/vllm_request.h"
#include "tests/server/server_harness.h"
#include "tests/server/wire.h"

namespace minitron::server {
namespace {

namespace vllm_engine = ::vllm::grpc::engine;

::vllm::GenerateRequest Request(uint32_t max_tokens) {
  ::vllm::GenerateRequest request;
  request.set_text("to be or not to be");
  request.mutable_stopping()->set_max_new_tokens(max_tokens);
  return request;
}

vllm_engine::GenerateRequest EngineRequest(uint32_t max_tokens, bool stream) {
  vllm_engine::GenerateRequest request;
  request.set_text("to be or not to be");
  request.set_stream(stream);
  request.mutable_sampling_params()->set_max_tokens(max_tokens);
  return request;
}

class VllmCallsTest : public ::testing::Test {
 protected:
  grpc::Status Generate(const ::vllm::GenerateRequest& request, ::vllm::GenerateResponse* response = nullptr) {
    grpc::ClientContext context;
    ::vllm::GenerateResponse ignored;
    return inference_->Generate(&context, request, response == nullptr ? &ignored : response);
  }
  grpc::Status Engine(const vllm_engine::GenerateRequest& request,
                      std::vector<vllm_engine::GenerateResponse>* responses = nullptr) {
    grpc::ClientContext context;
    const auto reader = engine_->Generate(&context, request);
    vllm_engine::GenerateResponse response;
    while (reader->Read(&response)) {
      if (responses != nullptr) responses->push_back(response);
    }
    return reader->Finish();
  }
  // What the scripted engine generates, as many tokens.
  std::vector<TokenId> Script(size_t count) {
    std::vector<TokenId> ids;
    for (size_t i = 0; i < count; ++i) ids.push_back(harness_.engine->script[i % harness_.engine->script.size()]);
    return ids;
  }

  ServerHarness harness_;
  std::shared_ptr<grpc::Channel> channel_ = harness_.Connect();
  std::unique_ptr<::vllm::Inference::Stub> inference_ = ::vllm::Inference::NewStub(channel_);
  std::unique_ptr<::vllm::Control::Stub> control_ = ::vllm::Control::NewStub(channel_);
  std::unique_ptr<vllm_engine::VllmEngine::Stub> engine_ = vllm_engine::VllmEngine::NewStub(channel_);
};

TEST_F(VllmCallsTest, PiecesGatherWhileTheReaderIsSlowAndNothingIsLost) {
  ::vllm::GenerateRequest request = Request(3000);
  request.mutable_sampling()->set_num_sequences(2);
  request.mutable_response()->set_output_token_ids(true);
  request.mutable_response()->set_output_logprobs(true);
  grpc::ClientContext context;
  const auto reader = inference_->GenerateStream(&context, request);
  harness_.engine->WaitForRequests(1);
  harness_.Step(3001);  // nobody reads: more than the client's window holds
  std::string text[2];
  std::vector<TokenId> ids[2];
  bool ended[2] = {false, false};
  int num_messages = 0;
  ::vllm::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_TRUE(message.has_prompt_info() && !message.has_outputs()) << "the prompt's answer comes first";
  EXPECT_EQ(message.prompt_info().num_prompt_tokens(), harness_.Encode("to be or not to be").size());
  while (reader->Read(&message)) {
    ++num_messages;
    EXPECT_FALSE(message.has_prompt_info());
    const ::vllm::SequenceOutput& output = message.outputs();
    ASSERT_LT(output.index(), 2U);
    EXPECT_FALSE(ended[output.index()]) << "nothing after the last piece";
    EXPECT_EQ(output.logprobs_size(), static_cast<int>(output.num_tokens()));
    text[output.index()] += output.text();
    ids[output.index()].insert(ids[output.index()].end(), output.token_ids().begin(), output.token_ids().end());
    ended[output.index()] = output.has_finish_info();
    if (output.has_finish_info()) {
      EXPECT_EQ(output.finish_info().finish_reason(), ::vllm::FinishInfo::LENGTH);
      EXPECT_EQ(output.finish_info().num_output_tokens(), 3000U);
    }
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_LT(num_messages, 6000);
  for (int i = 0; i < 2; ++i) {
    EXPECT_TRUE(ended[i]);
    EXPECT_EQ(ids[i], Script(3000));
    EXPECT_EQ(text[i], harness_.tokenizer->Decode(Script(3000), {}));
  }
}

TEST_F(VllmCallsTest, TheUnaryAnswerHasWhatWasAskedForAndNoMore) {
  harness_.RunEngine();
  ::vllm::GenerateResponse plain;
  ASSERT_TRUE(Generate(Request(4), &plain).ok());
  EXPECT_EQ(plain.outputs().text(), harness_.tokenizer->Decode(Script(4), {}));
  EXPECT_EQ(plain.outputs().num_tokens(), 4U);
  EXPECT_EQ(plain.outputs().token_ids_size() + plain.outputs().logprobs_size() + plain.prompt_info().token_ids_size(),
            0);
  EXPECT_TRUE(plain.outputs().has_finish_info());

  ::vllm::GenerateRequest request = Request(4);
  ::vllm::ResponseOptions& options = *request.mutable_response();
  options.set_output_text(false);
  options.set_output_token_ids(true);
  options.set_prompt_token_ids(true);
  ::vllm::GenerateResponse full;
  ASSERT_TRUE(Generate(request, &full).ok());
  EXPECT_EQ(full.outputs().text(), "");
  EXPECT_EQ(full.outputs().token_ids_size(), 4);
  const std::vector<TokenId> prompt = harness_.Encode(request.text());
  EXPECT_TRUE(std::equal(prompt.begin(), prompt.end(), full.prompt_info().token_ids().begin(),
                         full.prompt_info().token_ids().end()));
}

TEST_F(VllmCallsTest, UnsetIsGreedyAndTwentyTokens) {
  harness_.RunEngine();
  ::vllm::GenerateResponse response;
  ASSERT_TRUE(Generate(Request(0), &response).ok());
  EXPECT_EQ(response.outputs().finish_info().num_output_tokens(), 20U);
}

TEST_F(VllmCallsTest, WhatIsNotHereIsRefusedByName) {
  const auto expect = [&](const ::vllm::GenerateRequest& request, const std::string& field) {
    const grpc::Status status = Generate(request);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << field;
    EXPECT_EQ(FieldOf(status), field) << status.error_message();
  };
  ::vllm::GenerateRequest none = Request(1);
  none.clear_prompt();
  expect(none, "prompt");
  ::vllm::GenerateRequest two = Request(1);
  two.mutable_sampling()->set_num_sequences(2);
  expect(two, "sampling.num_sequences");
  ::vllm::GenerateRequest media = Request(1);
  media.add_media("x");
  expect(media, "media");
  ::vllm::GenerateRequest lora = Request(1);
  lora.set_lora_name("x");
  expect(lora, "lora_name");
  ::vllm::GenerateRequest transfer = Request(1);
  transfer.mutable_kv()->set_kv_transfer_params("");
  expect(transfer, "kv.kv_transfer_params");
  ::vllm::GenerateRequest allowed = Request(1);
  allowed.mutable_decoding()->add_allowed_token_ids(1);
  expect(allowed, "decoding.allowed_token_ids");
  ::vllm::GenerateRequest all = Request(1);
  all.mutable_response()->mutable_output_candidates()->set_all(true);
  expect(all, "response.output_candidates.all");
  ::vllm::GenerateRequest hot = Request(1);
  hot.set_temperature(9);
  expect(hot, "sampling.temperature");
  ::vllm::GenerateRequest other = Request(1);
  other.set_model("another");
  EXPECT_EQ(Generate(other).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(harness_.engine->num_live(), 0);
}

TEST_F(VllmCallsTest, TheEngineProtocolRefusesByNameToo) {
  const auto expect = [&](const vllm_engine::GenerateRequest& request, const std::string& field) {
    const grpc::Status status = Engine(request);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << field;
    EXPECT_EQ(FieldOf(status), field) << status.error_message();
  };
  vllm_engine::GenerateRequest rank = EngineRequest(1, false);
  rank.set_data_parallel_rank(1);
  expect(rank, "data_parallel_rank");
  vllm_engine::GenerateRequest images = EngineRequest(1, false);
  images.set_mm_inputs("x");
  expect(images, "mm_inputs");
  vllm_engine::GenerateRequest tag = EngineRequest(1, false);
  tag.mutable_sampling_params()->set_structural_tag("{}");
  expect(tag, "sampling_params.structural_tag");
  vllm_engine::GenerateRequest all = EngineRequest(1, false);
  all.mutable_sampling_params()->set_logprobs(-1);
  expect(all, "sampling_params.logprobs");
  vllm_engine::GenerateRequest bias = EngineRequest(1, false);
  (*bias.mutable_sampling_params()->mutable_logit_bias())[-1] = 1;
  expect(bias, "sampling_params.logit_bias");
}

TEST_F(VllmCallsTest, AnEngineStreamIsChunksAndThenEachWholeSequence) {
  harness_.RunEngine();
  vllm_engine::GenerateRequest request = EngineRequest(30, true);
  request.mutable_sampling_params()->set_n(2);
  request.mutable_sampling_params()->set_logprobs(2);
  std::vector<vllm_engine::GenerateResponse> responses;
  ASSERT_TRUE(Engine(request, &responses).ok());
  std::vector<TokenId> ids[2];
  std::vector<float> logprobs[2];
  int num_complete = 0;
  for (const vllm_engine::GenerateResponse& response : responses) {
    if (response.has_chunk()) {
      const vllm_engine::GenerateStreamChunk& chunk = response.chunk();
      auto& list = ids[chunk.index()];
      list.insert(list.end(), chunk.token_ids().begin(), chunk.token_ids().end());
      EXPECT_EQ(chunk.completion_tokens(), list.size());
      const auto& values = chunk.output_logprobs().token_logprobs();
      logprobs[chunk.index()].insert(logprobs[chunk.index()].end(), values.begin(), values.end());
      continue;
    }
    ++num_complete;
    const vllm_engine::GenerateComplete& complete = response.complete();
    const uint32_t index = complete.index();
    EXPECT_TRUE(
        std::equal(ids[index].begin(), ids[index].end(), complete.output_ids().begin(), complete.output_ids().end()));
    const auto& values = complete.output_logprobs().token_logprobs();
    EXPECT_TRUE(std::equal(logprobs[index].begin(), logprobs[index].end(), values.begin(), values.end()));
    EXPECT_EQ(complete.finish_reason(), "length");
    EXPECT_EQ(complete.completion_tokens(), 30U);
  }
  EXPECT_EQ(num_complete, 2);
  EXPECT_EQ(ids[0], Script(30));
  EXPECT_EQ(ids[1], Script(30));

  request.set_stream(false);
  responses.clear();
  ASSERT_TRUE(Engine(request, &responses).ok());
  ASSERT_EQ(responses.size(), 2U);
  EXPECT_TRUE(responses[0].has_complete() && responses[1].has_complete());
}

TEST_F(VllmCallsTest, AbortEndsARequestByItsNameInBothProtocols) {
  ::vllm::GenerateRequest first = Request(1000);
  first.set_request_id("first");
  auto one = std::async(std::launch::async, [&] { return Generate(first); });
  harness_.engine->WaitForRequests(1);
  vllm_engine::GenerateRequest second = EngineRequest(1000, true);
  second.set_request_id("second");
  auto two = std::async(std::launch::async, [&] { return Engine(second); });
  harness_.engine->WaitForRequests(2);
  {
    grpc::ClientContext context;
    ::vllm::AbortRequest request;
    request.add_request_ids("first");
    request.add_request_ids("nobody");
    ::vllm::AbortResponse response;
    EXPECT_TRUE(control_->Abort(&context, request, &response).ok());
  }
  {
    grpc::ClientContext context;
    vllm_engine::AbortRequest request;
    request.add_request_ids("second");
    vllm_engine::AbortResponse response;
    EXPECT_TRUE(engine_->Abort(&context, request, &response).ok());
  }
  harness_.engine->WaitForAborts(2);
  harness_.Step(2);
  EXPECT_EQ(one.get().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(two.get().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(harness_.engine->num_live(), 0);
}

TEST_F(VllmCallsTest, ALeavingClientFreesItsRequest) {
  grpc::ClientContext context;
  const auto reader = inference_->GenerateStream(&context, Request(1000));
  harness_.engine->WaitForRequests(1);
  context.TryCancel();
  harness_.engine->WaitForAborts(1);
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  harness_.Step(2);
  EXPECT_EQ(harness_.output->num_live(), 0);
}

TEST(VllmRequestTest, BypassingThePrefixCacheSharesWithNobody) {
  ::vllm::GenerateRequest request = Request(4);
  request.mutable_kv()->set_cache_salt("salt");
  EXPECT_EQ(compat::ReadVllmRequest(request, "fresh")->task.cache_salt(), "salt");
  request.mutable_kv()->set_bypass_prefix_cache(true);
  EXPECT_EQ(compat::ReadVllmRequest(request, "fresh")->task.cache_salt(), "fresh");
}

// The constraint that both protocols make of the same wish.
v1::OutputConstraint ConstraintOf(const std::function<void(::vllm::DecodingParameters&)>& inference,
                                  const std::function<void(vllm_engine::SamplingParams&)>& engine) {
  ::vllm::GenerateRequest first = Request(4);
  inference(*first.mutable_decoding());
  vllm_engine::GenerateRequest second = EngineRequest(4, false);
  engine(*second.mutable_sampling_params());
  const v1::OutputConstraint constraint = compat::ReadVllmRequest(first, "")->task.constraint();
  EXPECT_EQ(constraint.SerializeAsString(), compat::ReadEngineRequest(second, 64)->constraint().SerializeAsString());
  return constraint;
}

TEST(VllmRequestTest, StructuredOutputBecomesAConstraint) {
  EXPECT_EQ(ConstraintOf([](auto& d) { d.set_regex("a+"); }, [](auto& p) { p.set_regex("a+"); }).regex(), "a+");
  EXPECT_EQ(ConstraintOf([](auto& d) { d.set_json("{}"); }, [](auto& p) { p.set_json_schema("{}"); }).json_schema(),
            "{}");
  EXPECT_EQ(ConstraintOf([](auto& d) { d.set_grammar("g"); }, [](auto& p) { p.set_grammar("g"); }).grammar(), "g");
  const v1::OutputConstraint choice = ConstraintOf([](auto& d) { d.mutable_choice()->add_choices("yes"); },
                                                   [](auto& p) { p.mutable_choice()->add_choices("yes"); });
  EXPECT_EQ(choice.choices().options(0), "yes");
  EXPECT_TRUE(
      ConstraintOf([](auto& d) { d.set_json_object(true); }, [](auto& p) { p.set_json_object(true); }).json_object());
  EXPECT_EQ(
      ConstraintOf([](auto& d) { d.set_json_object(false); }, [](auto& p) { p.set_json_object(false); }).kind_case(),
      v1::OutputConstraint::KIND_NOT_SET);
}

TEST(VllmRequestTest, LowerPriorityRunsFirstInVllm) {
  ::vllm::GenerateRequest request = Request(4);
  for (const auto& [theirs, ours] : {std::pair{0, 0}, {5, -5}, {-5, 5}, {INT32_MIN, INT32_MAX}}) {
    request.set_priority(theirs);
    EXPECT_EQ(compat::ReadVllmRequest(request, "")->task.priority(), ours);
  }
}

TEST(VllmRequestTest, ZeroIsUnset) {
  const auto task = compat::ReadEngineRequest(EngineRequest(4, false), 1024);
  const v1::SamplingConfig& sampling = task->sampling();
  EXPECT_FALSE(sampling.has_temperature() || sampling.has_top_p() || sampling.has_top_k() || sampling.has_min_p() ||
               sampling.has_repetition_penalty() || sampling.has_seed());
  vllm_engine::GenerateRequest whole = EngineRequest(4, false);
  whole.mutable_sampling_params()->set_truncate_prompt_tokens(-1);
  EXPECT_EQ(compat::ReadEngineRequest(whole, 1024)->truncate_prompt_tokens(), 1024U);
}

TEST_F(VllmCallsTest, HealthAndInformation) {
  const auto healthy = [&] {
    grpc::ClientContext context;
    vllm_engine::HealthCheckResponse response;
    EXPECT_TRUE(engine_->HealthCheck(&context, {}, &response).ok());
    return response.healthy();
  };
  EXPECT_TRUE(healthy());
  harness_.server->SetReady(false);
  EXPECT_FALSE(healthy());
  grpc::ClientContext info_context;
  ::vllm::ServerInfo info;
  ASSERT_TRUE(control_->GetServerInfo(&info_context, {}, &info).ok());
  EXPECT_EQ(info.max_model_len(), static_cast<uint32_t>(harness_.context.model.info.max_context_tokens));
  EXPECT_EQ(info.parallelism().world_size(), 1U);
  EXPECT_FALSE(info.instance_id().empty());
  grpc::ClientContext loads_context;
  vllm_engine::GetLoadsResponse loads;
  ASSERT_TRUE(engine_->GetLoads(&loads_context, {}, &loads).ok());
  EXPECT_EQ(loads.loads_size(), 1);
}

TEST_F(VllmCallsTest, ATokenizerComesInPiecesWithItsDigestOnTheLast) {
  harness_.context.tokenizer_bundle = compat::TokenizerBundle{std::string(150'000, 'z'), "digest"};
  grpc::ClientContext context;
  const auto reader = engine_->GetTokenizer(&context, {});
  std::vector<size_t> sizes;
  std::string digests;
  smg::grpc::common::GetTokenizerChunk chunk;
  while (reader->Read(&chunk)) {
    sizes.push_back(chunk.data().size());
    digests += chunk.sha256() + ";";
    EXPECT_EQ(chunk.data().find_first_not_of('z'), std::string::npos);
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(sizes, (std::vector<size_t>{65536, 65536, 150'000 - 2 * 65536}));
  EXPECT_EQ(digests, ";;digest;");
}

TEST_F(VllmCallsTest, ATokenizerThatCannotBeSentIsRefusedWithItsReason) {
  harness_.context.tokenizer_bundle = compat::ReadTokenizerBundle("/nonexistent");
  grpc::ClientContext context;
  smg::grpc::common::GetTokenizerChunk chunk;
  const auto reader = engine_->GetTokenizer(&context, {});
  EXPECT_FALSE(reader->Read(&chunk));
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(status.error_message(), "the served model has no tokenizer files that can be sent");
}

TEST_F(VllmCallsTest, AClientThatLeavesATokenizerHalfReadIsForgotten) {
  harness_.context.tokenizer_bundle = compat::TokenizerBundle{std::string(8 << 20, 'z'), "digest"};
  for (int i = 0; i < 3; ++i) {
    grpc::ClientContext context;
    smg::grpc::common::GetTokenizerChunk chunk;
    const auto reader = engine_->GetTokenizer(&context, {});
    EXPECT_TRUE(reader->Read(&chunk));
    context.TryCancel();
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  harness_.server->Shutdown(std::chrono::milliseconds(0));  // waits for every call's end
  EXPECT_THAT(harness_.MetricsText(), ::testing::HasSubstr("minitron_grpc_streams_active{model_name=\"tiny\"} 0\n"));
}

// Two files, byte by byte as APPNOTE 6.3 says; the checksums are those of CRC-32's published definition.
TEST(TokenizerBundleTest, AnArchiveIsTheseBytes) {
  const auto bytes = [](const std::string& hex) {
    return absl::HexStringToBytes(absl::StrReplaceAll(hex, {{" ", ""}}));
  };
  const std::string crc_of_digits = "26 39 f4 cb";  // "123456789": 0xcbf43926
  const std::string common = "0a00 0000 0000 0000 2100";
  const std::string first = common + crc_of_digits + "09000000 09000000 0100 0000";
  const std::string second = common + "00000000 00000000 00000000 0200 0000";
  const std::string tail = "0000 0000 0000 00000000";
  EXPECT_EQ(compat::MakeZip({{"a", "123456789"}, {"bc", ""}}),
            bytes("504b0304" + first + "61 313233343536373839") + bytes("504b0304" + second + "6263") +
                bytes("504b0102 0a00" + first + tail + "00000000 61") +
                bytes("504b0102 0a00" + second + tail + "28000000 6263") +
                bytes("504b0506 0000 0000 0200 0200 5f000000 48000000 0000"));
}

TEST(TokenizerBundleTest, WhatCannotBeSentIsNamedWithoutItsFolder) {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "tokenizer_bundle_test";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  const auto write = [&](const char* name, const std::string& text) { std::ofstream(folder / name) << text; };
  const auto error = [&](int64_t limit) {
    return std::string(compat::ReadTokenizerBundle(folder.string(), limit).status().message());
  };
  EXPECT_EQ(error(100), "the served model has no tokenizer files that can be sent");
  write("tokenizer.model", std::string(60, 'm'));
  write("config.json", std::string(40, 'c'));
  write("model.safetensors", std::string(1000, 'w'));
  const auto bundle = compat::ReadTokenizerBundle(folder.string(), 100);
  ASSERT_TRUE(bundle.ok()) << bundle.status();
  EXPECT_EQ(bundle->zip,
            compat::MakeZip({{"tokenizer.model", std::string(60, 'm')}, {"config.json", std::string(40, 'c')}}));
  EXPECT_EQ(error(99),
            "config.json of the served model cannot be sent: no regular file, or more than 99 bytes with the others");
  std::filesystem::create_directory(folder / "tokenizer.json");
  EXPECT_EQ(
      error(100),
      "tokenizer.json of the served model cannot be sent: no regular file, or more than 100 bytes with the others");
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace minitron::server
