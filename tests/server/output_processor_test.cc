// What becomes of an engine's steps: text, ends, failures.
#include "server/output_processor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/grpc_status.h"
#include "tests/server/output_fixture.h"
#include "tests/server/wire.h"

namespace minitron::server {
namespace {

using scheduler::FinishReason;
using scheduler::StepOutput;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

TEST_F(OutputProcessorTest, EventsComeInOrderAndTheCallIsForgottenBeforeItsEnd) {
  const auto sink = Register(1);
  int live_at_end = -1;
  sink->on_end = [&] { live_at_end = output_->num_live(); };
  Run(1, Encode("good night"), FinishReason::kLength);
  EXPECT_THAT(sink->log, ElementsAre("started 7", "finished 0", "complete"));
  EXPECT_EQ(sink->ids[0], Encode("good night"));
  EXPECT_EQ(sink->finished[0].reason, FinishedEvent::Reason::kLength);
  EXPECT_EQ(sink->finished[0].num_cached_tokens, 2);
  EXPECT_EQ(live_at_end, 0) << "the name is free when the client sees the end";
  EXPECT_TRUE(aborts_.empty());
}

TEST_F(OutputProcessorTest, ACharacterOfSeveralTokensArrivesWholeAndAHalfOneAsAReplacement) {
  const TokenId first_byte = tokenizer_->spm().PieceToId("<0x00>");
  std::vector<TokenId> tokens;
  for (const unsigned char byte : std::string("\xF0\x9F\x98\x80\xE2\x96")) tokens.push_back(first_byte + byte);
  const auto sink = Register(1);
  std::vector<std::string> seen;
  sink->on_delta = [&] { seen.push_back(sink->text[0]); };
  Run(1, tokens, FinishReason::kLength);
  EXPECT_EQ(sink->text[0], "\xF0\x9F\x98\x80\xEF\xBF\xBD");
  EXPECT_EQ(seen[2], "") << "three of four bytes";
  EXPECT_EQ(seen[3], "\xF0\x9F\x98\x80");
}

TEST_F(OutputProcessorTest, TheTextOfTheTokenThatEndsTheSequenceIsNotPartOfTheAnswer) {
  std::vector<TokenId> tokens = Encode("good night");
  tokens.push_back(kEos);
  const auto by_eos = Register(1);
  Run(1, tokens, FinishReason::kEosToken);
  EXPECT_EQ(by_eos->text[0], tokenizer_->Decode(Encode("good night"), {}));
  EXPECT_EQ(by_eos->ids[0], tokens) << "its id is";
  EXPECT_EQ(by_eos->finished[0].reason, FinishedEvent::Reason::kEosToken);
  EXPECT_EQ(by_eos->finished[0].stop_token, kEos);
  const auto by_stop_id = Register(2);
  Run(2, Encode("good night"), FinishReason::kStopToken);
  std::vector<TokenId> all_but_last = Encode("good night");
  all_but_last.pop_back();
  EXPECT_EQ(by_stop_id->text[0], tokenizer_->Decode(all_but_last, {}));
}

TEST_F(OutputProcessorTest, AStopStringEndsTheTextAndAbortsTheSequenceOnce) {
  CallSpec spec;
  spec.stop_sequences = {"n fox j"};
  const auto sink = Register(1, spec);
  output_->Process(Started(1));
  for (const TokenId token : Encode("the quick brown fox jumps over the lazy dog")) {
    StepOutput step;
    AddToken(step, 1, token);
    output_->Process(std::move(step));
  }
  EXPECT_THAT(aborts_, ElementsAre(Pair(1, -1)));
  EXPECT_THAT(sink->text[0], ::testing::EndsWith("the quick brow"));
  EXPECT_TRUE(sink->finished.empty()) << "the engine has the last word on timings";
  const size_t num_sent = sink->ids[0].size();
  StepOutput step;
  AddFinish(step, 1, FinishReason::kCancelled);
  output_->Process(std::move(step));
  EXPECT_THAT(sink->log, ElementsAre("started 7", "finished 0", "complete"));
  EXPECT_EQ(sink->finished[0].stop_sequence, "n fox j");
  EXPECT_EQ(sink->finished[0].num_output_tokens, static_cast<int>(num_sent)) << "later tokens do not count";
}

TEST_F(OutputProcessorTest, AStopStringOfOneSequenceAbortsThatOneAndTheLastAbortsTheRequest) {
  CallSpec spec;
  spec.num_sequences = 2;
  spec.stop_sequences = {"fox"};
  const auto sink = Register(1, spec);
  output_->Process(Started(1));
  for (const int index : {1, 0}) {
    for (const TokenId token : Encode("the fox")) {
      StepOutput step;
      AddToken(step, 1, token, index);
      output_->Process(std::move(step));
    }
  }
  EXPECT_THAT(aborts_, ElementsAre(Pair(1, 1), Pair(1, -1)));
  StepOutput step;
  AddFinish(step, 1, FinishReason::kCancelled, 0);
  AddFinish(step, 1, FinishReason::kCancelled, 1);
  output_->Process(std::move(step));
  EXPECT_THAT(sink->log, ElementsAre("started 7", "finished 0", "finished 1", "complete"));
}

TEST_F(OutputProcessorTest, StopStringsWaitForMinTokens) {
  CallSpec spec;
  spec.stop_sequences = {"e"};
  spec.min_tokens = 100;
  const auto sink = Register(1, spec);
  Run(1, Encode("the quick brown fox"), FinishReason::kLength);
  EXPECT_TRUE(aborts_.empty());
  EXPECT_EQ(sink->finished[0].reason, FinishedEvent::Reason::kLength);
  EXPECT_EQ(sink->text[0], tokenizer_->Decode(Encode("the quick brown fox"), {}));
}

TEST_F(OutputProcessorTest, TextHeldBackForAStopStringIsReleasedAtTheEnd) {
  CallSpec spec;
  spec.stop_sequences = {"fox jumps"};
  const auto sink = Register(1, spec);
  Run(1, Encode("the quick brown fox"), FinishReason::kLength);
  EXPECT_EQ(sink->text[0], tokenizer_->Decode(Encode("the quick brown fox"), {}));
}

TEST_F(OutputProcessorTest, PromptLogprobsOfAllChunksComeWithStarted) {
  const auto sink = Register(1);
  for (int chunk = 0; chunk < 3; ++chunk) {
    StepOutput step;
    scheduler::PromptLogprobsEvent event{1, 1 + 2 * chunk, {}};
    for (int i = 0; i < 2; ++i) event.positions.emplace_back().token_id = 10 * chunk + i;
    step.prompt_logprobs.push_back(event);
    if (chunk == 2) step.prompts_done.push_back({1, 7, 0});
    EXPECT_TRUE(sink->log.empty());
    output_->Process(std::move(step));
  }
  EXPECT_THAT(sink->prompt_ids, ElementsAre(0, 1, 10, 11, 20, 21));
}

TEST_F(OutputProcessorTest, AnEndBeforeItsTimeIsOneTypedFailureWithWhatWasUsed) {
  const struct {
    FinishReason reason;
    grpc::StatusCode code;
    const char* name;
  } kCases[] = {{FinishReason::kCancelled, grpc::StatusCode::CANCELLED, reason::kCancelled},
                {FinishReason::kDeadline, grpc::StatusCode::DEADLINE_EXCEEDED, reason::kDeadlineExceeded},
                {FinishReason::kError, grpc::StatusCode::INTERNAL, reason::kNonFiniteLogits}};
  scheduler::RequestId id = 0;
  for (const auto& c : kCases) {
    CallSpec spec;
    spec.num_sequences = 2;
    const auto sink = Register(++id, spec);
    output_->Process(Started(id));
    StepOutput tokens;
    AddToken(tokens, id, 10, 0);
    AddToken(tokens, id, 11, 1);
    output_->Process(std::move(tokens));
    StepOutput step;
    AddFinish(step, id, c.reason, 0);
    AddFinish(step, id, FinishReason::kCancelled, 1);
    output_->Process(std::move(step));
    EXPECT_THAT(sink->log, ElementsAre("started 7", "failed")) << c.name;
    EXPECT_EQ(sink->failure.error_code(), c.code);
    EXPECT_EQ(InfoOf(sink->failure).reason(), c.name);
    EXPECT_EQ(MetadataOf(sink->failure, "prompt_tokens"), "7");
    EXPECT_EQ(MetadataOf(sink->failure, "cached_tokens"), "2");
    EXPECT_EQ(MetadataOf(sink->failure, "completion_tokens"), "2");
    EXPECT_EQ(aborts_.back(), std::make_pair(id, -1)) << "the other sequence is of no use any more";
    EXPECT_EQ(output_->num_live(), 0);
  }
  EXPECT_THAT(MetricsText(), HasSubstr("finish_reason=\"deadline\"} 1\n"));
}

}  // namespace
}  // namespace minitron::server
