// The wire format of vLLM's two gRPC protocols: each message that is read or sent, against bytes put together here from
// field numbers and wire types, without the generated code. A field that moves or changes its type breaks a line.
#include <compat/vllm.pb.h>
#include <compat/vllm_common.pb.h>
#include <compat/vllm_engine.pb.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>

namespace minitron::server {
namespace {

namespace vllm_engine = ::vllm::grpc::engine;

std::string Varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  return out + static_cast<char>(value);
}
std::string Tag(int number, int wire_type) { return Varint(static_cast<uint64_t>(number) << 3 | wire_type); }
std::string Num(int number, uint64_t value) { return Tag(number, 0) + Varint(value); }
std::string Len(int number, const std::string& bytes) { return Tag(number, 2) + Varint(bytes.size()) + bytes; }
template <typename Value>
std::string Fixed(Value value) {
  std::string out(sizeof(value), '\0');
  std::memcpy(out.data(), &value, sizeof(value));  // little-endian machines only, as everywhere here
  return out;
}
std::string Float(int number, float value) { return Tag(number, 5) + Fixed(value); }
std::string Double(int number, double value) { return Tag(number, 1) + Fixed(value); }
std::string Packed(int number, std::initializer_list<uint64_t> values) {
  std::string all;
  for (const uint64_t value : values) all += Varint(value);
  return Len(number, all);
}
std::string PackedFloats(int number, std::initializer_list<float> values) {
  std::string all;
  for (const float value : values) all += Fixed(value);
  return Len(number, all);
}

// Bytes -> message -> the same bytes, and no field in them that the message does not know.
template <typename Message>
Message Read(const std::string& bytes) {
  Message message;
  EXPECT_TRUE(message.ParseFromString(bytes));
  EXPECT_EQ(message.GetReflection()->GetUnknownFields(message).field_count(), 0) << message.ShortDebugString();
  EXPECT_EQ(message.SerializeAsString(), bytes) << message.ShortDebugString();
  return message;
}

TEST(VllmWireTest, GenerateRequest) {
  const auto request =
      Read<::vllm::GenerateRequest>(Len(1, "id") + Len(2, "m") + Len(3, "to be") + Float(5, 0.5F) +
                                    Len(6, Num(1, 2) + Num(2, 40) + Float(3, 0.9F) + Float(4, 0.1F) + Num(5, 7)) +
                                    Num(11, 99) + Num(12, 3) + Len(13, "session") + Len(14, "media") + Len(15, "lora"));
  EXPECT_EQ(request.request_id(), "id");
  EXPECT_EQ(request.model(), "m");
  EXPECT_EQ(request.text(), "to be");
  EXPECT_EQ(request.temperature(), 0.5F);
  EXPECT_EQ(request.sampling().num_sequences(), 2U);
  EXPECT_EQ(request.sampling().top_k(), 40U);
  EXPECT_EQ(request.sampling().top_p(), 0.9F);
  EXPECT_EQ(request.sampling().min_p(), 0.1F);
  EXPECT_EQ(request.sampling().seed(), 7);
  EXPECT_EQ(request.truncate_prompt_tokens(), 99U);
  EXPECT_EQ(request.priority(), 3);
  EXPECT_EQ(request.session_id(), "session");
  EXPECT_EQ(request.media_size(), 1);
  EXPECT_EQ(request.lora_name(), "lora");
  const auto ids = Read<::vllm::GenerateRequest>(Len(4, Packed(1, {5, 300})));
  EXPECT_EQ(ids.token_ids().ids(1), 300U);
}

TEST(VllmWireTest, DecodingParameters) {
  const auto decoding =
      Read<::vllm::DecodingParameters>(Float(1, 0.1F) + Float(2, 0.2F) + Float(3, 1.5F) +
                                       Len(4, Num(1, 9) + Float(2, -1)) + Packed(5, {1, 2}) + Len(8, Len(1, "yes")));
  EXPECT_EQ(decoding.presence_penalty(), 0.1F);
  EXPECT_EQ(decoding.frequency_penalty(), 0.2F);
  EXPECT_EQ(decoding.repetition_penalty(), 1.5F);
  EXPECT_EQ(decoding.logit_bias().at(9), -1);
  EXPECT_EQ(decoding.allowed_token_ids_size(), 2);
  EXPECT_EQ(decoding.choice().choices(0), "yes");
  EXPECT_EQ(Read<::vllm::DecodingParameters>(Len(6, "{}")).json(), "{}");
  EXPECT_EQ(Read<::vllm::DecodingParameters>(Len(7, "a+")).regex(), "a+");
  EXPECT_EQ(Read<::vllm::DecodingParameters>(Len(9, "g")).grammar(), "g");
  EXPECT_TRUE(Read<::vllm::DecodingParameters>(Num(10, 1)).json_object());
  EXPECT_EQ(Read<::vllm::DecodingParameters>(Len(11, "t")).structural_tag(), "t");
}

TEST(VllmWireTest, StoppingResponseAndCacheOptions) {
  const auto stopping =
      Read<::vllm::StoppingCriteria>(Num(1, 10) + Num(2, 2) + Packed(3, {3, 4}) + Len(4, "\n") + Num(5, 1) + Num(6, 1));
  EXPECT_EQ(stopping.max_new_tokens(), 10U);
  EXPECT_EQ(stopping.min_new_tokens(), 2U);
  EXPECT_EQ(stopping.stop_token_ids(1), 4U);
  EXPECT_EQ(stopping.stop_strings(0), "\n");
  EXPECT_TRUE(stopping.include_stop_strings());
  EXPECT_TRUE(stopping.ignore_eos());
  const auto response =
      Read<::vllm::ResponseOptions>(Num(1, 1) + Num(2, 1) + Len(3, Num(1, 2)) + Num(4, 0) + Num(5, 1) + Num(6, 1) +
                                    Len(7, Len(2, Packed(1, {8}))) + Num(8, 0));
  EXPECT_TRUE(response.prompt_token_ids());
  EXPECT_TRUE(response.prompt_logprobs());
  EXPECT_EQ(response.prompt_candidates().top_n(), 2U);
  EXPECT_TRUE(response.has_output_text() && !response.output_text());
  EXPECT_TRUE(response.output_token_ids());
  EXPECT_TRUE(response.output_logprobs());
  EXPECT_EQ(response.output_candidates().token_ids().ids(0), 8U);
  EXPECT_TRUE(response.has_skip_special_tokens() && !response.skip_special_tokens());
  EXPECT_TRUE(Read<::vllm::CandidateTokens>(Num(3, 1)).all());
  const auto kv = Read<::vllm::KVCacheParameters>(Num(1, 1) + Len(2, "salt") + Len(3, "") + Len(4, ""));
  EXPECT_TRUE(kv.bypass_prefix_cache() && kv.has_kv_transfer_params() && kv.has_ec_transfer_params());
  EXPECT_EQ(kv.cache_salt(), "salt");
}

TEST(VllmWireTest, GenerateResponse) {
  const std::string candidate = Len(1, Num(1, 7) + Float(2, -0.5F) + Num(3, 2));
  const auto first = Read<::vllm::GenerateResponse>(Len(1, Num(1, 2) + Packed(2, {5, 6}) + PackedFloats(3, {0, -1}) +
                                                               Packed(4, {0, 1}) + Len(5, "") + Len(5, candidate)));
  EXPECT_EQ(first.prompt_info().num_prompt_tokens(), 2U);
  EXPECT_EQ(first.prompt_info().token_ids(1), 6U);
  EXPECT_EQ(first.prompt_info().logprobs(1), -1);
  EXPECT_EQ(first.prompt_info().ranks(1), 1U);
  EXPECT_EQ(first.prompt_info().candidate_tokens(1).tokens(0).id(), 7U);
  const auto last = Read<::vllm::GenerateResponse>(
      Len(2, Num(1, 1) + Len(2, "ab") + Num(3, 1) + Packed(4, {5}) + PackedFloats(5, {-1}) + Packed(6, {3}) +
                 Len(7, candidate) + Len(8, Num(1, 12) + Num(2, 2) + Len(5, "\n"))));
  const ::vllm::SequenceOutput& output = last.outputs();
  EXPECT_EQ(output.index(), 1U);
  EXPECT_EQ(output.text(), "ab");
  EXPECT_EQ(output.num_tokens(), 1U);
  EXPECT_EQ(output.token_ids(0), 5U);
  EXPECT_EQ(output.logprobs(0), -1);
  EXPECT_EQ(output.ranks(0), 3U);
  EXPECT_EQ(output.candidate_tokens(0).tokens(0).logprob(), -0.5F);
  EXPECT_EQ(output.candidate_tokens(0).tokens(0).rank(), 2U);
  EXPECT_EQ(output.finish_info().num_output_tokens(), 12U);
  EXPECT_EQ(output.finish_info().finish_reason(), ::vllm::FinishInfo::STOP);
  EXPECT_EQ(output.finish_info().stop_string(), "\n");
  EXPECT_EQ(Read<::vllm::FinishInfo>(Num(2, 2) + Num(3, 8)).stop_token_id(), 8U);
  EXPECT_EQ(Read<::vllm::FinishInfo>(Num(2, 2) + Num(4, 3)).eos_token_id(), 3U);
  EXPECT_EQ(Read<::vllm::FinishInfo>(Num(2, 1)).finish_reason(), ::vllm::FinishInfo::LENGTH);
}

TEST(VllmWireTest, Control) {
  const auto info = Read<::vllm::ServerInfo>(
      Len(1, "v") + Len(2, "a") + Len(3, "i") +
      Len(4, Num(1, 1) + Num(2, 2) + Num(3, 3) + Num(4, 4) + Num(5, 5) + Num(6, 6) + Num(7, 7)) + Num(5, 1024) +
      Num(6, 16) + Num(7, 400) + Num(8, 64) + Num(9, 2048) + Num(10, 1));
  EXPECT_EQ(info.engine_version() + info.api_version() + info.instance_id(), "vai");
  EXPECT_EQ(info.parallelism().tensor_parallel_size(), 1U);
  EXPECT_EQ(info.parallelism().pipeline_parallel_size(), 2U);
  EXPECT_EQ(info.parallelism().data_parallel_size(), 3U);
  EXPECT_EQ(info.parallelism().data_parallel_rank(), 4U);
  EXPECT_EQ(info.parallelism().decode_context_parallel_size(), 5U);
  EXPECT_EQ(info.parallelism().world_size(), 6U);
  EXPECT_EQ(info.parallelism().data_parallel_size_local(), 7U);
  EXPECT_EQ(info.max_model_len(), 1024U);
  EXPECT_EQ(info.kv_block_size(), 16U);
  EXPECT_EQ(info.total_kv_blocks(), 400U);
  EXPECT_EQ(info.max_running_requests(), 64U);
  EXPECT_EQ(info.max_batched_tokens(), 2048U);
  const auto model = Read<::vllm::ModelInfo>(Len(1, "a") + Len(2, "b") + Len(3, "c") + Num(20, 1) + Num(21, 1));
  EXPECT_EQ(model.model_id() + model.served_model_name() + model.served_model_aliases(0), "abc");
  EXPECT_TRUE(model.supports_text_input() && model.supports_token_ids_input());
  EXPECT_EQ(Read<::vllm::AbortRequest>(Len(1, "x") + Len(1, "y")).request_ids(1), "y");
}

TEST(VllmWireTest, EngineGenerateRequest) {
  const auto request = Read<vllm_engine::GenerateRequest>(Len(1, "id") + Len(2, Len(1, "text") + Packed(2, {5, 300})) +
                                                          Len(4, Float(1, 0)) + Num(5, 1) + Len(6, "") + Len(7, "") +
                                                          Len(8, "{}") + Num(9, 1));
  EXPECT_EQ(request.tokenized().input_ids(1), 300U);
  EXPECT_TRUE(request.sampling_params().has_temperature());
  EXPECT_TRUE(request.stream());
  EXPECT_EQ(request.data_parallel_rank(), 1);
  EXPECT_EQ(Read<vllm_engine::GenerateRequest>(Len(3, "text")).text(), "text");
  const auto params = Read<vllm_engine::SamplingParams>(
      Float(2, 0.9F) + Num(3, 40) + Float(4, 0.1F) + Float(5, 0.2F) + Float(6, 0.3F) + Float(7, 1.5F) + Num(8, 10) +
      Num(9, 2) + Len(10, "\n") + Packed(11, {3}) + Num(12, 1) + Num(13, 1) + Num(14, 1) + Num(15, 2) + Num(22, 5) +
      Num(23, 1) + Num(24, 7) + Num(25, 1) + Len(26, Num(1, 9) + Float(2, -1)) + Num(27, 99));
  EXPECT_EQ(params.top_p(), 0.9F);
  EXPECT_EQ(params.top_k(), 40U);
  EXPECT_EQ(params.min_p(), 0.1F);
  EXPECT_EQ(params.frequency_penalty(), 0.2F);
  EXPECT_EQ(params.presence_penalty(), 0.3F);
  EXPECT_EQ(params.repetition_penalty(), 1.5F);
  EXPECT_EQ(params.max_tokens(), 10U);
  EXPECT_EQ(params.min_tokens(), 2U);
  EXPECT_EQ(params.stop(0), "\n");
  EXPECT_EQ(params.stop_token_ids(0), 3U);
  EXPECT_TRUE(params.skip_special_tokens() && params.ignore_eos());
  EXPECT_EQ(params.n(), 2U);
  EXPECT_EQ(params.logprobs(), 5);
  EXPECT_EQ(params.prompt_logprobs(), 1);
  EXPECT_EQ(params.seed(), 7);
  EXPECT_EQ(params.logit_bias().at(9), -1);
  EXPECT_EQ(params.truncate_prompt_tokens(), 99);
  EXPECT_EQ(Read<vllm_engine::SamplingParams>(Len(21, Len(1, "yes"))).choice().choices(0), "yes");
}

TEST(VllmWireTest, EngineGenerateResponse) {
  const std::string logprobs =
      PackedFloats(1, {-1}) + Packed(2, {5}) + Len(3, PackedFloats(1, {-0.5F}) + Packed(2, {6}));
  const std::string input = Len(1, "") + Len(1, Float(1, -2)) + Packed(2, {5, 6}) + Len(3, "");
  const auto chunk = Read<vllm_engine::GenerateResponse>(
      Len(1, Packed(1, {5}) + Num(2, 10) + Num(3, 1) + Num(4, 8) + Len(5, logprobs) + Len(6, input) + Num(7, 1)));
  EXPECT_EQ(chunk.chunk().token_ids(0), 5U);
  EXPECT_EQ(chunk.chunk().prompt_tokens(), 10U);
  EXPECT_EQ(chunk.chunk().completion_tokens(), 1U);
  EXPECT_EQ(chunk.chunk().cached_tokens(), 8U);
  EXPECT_EQ(chunk.chunk().output_logprobs().top_logprobs(0).token_ids(0), 6U);
  EXPECT_EQ(chunk.chunk().input_logprobs().token_logprobs(1).value(), -2);
  EXPECT_EQ(chunk.chunk().index(), 1U);
  const auto complete = Read<vllm_engine::GenerateResponse>(Len(2, Packed(1, {5, 6}) + Len(2, "stop") + Num(3, 10) +
                                                                       Num(4, 2) + Num(5, 8) + Len(6, logprobs) +
                                                                       Len(7, input) + Num(8, 1) + Len(11, "\n")));
  EXPECT_EQ(complete.complete().output_ids(1), 6U);
  EXPECT_EQ(complete.complete().finish_reason(), "stop");
  EXPECT_EQ(complete.complete().index(), 1U);
  EXPECT_EQ(complete.complete().matched_stop_str(), "\n");
  EXPECT_EQ(Read<vllm_engine::GenerateComplete>(Num(10, 7)).matched_token_id(), 7U);
}

TEST(VllmWireTest, EngineManagement) {
  EXPECT_EQ(Read<vllm_engine::HealthCheckResponse>(Num(1, 1) + Len(2, "m")).message(), "m");
  EXPECT_EQ(Read<vllm_engine::AbortRequest>(Len(1, "x")).request_ids(0), "x");
  const auto model = Read<vllm_engine::GetModelInfoResponse>(Len(1, "p") + Num(2, 1) + Num(3, 1024) + Num(4, 2048) +
                                                             Num(5, 1) + Len(6, "n") + Len(8, "t") + Packed(10, {3}) +
                                                             Num(11, 1) + Num(12, 2) + Num(13, 1023));
  EXPECT_EQ(model.max_context_length(), 1024U);
  EXPECT_EQ(model.vocab_size(), 2048U);
  EXPECT_EQ(model.max_req_input_len(), 1023);
  const auto server = Read<vllm_engine::GetServerInfoResponse>(Num(1, 3) + Num(2, 1) + Double(4, 1.5) +
                                                               Len(5, "vllm-grpc") + Num(9, 1));
  EXPECT_EQ(server.active_requests(), 3U);
  EXPECT_EQ(server.uptime_seconds(), 1.5);
  Read<vllm_engine::GetLoadsRequest>(Num(1, 0) + Len(2, "core"));
  const auto loads =
      Read<vllm_engine::GetLoadsResponse>(Len(1, "t") + Len(2, "v") + Num(3, 1) +
                                          Len(4, Num(1, 1) + Num(2, 2) + Num(3, 3) + Num(4, 4) + Num(5, 5) + Num(6, 6) +
                                                     Double(7, 0.7) + Double(10, 0.1) + Num(11, 11)));
  EXPECT_EQ(loads.loads(0).num_running_reqs(), 2);
  EXPECT_EQ(loads.loads(0).num_waiting_reqs(), 3);
  EXPECT_EQ(loads.loads(0).token_usage(), 0.7);
  EXPECT_EQ(loads.loads(0).max_running_requests(), 11);
  Read<smg::grpc::common::GetTokenizerRequest>("");
  const auto chunk = Read<smg::grpc::common::GetTokenizerChunk>(Len(1, std::string("PK\0", 3)) + Len(2, "ab"));
  EXPECT_EQ(chunk.data(), std::string("PK\0", 3));
  EXPECT_EQ(chunk.sha256(), "ab");
}

}  // namespace
}  // namespace minitron::server
