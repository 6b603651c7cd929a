// InstantRunner: a ModelRunner that samples a constant token at once. For measuring what the scheduler costs.
#pragma once

#include <utility>

#include "engine/base/check.h"
#include "engine/model_runner.h"

namespace minitron::testing {

class InstantRunner : public engine::ModelRunner {
 public:
  InstantRunner(int num_kv_blocks, int block_size, int max_num_tokens, int max_num_sequences, bool is_asynchronous)
      : num_kv_blocks_(num_kv_blocks),
        block_size_(block_size),
        max_num_tokens_(max_num_tokens),
        max_num_sequences_(max_num_sequences),
        is_asynchronous_(is_asynchronous) {
    info_.vocab_size = 256000;
    info_.max_context_tokens = 4096;
  }

  absl::Status Submit(const engine::Batch& batch) override {
    CHECK(num_outstanding_ < 2);
    num_rows_[(oldest_ + num_outstanding_++) % 2] = batch.results.size();
    return absl::OkStatus();
  }
  absl::StatusOr<engine::StepResult> Collect() override {
    engine::StepResult result = std::move(recycled_);
    result.rows.resize(num_rows_[std::exchange(oldest_, 1 - oldest_)]);
    --num_outstanding_;
    for (engine::ResultRowOutput& row : result.rows) row.token_id = 7;
    return result;
  }
  void Recycle(engine::StepResult&& result) override { recycled_ = std::move(result); }
  bool submits_asynchronously() const override { return is_asynchronous_; }
  const engine::ModelInfo& model_info() const override { return info_; }
  int num_kv_blocks() const override { return num_kv_blocks_; }
  int block_size() const override { return block_size_; }
  int max_num_tokens() const override { return max_num_tokens_; }
  int max_num_sequences() const override { return max_num_sequences_; }

 private:
  const int num_kv_blocks_, block_size_, max_num_tokens_, max_num_sequences_;
  const bool is_asynchronous_;
  engine::ModelInfo info_;
  engine::StepResult recycled_;
  size_t num_rows_[2] = {};
  int oldest_ = 0;
  int num_outstanding_ = 0;
};

}  // namespace minitron::testing
