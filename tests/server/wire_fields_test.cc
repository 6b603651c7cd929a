// Every field of every request, at both ends and beyond, over a real channel: a typed refusal that names field, value
// and limit, and nobody else notices.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <charconv>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>

#include "server/grpc_status.h"
#include "server/limits.h"
#include "tests/server/float_fields.h"
#include "tests/server/serving_harness.h"
#include "tests/server/wire.h"

namespace minitron::server {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kVocab = 2048;
constexpr int kContext = 1024;

v1::GenerationTask PlainTask() {
  v1::GenerationTask task;
  for (int i = 0; i < 10; ++i) task.mutable_token_ids()->add_ids(5 + i);
  task.mutable_sampling()->set_seed(1);
  task.mutable_stopping()->set_max_tokens(3);
  return task;
}

class WireFieldsTest : public ::testing::Test {
 protected:
  WireFieldsTest() : before_(ReadStream(*harness_.generation, PlainTask())) { EXPECT_TRUE(before_.status.ok()); }
  ~WireFieldsTest() override {
    const StreamResult after = ReadStream(*harness_.generation, PlainTask());
    EXPECT_EQ(after.TokenIds(), before_.TokenIds());
    harness_.WaitUntilIdle();
  }

  // The status of a stream and of the same unary call; they must agree.
  grpc::Status Call(const v1::GenerationTask& task) {
    const grpc::Status streamed = ReadStream(*harness_.generation, task).status;
    grpc::ClientContext context;
    v1::GenerateRequest request;
    *request.mutable_task() = task;
    v1::GenerateResponse response;
    const grpc::Status collected = harness_.generation->Generate(&context, request, &response);
    EXPECT_EQ(streamed.error_code(), collected.error_code());
    EXPECT_EQ(streamed.error_message(), collected.error_message());
    EXPECT_EQ(FieldOf(streamed), FieldOf(collected));
    EXPECT_EQ(InfoOf(streamed).reason(), InfoOf(collected).reason());
    return streamed;
  }
  grpc::Status Score(const v1::ScoreRequest& request) {
    grpc::ClientContext context;
    v1::ScoreResponse response;
    return harness_.generation->Score(&context, request, &response);
  }
  grpc::Status Tokenize(const v1::TokenizeRequest& request) {
    grpc::ClientContext context;
    v1::TokenizeResponse response;
    return harness_.generation->Tokenize(&context, request, &response);
  }
  grpc::Status Detokenize(const v1::DetokenizeRequest& request) {
    grpc::ClientContext context;
    v1::DetokenizeResponse response;
    return harness_.generation->Detokenize(&context, request, &response);
  }

