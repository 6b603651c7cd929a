#include "server/request_builder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "engine/base/check.h"
#include "server/grpc_status.h"
#include "server/limits.h"
#include "tests/server/float_fields.h"

namespace minitron::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::string LimitOf(const absl::Status& status) {
  return std::string(status.GetPayload("minitron/metadata/limit").value_or(absl::Cord("(none)")));
}

class RequestBuilderTest : public ::testing::Test {
 protected:
  RequestBuilderTest() {
    auto loaded = Tokenizer::Load(std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny", 2048);
    CHECK(loaded.ok());
    tokenizer_ = *std::move(loaded);
    model_.name = "tiny";
    model_.info.vocab_size = 2048;
    model_.info.max_context_tokens = 100;
    model_.info.eos_token_ids = {3};
    model_.tokenizer = tokenizer_.get();
    call_.fresh_seed = 42;
    call_.fresh_request_id = "req-1";
    task_.mutable_token_ids()->add_ids(5);
  }
  absl::StatusOr<BuiltRequest> Build() const { return BuildGenerate(task_, model_, call_); }
  void ExpectRefused(const std::string& field) const {
    const auto built = Build();
    ASSERT_FALSE(built.ok()) << field;
    EXPECT_EQ(built.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(GetField(built.status()), field);
  }
  void ExpectAccepted() const {
    const auto built = Build();
    EXPECT_TRUE(built.ok()) << built.status();
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  ServedModel model_;
  CallContext call_;
  v1::GenerationTask task_;
};

TEST_F(RequestBuilderTest, EveryFloatIsCheckedAtBothEndsAndForNan) {
  for (const FloatField& c : kFloatFields) {
    const auto min = static_cast<float>(c.limit.min), max = static_cast<float>(c.limit.max);
    const auto with = [&](float value) {
      task_.clear_sampling();
      c.set(*task_.mutable_sampling(), value);
    };
    for (const float bad : {kNan, kInf, -kInf, std::nextafter(max, kInf), std::nextafter(min, -kInf)}) {
      with(bad);
      ExpectRefused(c.limit.field);
    }
    with(max);
    ExpectAccepted();
    with(min);
    c.limit.min_exclusive ? ExpectRefused(c.limit.field) : ExpectAccepted();
    with(std::nextafter(min, kInf));
    ExpectAccepted();
  }
}

TEST_F(RequestBuilderTest, ARefusedFloatIsShownWithTheLimitItPasses) {
  task_.mutable_sampling()->set_top_p(0.0f);  // the minimum itself is not allowed
  EXPECT_THAT(std::string(Build().status().message()), HasSubstr("0 outside (0, 1]"));
  EXPECT_EQ(LimitOf(Build().status()), "0");
  task_.mutable_sampling()->set_top_p(1.0f);
  task_.mutable_sampling()->set_temperature(std::nextafter(2.0f, kInf));
  EXPECT_THAT(std::string(Build().status().message()), HasSubstr("2.0000002 outside [0, 2]"));
  EXPECT_EQ(LimitOf(Build().status()), "2");
}

// Each field another value, so that none can take another's place.
TEST_F(RequestBuilderTest, EveryFieldReachesTheEngine) {
  task_.set_priority(-7);
  task_.set_cache_salt("salt");
  task_.set_request_id("mine");
  v1::SamplingConfig& sampling = *task_.mutable_sampling();
  sampling.set_temperature(0.25f);
  sampling.set_top_k(12);
  sampling.set_top_p(0.5f);
  sampling.set_min_p(0.125f);
  sampling.set_repetition_penalty(1.5f);
  sampling.set_presence_penalty(-0.75f);
  sampling.set_frequency_penalty(1.75f);
  sampling.set_seed(77);
  sampling.set_num_sequences(3);
  (*sampling.mutable_logit_bias())[9] = 2.5f;
  (*sampling.mutable_logit_bias())[4] = -1.0f;
  v1::StoppingConfig& stopping = *task_.mutable_stopping();
  stopping.set_max_tokens(21);
  stopping.set_min_tokens(6);
  stopping.add_stop_token_ids(15);
  stopping.add_stop_token_ids(16);
  stopping.add_stop_sequences("end");
  stopping.set_include_stop_sequence(true);
  task_.mutable_output()->set_logprobs(2);
  task_.mutable_output()->set_prompt_logprobs(8);
  task_.mutable_output()->set_token_ids(false);
  task_.mutable_output()->set_skip_special_tokens(false);
  call_.tenant = "tenant";
  call_.arrival = scheduler::TimePoint(std::chrono::seconds(5));
  call_.deadline = scheduler::TimePoint(std::chrono::seconds(50));
  const auto built = Build();
  ASSERT_TRUE(built.ok()) << built.status();
  const scheduler::Request& request = built->request;
  EXPECT_EQ(request.params.temperature, 0.25f);
  EXPECT_EQ(request.params.top_k, 12);
  EXPECT_EQ(request.params.top_p, 0.5f);
  EXPECT_EQ(request.params.min_p, 0.125f);
  EXPECT_EQ(request.params.repetition_penalty, 1.5f);
  EXPECT_EQ(request.params.presence_penalty, -0.75f);
  EXPECT_EQ(request.params.frequency_penalty, 1.75f);
  EXPECT_EQ(request.params.seed, 77u);
  EXPECT_THAT(request.params.logit_bias, ElementsAre(Pair(4, -1.0f), Pair(9, 2.5f)));
  EXPECT_EQ(request.num_sequences, 3);
  EXPECT_EQ(request.max_tokens, 21);
  EXPECT_EQ(request.min_tokens, 6);
  EXPECT_THAT(request.stop_token_ids, ElementsAre(15, 16));
  EXPECT_THAT(request.eos_token_ids, ElementsAre(3));
  EXPECT_EQ(request.num_top_logprobs, 2);
  EXPECT_EQ(request.num_prompt_top_logprobs, 8);
  EXPECT_EQ(request.priority, -7);
  EXPECT_EQ(request.cache_salt, "salt");
  EXPECT_EQ(request.tenant, "tenant");
  EXPECT_EQ(request.arrival, call_.arrival);
  EXPECT_EQ(request.deadline, call_.deadline);
  EXPECT_THAT(request.prompt_token_ids, ElementsAre(5));
  EXPECT_EQ(built->spec.request_id, "mine");
  EXPECT_EQ(built->spec.num_sequences, 3);
  EXPECT_EQ(built->spec.num_prompt_tokens, 1);
  EXPECT_EQ(built->spec.min_tokens, 6);
  EXPECT_THAT(built->spec.stop_sequences, ElementsAre("end"));
  EXPECT_TRUE(built->spec.include_stop_sequence);
  EXPECT_FALSE(built->spec.skip_special_tokens);
  EXPECT_FALSE(built->send_token_ids);
  stopping.set_ignore_eos(true);
  EXPECT_THAT(Build()->request.eos_token_ids, ElementsAre());
}

TEST_F(RequestBuilderTest, OptionsOfATextPromptReachTheTokenizer) {
  task_.set_text("a</s>");
  const auto ids = [this] { return Build()->request.prompt_token_ids; };
  const std::vector<TokenId> plain = ids();
  task_.mutable_tokenize_options()->set_add_bos(true);
  std::vector<TokenId> with_bos = {tokenizer_->bos_id()};
  with_bos.insert(with_bos.end(), plain.begin(), plain.end());
  EXPECT_EQ(ids(), with_bos);
  task_.mutable_tokenize_options()->set_parse_special(true);
  EXPECT_EQ(ids().back(), 3) << "the end token itself";
  EXPECT_NE(plain.back(), 3);
}

TEST_F(RequestBuilderTest, NegativeZeroBecomesZero) {
  task_.mutable_sampling()->set_temperature(-0.0f);
  const auto built = Build();
  ASSERT_TRUE(built.ok());
  EXPECT_FALSE(std::signbit(built->request.params.temperature));
}

TEST_F(RequestBuilderTest, EveryIntegerIsCheckedAtBothEnds) {
  struct Case {
    const char* field;
    int64_t min, max;
    std::function<void(v1::GenerationTask&, int64_t)> set;
  };
  const std::vector<Case> cases = {
      {"sampling.top_k", 0, 2048, [](auto& t, int64_t v) { t.mutable_sampling()->set_top_k(v); }},
      {"sampling.num_sequences", 0, 16, [](auto& t, int64_t v) { t.mutable_sampling()->set_num_sequences(v); }},
      {"stopping.max_tokens", 1, 99, [](auto& t, int64_t v) { t.mutable_stopping()->set_max_tokens(v); }},
      {"stopping.min_tokens", 0, 99, [](auto& t, int64_t v) { t.mutable_stopping()->set_min_tokens(v); }},
      {"output.logprobs", 0, 20, [](auto& t, int64_t v) { t.mutable_output()->set_logprobs(v); }},
      {"output.prompt_logprobs", 0, 20, [](auto& t, int64_t v) { t.mutable_output()->set_prompt_logprobs(v); }},
      {"priority", -100, 100, [](auto& t, int64_t v) { t.set_priority(v); }},
      {"stopping.stop_token_ids", 0, 2047, [](auto& t, int64_t v) { t.mutable_stopping()->add_stop_token_ids(v); }},
      {"token_ids", 0, 2047, [](auto& t, int64_t v) { t.mutable_token_ids()->add_ids(v); }},
      {"sampling.logit_bias", 0, 2047,
       [](auto& t, int64_t v) { (*t.mutable_sampling()->mutable_logit_bias())[v] = 1; }},
  };
  const v1::GenerationTask plain = task_;
  for (const Case& c : cases) {
    const auto with = [&](int64_t value) {
      task_ = plain;
      c.set(task_, value);
    };
    for (const int64_t good : {c.min, c.max}) {
      with(good);
      ExpectAccepted();
    }
    for (const int64_t bad : {c.max + 1, c.min - 1, int64_t{INT32_MAX}, int64_t{INT32_MIN}, int64_t{-1}}) {
      if (bad >= c.min && bad <= c.max) continue;
      with(bad);
      ExpectRefused(c.field);
    }
  }
}

TEST_F(RequestBuilderTest, CountsAndBytesAreBounded) {
  const v1::GenerationTask plain = task_;
  for (int i = 0; i < 17; ++i) task_.mutable_stopping()->add_stop_sequences(std::string(1, 'x'));
  ExpectRefused("stopping.stop_sequences");
  for (const size_t size : {0, 257}) {
    task_ = plain;
    task_.mutable_stopping()->add_stop_sequences(std::string(size, 'x'));
    ExpectRefused("stopping.stop_sequences");
  }
  task_ = plain;
  for (int i = 0; i < 65; ++i) task_.mutable_stopping()->add_stop_token_ids(1);
  ExpectRefused("stopping.stop_token_ids");
  task_ = plain;
  for (int i = 0; i < 1025; ++i) (*task_.mutable_sampling()->mutable_logit_bias())[i] = 1;
  ExpectRefused("sampling.logit_bias");
  for (const std::string& id :
       {std::string(129, 'x'), std::string("a\nb"), std::string("\xC3\xA9"), std::string(1, '\0')}) {
    task_ = plain;
    task_.set_request_id(id);
    ExpectRefused("request_id");
  }
  task_ = plain;
  task_.set_cache_salt(std::string(129, 'x'));
  ExpectRefused("cache_salt");
  task_ = plain;
  task_.set_text(std::string(limits::kMaxTextBytes + 1, 'x'));
  ExpectRefused("text");
}

TEST_F(RequestBuilderTest, AConstraintIsCompiledOrRefused) {
  v1::OutputConstraint& constraint = *task_.mutable_constraint();
  constraint.set_regex("[0-9]+");
  const constraint::ConstraintCompiler compiler(tokenizer_.get(), {3});
  model_.constraints = &compiler;
  ASSERT_TRUE(Build().ok());
  EXPECT_NE(Build()->request.params.constraint, nullptr);
  EXPECT_TRUE(Build()->request.params.NeedsHistory());
  std::string longest = "a?";
  while (longest.size() < 4096) longest += "|a";
  constraint.set_regex(longest);
  ExpectAccepted();
  constraint.set_regex(std::string(4097, 'a'));
  ExpectRefused("constraint.regex");
  constraint.set_regex("");
  ExpectRefused("constraint.regex");
  constraint.set_json_schema("");
  ExpectRefused("constraint.json_schema");
  constraint.set_grammar("");
  ExpectRefused("constraint.grammar");
  constraint.set_grammar(std::string(65537, '#'));
  ExpectRefused("constraint.grammar");
  constraint.set_grammar("root ::= \"(\" root \")\" | [a-z]");
  ExpectAccepted();
  constraint.set_json_object(false);
  ExpectRefused("constraint.json_object");
  constraint.mutable_choices();
  ExpectRefused("constraint.choices");
  constraint.mutable_choices()->add_options("");
  ExpectRefused("constraint.choices");
  constraint.mutable_choices()->set_options(0, "yes");
  ExpectAccepted();
  task_.mutable_stopping()->set_min_tokens(1);
  ExpectRefused("constraint");
  task_.mutable_stopping()->clear_min_tokens();
  task_.mutable_stopping()->set_ignore_eos(true);
  ExpectRefused("constraint");
  task_.clear_stopping();
  constraint.clear_kind();
  ExpectRefused("constraint");
}

TEST_F(RequestBuilderTest, PromptMustBeThereAndFit) {
  task_.clear_prompt();
  ExpectRefused("prompt");
  task_.set_text("");
  ExpectRefused("prompt");
  task_.mutable_token_ids();
  ExpectRefused("prompt");
  for (int i = 0; i < 100; ++i) task_.mutable_token_ids()->add_ids(i);
  EXPECT_EQ(GetReason(Build().status()), reason::kPromptTooLong);
  task_.set_truncate_prompt_tokens(99);
  const auto built = Build();
  ASSERT_TRUE(built.ok()) << built.status();
  EXPECT_EQ(built->request.prompt_token_ids.front(), 1) << "the last ones are kept";
  EXPECT_EQ(built->request.max_tokens, 1);
}

TEST_F(RequestBuilderTest, UnsetFieldsTakeTheDefaults) {
  model_.defaults = {true, true, true, 0.7f, 11, 0.9f};
  const auto built = Build();
  ASSERT_TRUE(built.ok());
  EXPECT_EQ(built->request.params.temperature, 0.7f);
  EXPECT_EQ(built->request.params.top_k, 11);
  EXPECT_EQ(built->request.params.top_p, 0.9f);
  EXPECT_EQ(built->request.params.seed, 42u);
  EXPECT_EQ(built->request.max_tokens, 99) << "the rest of the context";
  EXPECT_EQ(built->spec.request_id, "req-1");
  EXPECT_EQ(built->request.eos_token_ids, std::vector<TokenId>{3});
}

TEST_F(RequestBuilderTest, FirstTokenTimeoutIsCheckedAtBothEndsAndCountsFromTheArrival) {
  ExpectAccepted();
  EXPECT_EQ(Build()->request.first_token_deadline, scheduler::TimePoint::max());
  google::protobuf::Duration& timeout = *task_.mutable_first_token_timeout();
  const auto set = [&timeout](int64_t seconds, int32_t nanos) {
    timeout.set_seconds(seconds);
    timeout.set_nanos(nanos);
  };
  for (const auto& [seconds, nanos] : std::vector<std::pair<int64_t, int32_t>>{
           {0, 0}, {0, -1}, {-1, 0}, {1, 1000000000}, {86400, 1}, {86401, 0}, {INT64_MAX, 0}, {INT64_MIN, INT32_MIN}}) {
    set(seconds, nanos);
    ExpectRefused("first_token_timeout");
  }
  call_.arrival = scheduler::TimePoint(std::chrono::seconds(7));
  set(0, 1);
  EXPECT_EQ(Build()->request.first_token_deadline, call_.arrival + std::chrono::nanoseconds(1));
  set(86400, 0);
  EXPECT_EQ(Build()->request.first_token_deadline, call_.arrival + std::chrono::hours(24));
  EXPECT_TRUE(Build()->spec.has_first_token_timeout);
}

TEST_F(RequestBuilderTest, AdmissionIsAskedAfterTheCheapChecksAndBeforeTheTokenizer) {
  std::vector<scheduler::Arrival> asked;
  call_.tenant = "a";
  call_.deadline = scheduler::TimePoint(std::chrono::seconds(9));
  call_.check_admission = [&asked](const scheduler::Arrival& arrival) {
    asked.push_back(arrival);
    return ReasonError(absl::StatusCode::kUnavailable, reason::kQueueFull, "full");
  };
  task_.set_priority(2);
  task_.mutable_sampling()->set_num_sequences(3);
  // Neither tokenized nor measured: a text of any size is refused at the same cost.
  task_.set_text(std::string(limits::kMaxTextBytes + 1, 'x'));
  EXPECT_EQ(GetReason(Build().status()), reason::kQueueFull);
  ASSERT_EQ(asked.size(), 1u);
  EXPECT_EQ(asked[0].tenant, "a");
  EXPECT_EQ(asked[0].priority, 2);
  EXPECT_EQ(asked[0].work.num_sequences, 3);
  EXPECT_EQ(asked[0].work.num_prompt_tokens, 1);
  EXPECT_EQ(asked[0].start_by, call_.deadline);
  task_.mutable_sampling()->set_temperature(9);  // wrong whatever the load
  ExpectRefused("sampling.temperature");
  EXPECT_EQ(asked.size(), 1u);
}

TEST_F(RequestBuilderTest, ScoreSplitsWhereTheContextEnds) {
  v1::ScoreRequest message;
  message.set_context_text("to be or not ");
  message.set_target_text("to be");
  const auto built = BuildScore(message, model_, call_);
  ASSERT_TRUE(built.ok()) << built.status();
  EXPECT_EQ(built->request.prompt_token_ids, tokenizer_->Encode("to be or not to be", {}));
  EXPECT_EQ(built->num_context_tokens, static_cast<int>(tokenizer_->Encode("to be or not", {}).size()));
  EXPECT_EQ(built->request.max_tokens, 0);
}

TEST_F(RequestBuilderTest, ScoreOfOneTokenNeedsAContext) {
  v1::ScoreRequest message;
  message.mutable_target_token_ids()->add_ids(5);
  EXPECT_EQ(GetField(BuildScore(message, model_, call_).status()), "context");
  message.mutable_target_token_ids()->add_ids(6);
  const auto built = BuildScore(message, model_, call_);
  ASSERT_TRUE(built.ok()) << built.status();
  EXPECT_EQ(built->request.prompt_logprobs_start, 1);
}

}  // namespace
}  // namespace minitron::server
