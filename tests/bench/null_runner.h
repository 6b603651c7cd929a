// A ModelRunner whose steps cost nothing: what is measured over it is everything but the model.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "engine/model_runner.h"

namespace minitron::bench {

class NullRunner : public engine::ModelRunner {
 public:
  // Sequences continue with `text`, token by token and over again. `step`: how long a step takes, waiting.
  NullRunner(std::vector<engine::TokenId> text, std::chrono::milliseconds step) : text_(std::move(text)), step_(step) {
    info_.architecture = "null";
    info_.backend = "null";
    info_.weight_type = "none";
    info_.vocab_size = 2048;
    info_.max_context_tokens = 4096;
    info_.eos_token_ids = {3};
  }

  absl::Status Submit(const engine::Batch& batch) override {
    engine::StepResult result;
    result.rows.resize(batch.results.size());
    for (size_t i = 0; i < batch.results.size(); ++i) {
      result.rows[i].token_id = text_[batch.results[i].output_position % text_.size()];
    }
    outstanding_.push_back(std::move(result));
    return absl::OkStatus();
  }

  absl::StatusOr<engine::StepResult> Collect() override {
    if (step_.count() > 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      never_.wait_for(lock, step_);
    }
    engine::StepResult result = std::move(outstanding_.front());
    outstanding_.pop_front();
    return result;
  }

  const engine::ModelInfo& model_info() const override { return info_; }
  int num_kv_blocks() const override { return 1 << 16; }
  int block_size() const override { return 16; }
  int max_num_tokens() const override { return 4096; }
  int max_num_sequences() const override { return 1024; }

 private:
  const std::vector<engine::TokenId> text_;
  const std::chrono::milliseconds step_;
  std::mutex mutex_;
  std::condition_variable never_;  // notified by nobody
  engine::ModelInfo info_;
  std::deque<engine::StepResult> outstanding_;
};

}  // namespace minitron::bench