  ServingHarness harness_;
  const StreamResult before_;
};

void ExpectRefused(const grpc::Status& status, const std::string& field, const std::string& key,
                   const std::string& value, const std::string& limit) {
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << field << " = " << value;
  EXPECT_EQ(FieldOf(status), field) << status.error_message();
  EXPECT_EQ(MetadataOf(status, key), value) << field;
  EXPECT_EQ(MetadataOf(status, "limit"), limit) << field << " = " << value;
  EXPECT_THAT(status.error_message(), ::testing::HasSubstr(field));
}

std::string Text(float value) {
  char text[32];
  return std::string(text, std::to_chars(std::begin(text), std::end(text), value).ptr);
}

TEST_F(WireFieldsTest, Floats) {
  for (const FloatField& field : kFloatFields) {
    const auto call = [&](float value) {
      v1::GenerationTask task = PlainTask();
      field.set(*task.mutable_sampling(), value);
      return Call(task);
    };
    const auto min = static_cast<float>(field.limit.min);
    const auto max = static_cast<float>(field.limit.max);
    for (const float bad : {kNan, kInf, max + 1, std::numeric_limits<float>::max()}) {
      ExpectRefused(call(bad), field.limit.field, "value", Text(bad), Text(max));
    }
    std::vector<float> low = {-kInf, min - 1, std::numeric_limits<float>::lowest()};
    if (field.limit.min_exclusive) low.push_back(min);
    for (const float bad : low) ExpectRefused(call(bad), field.limit.field, "value", Text(bad), Text(min));
    for (const float good : {max, field.limit.min_exclusive ? std::nextafter(min, kInf) : min}) {
      const grpc::Status status = call(good);
      EXPECT_TRUE(status.ok()) << field.limit.field << " = " << good << ": " << status.error_message();
    }
    EXPECT_EQ(call(std::nextafter(max, kInf)).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(call(std::nextafter(min, -kInf)).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
}

TEST_F(WireFieldsTest, IntegersOfATask) {
  const struct {
    const char* field;
    int64_t min, max;
    std::function<void(v1::GenerationTask&, int64_t)> set;
  } kFields[] = {
      {"sampling.top_k", 0, kVocab, [](auto& t, int64_t v) { t.mutable_sampling()->set_top_k(v); }},
      {"sampling.num_sequences", 0, 16, [](auto& t, int64_t v) { t.mutable_sampling()->set_num_sequences(v); }},
      {"output.logprobs", 0, 20, [](auto& t, int64_t v) { t.mutable_output()->set_logprobs(v); }},
      {"output.prompt_logprobs", 0, 20, [](auto& t, int64_t v) { t.mutable_output()->set_prompt_logprobs(v); }},
      {"priority", -100, 100, [](auto& t, int64_t v) { t.set_priority(v); }},
      {"stopping.min_tokens", 0, 3, [](auto& t, int64_t v) { t.mutable_stopping()->set_min_tokens(v); }},
      {"stopping.stop_token_ids", 0, kVocab - 1,
       [](auto& t, int64_t v) { t.mutable_stopping()->add_stop_token_ids(v); }},
      {"token_ids", 0, kVocab - 1, [](auto& t, int64_t v) { t.mutable_token_ids()->add_ids(v); }},
      {"sampling.logit_bias", 0, kVocab - 1,
       [](auto& t, int64_t v) { (*t.mutable_sampling()->mutable_logit_bias())[v] = 1; }},
  };
  for (const auto& field : kFields) {
    const auto call = [&](int64_t value) {
      v1::GenerationTask task = PlainTask();
      field.set(task, value);
      return Call(task);
    };
    for (const int64_t good : {field.min, field.max}) {
      const grpc::Status status = call(good);
      EXPECT_TRUE(status.ok()) << field.field << " = " << good << ": " << status.error_message();
    }
    const bool is_signed = field.min < 0;
    std::vector<int64_t> too_large = {field.max + 1, INT32_MAX};
    if (!is_signed) too_large.push_back(UINT32_MAX);
    for (const int64_t bad : too_large) {
      ExpectRefused(call(bad), field.field, "value", std::to_string(bad), std::to_string(field.max));
    }
    if (!is_signed) continue;
    for (const int64_t bad : {field.min - 1, int64_t{INT32_MIN}}) {
      ExpectRefused(call(bad), field.field, "value", std::to_string(bad), std::to_string(field.min));
    }
  }
}

TEST_F(WireFieldsTest, PromptAndCompletionFitTheContextOrAreRefusedWithBothNumbers) {
  v1::GenerationTask task = PlainTask();
  task.mutable_stopping()->set_max_tokens(0);
  ExpectRefused(Call(task), "stopping.max_tokens", "value", "0", "1");
  for (const uint32_t bad : {uint32_t{kContext - 10 + 1}, uint32_t{INT32_MAX}, UINT32_MAX}) {
    task.mutable_stopping()->set_max_tokens(bad);
    const grpc::Status status = Call(task);
    ExpectRefused(status, "stopping.max_tokens", "actual", std::to_string(10 + int64_t{bad}), std::to_string(kContext));
    EXPECT_EQ(InfoOf(status).reason(), reason::kPromptTooLong);
  }
  v1::GenerationTask longest = PlainTask();
  longest.mutable_stopping()->clear_max_tokens();
  while (longest.token_ids().ids_size() < kContext - 1) longest.mutable_token_ids()->add_ids(9);
  EXPECT_FALSE(Call(longest).ok()) << "the cache of this server holds 512 tokens";
  longest.set_truncate_prompt_tokens(400);
  longest.mutable_stopping()->set_max_tokens(3);
  EXPECT_TRUE(Call(longest).ok());
  longest.set_truncate_prompt_tokens(0);
  longest.mutable_token_ids()->add_ids(9);
  const grpc::Status status = Call(longest);
  ExpectRefused(status, "prompt", "actual", std::to_string(kContext), std::to_string(kContext - 1));
  EXPECT_EQ(InfoOf(status).reason(), reason::kPromptTooLong);
}

TEST_F(WireFieldsTest, ARequestThatCanNeverFitTheCacheIsRefusedWithTheArithmetic) {
  v1::GenerationTask task = PlainTask();
  task.mutable_stopping()->set_max_tokens(900);
  const grpc::Status status = Call(task);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(InfoOf(status).reason(), reason::kRequestTooLarge);
  EXPECT_THAT(status.error_message(), ::testing::HasSubstr("64"));
}

TEST_F(WireFieldsTest, CountsAndBytesOfATask) {
  const struct {
    const char* field;
    int64_t max;
    std::function<void(v1::GenerationTask&, int64_t)> set;  // makes it have this many
  } kFields[] = {
      {"stopping.stop_sequences", 16,
       [](auto& t, int64_t n) {
         for (int64_t i = 0; i < n; ++i) t.mutable_stopping()->add_stop_sequences("x");
       }},
      {"stopping.stop_sequences", 256,
       [](auto& t, int64_t n) { t.mutable_stopping()->add_stop_sequences(std::string(n, 'x')); }},
      {"stopping.stop_token_ids", 64,
       [](auto& t, int64_t n) {
         for (int64_t i = 0; i < n; ++i) t.mutable_stopping()->add_stop_token_ids(1);
       }},
      {"sampling.logit_bias", 1024,
       [](auto& t, int64_t n) {
         for (int64_t i = 0; i < n; ++i) (*t.mutable_sampling()->mutable_logit_bias())[i] = 1;
       }},
      {"request_id", 128, [](auto& t, int64_t n) { t.set_request_id(std::string(n, 'x')); }},
      {"cache_salt", 128, [](auto& t, int64_t n) { t.set_cache_salt(std::string(n, 'x')); }},
  };
  for (const auto& field : kFields) {
    v1::GenerationTask task = PlainTask();
    field.set(task, field.max);
    const grpc::Status status = Call(task);
    EXPECT_TRUE(status.ok()) << field.field << ": " << status.error_message();
    for (const int64_t bad : {field.max + 1, int64_t{100000}}) {
      task = PlainTask();
      field.set(task, bad);
      ExpectRefused(Call(task), field.field, "actual", std::to_string(bad), std::to_string(field.max));
    }
  }
  v1::GenerationTask task = PlainTask();
  task.mutable_stopping()->add_stop_sequences("");
  ExpectRefused(Call(task), "stopping.stop_sequences", "actual", "0", "1");
  task = PlainTask();
  task.set_request_id("a\nb");
  ExpectRefused(Call(task), "request_id", "value", "10", "126");
  task = PlainTask();
  task.set_text(std::string(limits::kMaxTextBytes + 1, ' '));
  ExpectRefused(Call(task), "text", "actual", "262145", "262144");
  task = PlainTask();
  task.clear_prompt();
  EXPECT_EQ(FieldOf(Call(task)), "prompt");
  task.set_text("");
  ExpectRefused(Call(task), "prompt", "actual", "0", "1");
  task.mutable_token_ids();
  ExpectRefused(Call(task), "prompt", "actual", "0", "1");
}

TEST_F(WireFieldsTest, HeadersAreCheckedAsFieldsAre) {
  const struct {
    const char* header;
    int64_t max;
  } kHeaders[] = {{"x-request-id", 128}, {"x-minitron-tenant", 64}};
  for (const auto& header : kHeaders) {
    for (const int64_t size : {header.max, header.max + 1}) {
      auto context = std::make_shared<grpc::ClientContext>();
      context->AddMetadata(header.header, std::string(size, 'x'));
      const grpc::Status status = ReadStream(*harness_.generation, PlainTask(), context).status;
      if (size == header.max) {
        EXPECT_TRUE(status.ok()) << status.error_message();
      } else {
        ExpectRefused(status, header.header, "actual", std::to_string(size), std::to_string(header.max));
      }
    }
  }
}

TEST_F(WireFieldsTest, Score) {
  v1::ScoreRequest plain;
  plain.set_context_text("to be or not");
  plain.set_target_text(" to be");
  EXPECT_TRUE(Score(plain).ok());
  v1::ScoreRequest request = plain;
  request.set_top_logprobs(21);
  ExpectRefused(Score(request), "top_logprobs", "value", "21", "20");
  request.set_top_logprobs(UINT32_MAX);
  ExpectRefused(Score(request), "top_logprobs", "value", "4294967295", "20");
  request = plain;
  request.set_priority(-101);
  ExpectRefused(Score(request), "priority", "value", "-101", "-100");
  request = plain;
  request.set_request_id(std::string(129, 'x'));
  ExpectRefused(Score(request), "request_id", "actual", "129", "128");
  request = plain;
  request.set_cache_salt(std::string(129, 'x'));
  ExpectRefused(Score(request), "cache_salt", "actual", "129", "128");
  request = plain;
  request.clear_target();
  EXPECT_EQ(FieldOf(Score(request)), "target");
  request.set_target_text("");
  ExpectRefused(Score(request), "target", "actual", "0", "1");
  request = plain;
  request.set_target_text(std::string(limits::kMaxTextBytes, ' '));
  ExpectRefused(Score(request), "target_text", "actual", "262156", "262144");
  request = {};
  request.mutable_target_token_ids()->add_ids(7);
  ExpectRefused(Score(request), "context", "actual", "1", "2");
  request.mutable_target_token_ids()->add_ids(kVocab);
  ExpectRefused(Score(request), "target_token_ids", "value", "2048", "2047");
  request = {};
  request.mutable_context_token_ids()->add_ids(UINT32_MAX);
  request.mutable_target_token_ids()->add_ids(7);
  ExpectRefused(Score(request), "context_token_ids", "value", "4294967295", "2047");
  request = {};
  for (int i = 0; i <= kContext; ++i) request.mutable_target_token_ids()->add_ids(7);
  const grpc::Status status = Score(request);
  ExpectRefused(status, "target", "actual", "1025", "1024");
  EXPECT_EQ(InfoOf(status).reason(), reason::kPromptTooLong);
}

TEST_F(WireFieldsTest, TokenizeDetokenizeAndCancel) {
  v1::TokenizeRequest text;
  text.set_text(std::string(limits::kMaxTextBytes, ' '));
  EXPECT_TRUE(Tokenize(text).ok());
  text.set_text(std::string(limits::kMaxTextBytes + 1, ' '));
  ExpectRefused(Tokenize(text), "text", "actual", "262145", "262144");
  v1::DetokenizeRequest ids;
  ids.add_token_ids(kVocab - 1);
  EXPECT_TRUE(Detokenize(ids).ok());
  ids.add_token_ids(kVocab);
  ExpectRefused(Detokenize(ids), "token_ids", "value", "2048", "2047");
  ids.clear_token_ids();
  for (int64_t i = 0; i <= limits::kMaxTokenIds; ++i) ids.add_token_ids(7);
  ExpectRefused(Detokenize(ids), "token_ids", "actual", "262145", "262144");
  v1::CancelRequestsRequest names;
  for (int i = 0; i <= limits::kMaxCancelIds; ++i) names.add_request_ids("nobody");
  grpc::ClientContext context;
  v1::CancelRequestsResponse cancelled;
  ExpectRefused(harness_.admin->CancelRequests(&context, names, &cancelled), "request_ids", "actual", "1025", "1024");
}

TEST_F(WireFieldsTest, AnUnknownModelIsNotFoundByEveryCallThatNamesOne) {
  const auto expect_unknown = [](const grpc::Status& status) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
    EXPECT_EQ(InfoOf(status).reason(), reason::kModelNotFound);
    EXPECT_EQ(FieldOf(status), "model");
    EXPECT_EQ(MetadataOf(status, "value"), "gpt");
    EXPECT_EQ(MetadataOf(status, "served"), "fake");
  };
  v1::GenerationTask task = PlainTask();
  task.set_model("gpt");
  expect_unknown(Call(task));
  v1::ScoreRequest score;
  score.set_model("gpt");
  expect_unknown(Score(score));
  v1::TokenizeRequest tokenize;
  tokenize.set_model("gpt");
  expect_unknown(Tokenize(tokenize));
  v1::DetokenizeRequest detokenize;
  detokenize.set_model("gpt");
  expect_unknown(Detokenize(detokenize));
  task.set_model(std::string(257, 'x'));
  ExpectRefused(Call(task), "model", "actual", "257", "256");
}

TEST_F(WireFieldsTest, WhatGrpcItselfBoundsIsRefusedTooAndTheServerGoesOn) {
  v1::GenerationTask large = PlainTask();
  large.set_text(std::string(5 << 20, 'x'));
  EXPECT_EQ(ReadStream(*harness_.generation, large).status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  auto context = std::make_shared<grpc::ClientContext>();
  context->AddMetadata("x-large", std::string(64 << 10, 'x'));
  const auto channel = v1::GenerationService::NewStub(harness_.Connect());  // an oversize header costs the connection
  EXPECT_EQ(ReadStream(*channel, PlainTask(), context).status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  for (const grpc_compression_algorithm algorithm : {GRPC_COMPRESS_GZIP, GRPC_COMPRESS_DEFLATE}) {
    context = std::make_shared<grpc::ClientContext>();
    context->set_compression_algorithm(algorithm);
    v1::GenerationTask task = PlainTask();
    for (int i = 0; i < 200; ++i) task.mutable_token_ids()->add_ids(9);  // worth compressing
    EXPECT_EQ(ReadStream(*harness_.generation, task, context).status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  }
  context = std::make_shared<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() - std::chrono::seconds(1));
  EXPECT_EQ(ReadStream(*harness_.generation, PlainTask(), context).status.error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
}

}  // namespace
}  // namespace minitron::server
