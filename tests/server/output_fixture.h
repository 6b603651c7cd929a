// The fixture of the tests of OutputProcessor: no network, no engine, a clock by hand.
#pragma once

#include <gtest/gtest.h>
#include <prometheus/text_serializer.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/base/check.h"
#include "server/output_processor.h"

namespace minitron::server {

// The shipped tokenizer's end of sequence.
inline constexpr TokenId kEos = 3;

// Keeps what a call is told, as one line per event.
class RecordingSink final : public CallSink {
 public:
  void OnStarted(StartedEvent event) override {
    log.push_back("started " + std::to_string(event.num_prompt_tokens));
    for (const auto& row : event.prompt_logprobs) prompt_ids.push_back(row.token_id);
  }
  void OnDelta(DeltaEvent event) override {
    text[event.index] += event.text;
    if (event.token.has_value()) ids[event.index].push_back(event.token->token_id);
    if (on_delta) on_delta();
  }
  void OnFinished(FinishedEvent event) override {
    log.push_back("finished " + std::to_string(event.index));
    finished.push_back(std::move(event));
  }
  void OnComplete() override {
    log.push_back("complete");
    if (on_end) on_end();
  }
  void OnFailed(const grpc::Status& status) override {
    log.push_back("failed");
    failure = status;
    if (on_end) on_end();
  }
  bool CutOffIfStalled(scheduler::TimePoint limit) override {
    if (!write_started.has_value() || *write_started > limit) return false;
    write_started.reset();
    return true;
  }

  std::vector<std::string> log;
  std::map<int, std::string> text;
  std::map<int, std::vector<TokenId>> ids;
  std::vector<TokenId> prompt_ids;
  std::vector<FinishedEvent> finished;
  grpc::Status failure;
  std::optional<scheduler::TimePoint> write_started;
  std::function<void()> on_delta;
  std::function<void()> on_end;
};

class OutputProcessorTest : public ::testing::Test {
 protected:
  OutputProcessorTest() {
    auto loaded = Tokenizer::Load(std::string(MINITRON_SOURCE_DIR) + "/deploy/models/minitron-tiny", 2048);
    CHECK(loaded.ok());
    tokenizer_ = *std::move(loaded);
    engine::ModelInfo info;
    info.max_context_tokens = 1024;
    metrics_ = std::make_unique<Metrics>(MetricsOptions{"tiny", info, 64, 16});
    Make({});
  }

  void Make(OutputProcessorOptions options) {
    output_ = std::make_unique<OutputProcessor>(options, tokenizer_.get(), metrics_.get(), [this] { return now_; });
    output_->SetAbort([this](scheduler::RequestId id, int index) { aborts_.emplace_back(id, index); });
    output_->SetOnEngineFailure([this] { ++num_failures_; });
  }

  // Registers request `id` under the name "r<id>".
  std::shared_ptr<RecordingSink> Register(scheduler::RequestId id, CallSpec spec = {}) {
    auto sink = std::make_shared<RecordingSink>();
    spec.request_id = "r" + std::to_string(id);
    spec.arrival = now_;
    spec.num_prompt_tokens = 7;
    const absl::Status status = output_->Register(id, std::move(spec), sink);
    EXPECT_TRUE(status.ok()) << status;
    return sink;
  }

  scheduler::StepOutput Started(scheduler::RequestId id) {
    scheduler::StepOutput step;
    step.prompts_done.push_back({id, 7, 2});
    return step;
  }

  void AddToken(scheduler::StepOutput& step, scheduler::RequestId id, TokenId token, int index = 0) {
    scheduler::TokenEvent event;
    event.id = id;
    event.index = index;
    event.output_position = num_tokens_[{id, index}]++;
    event.output.token_id = token;
    step.tokens.push_back(event);
  }

  void AddFinish(scheduler::StepOutput& step, scheduler::RequestId id, scheduler::FinishReason reason, int index = 0) {
    scheduler::FinishEvent event;
    event.id = id;
    event.index = index;
    event.reason = reason;
    event.stop_token = kEos;
    event.num_prompt_tokens = 7;
    event.num_cached_tokens = 2;
    event.num_output_tokens = num_tokens_[{id, index}];
    event.arrival = now_;
    event.first_scheduled = now_;
    step.finished.push_back(event);
  }

  // The whole life of a sequence: its prompt, one step per token, the last of which ends it.
  void Run(scheduler::RequestId id, const std::vector<TokenId>& tokens, scheduler::FinishReason reason) {
    output_->Process(Started(id));
    for (size_t i = 0; i < tokens.size(); ++i) {
      scheduler::StepOutput step;
      AddToken(step, id, tokens[i]);
      if (i + 1 == tokens.size()) AddFinish(step, id, reason);
      output_->Process(std::move(step));
    }
  }

  std::vector<TokenId> Encode(const std::string& text) const { return tokenizer_->Encode(text, {}); }
  std::string MetricsText() const { return prometheus::TextSerializer().Serialize(metrics_->registry()->Collect()); }

  scheduler::TimePoint now_{std::chrono::seconds(100)};
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<OutputProcessor> output_;
  std::vector<std::pair<scheduler::RequestId, int>> aborts_;
  std::map<std::pair<scheduler::RequestId, int>, int> num_tokens_;
  int num_failures_ = 0;
};

}  // namespace minitron::server
