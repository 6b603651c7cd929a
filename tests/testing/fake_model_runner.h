// FakeModelRunner: a ModelRunner without a model that notices wrong memory.
//
// It keeps one hash per KV slot, chained over the tokens before it as a transformer's state is, and derives each token
// and logprob from all slots it reads back through the block table: a wrong, stale or early-freed block changes the
// output. Like a real runner, a row's result depends on the sequence's tokens, params and output position only.
// Malformed batches are CHECKed, when they are submitted and again when they are computed. Unwritten slots hold poison.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <vector>

#include "engine/model_runner.h"

namespace minitron::testing {

struct FakeModelRunnerOptions {
  int num_kv_blocks = 64;
  int block_size = 8;
  int max_num_tokens = 128;
  int max_num_sequences = 16;
  int max_context_tokens = 1024;
  int vocab_size = 64;
  std::vector<engine::TokenId> eos_token_ids = {1};
  int64_t fail_at_step = -1;    // the Collect of this step, from 0, returns INTERNAL, as does every call after it
  int64_t fail_at_submit = -1;  // the Submit of this batch, from 0, and every later one returns RESOURCE_EXHAUSTED
  int nan_one_in = 0;           // n: about one in n result rows fails, as a function of its content; 0: none
  // n: about one in n result rows fails by accident, not as a function of its content, and so do the slots that its
  // sequence wrote in that step: whoever reads them fails as well.
  int accident_one_in = 0;
  int wild_token_one_in = 0;  // likewise: about one in n samples is outside the vocabulary, as from a broken sampler
  bool compute_late = false;  // batches are computed when they are collected, as on a device that lags behind the host
  // Overrides the token derived from memory: (last token of the sequence, its position) -> next token.
  std::function<engine::TokenId(engine::TokenId, int)> choose_token = nullptr;
};

// Engine thread only, except where a method says "any thread".
class FakeModelRunner : public engine::ModelRunner {
 public:
  explicit FakeModelRunner(const FakeModelRunnerOptions& options);

  absl::Status Submit(const engine::Batch& batch) override;
  absl::StatusOr<engine::StepResult> Collect() override;
  const engine::ModelInfo& model_info() const override { return info_; }
  int num_kv_blocks() const override { return options_.num_kv_blocks; }
  int block_size() const override { return options_.block_size; }
  int max_num_tokens() const override { return options_.max_num_tokens; }
  int max_num_sequences() const override { return options_.max_num_sequences; }
  bool submits_asynchronously() const override { return options_.compute_late; }

  // Overwrites a block, as if another owner had used it.
  void Poison(engine::BlockId block);

  // From Hold on, Collect blocks until Release. All four: any thread.
  void Hold();
  void Release();
  void WaitUntilHeld();  // returns when a Collect is blocked
  bool IsHeld();         // a Collect is blocked

  int64_t num_steps() const { return num_steps_; }  // collected; any thread
  int64_t num_accidents() const { return num_accidents_; }
  int num_outstanding() const { return static_cast<int>(outstanding_.size()); }

 private:
  struct History {
    std::vector<engine::TokenId> prompt, output;
    bool in_use = false;
  };

  struct Outstanding {
    const engine::Batch* batch;  // the caller's
    engine::StepResult result;
  };

  void Compute(Outstanding& step);
  void CheckWellFormed(const engine::Batch& batch) const;
  void CheckResultRow(const engine::Batch& batch, const engine::ResultRow& row) const;
  void WriteKv(const engine::Batch& batch, const std::vector<engine::TokenId>& tokens);
  // A hash of all slots up to `position`; kBroken if one of them is.
  uint64_t ReadContext(const engine::Batch& batch, int sequence, int position) const;
  void BreakWrittenSlots(const engine::Batch& batch, int sequence);
  engine::ResultRowOutput Produce(const engine::Batch& batch, const engine::ResultRow& row,
                                  const std::vector<engine::TokenId>& tokens);
  engine::TokenId Sample(uint64_t context, const engine::ResultRow& row, engine::TokenId last, int position) const;

  const FakeModelRunnerOptions options_;
  engine::ModelInfo info_;
  std::vector<uint64_t> slots_;
  std::vector<History> histories_;
  std::deque<Outstanding> outstanding_;
  std::vector<engine::ResultRowOutput> previous_rows_;  // of the batch computed last
  std::atomic<int64_t> num_steps_ = 0;
  int64_t num_submitted_ = 0;
  uint64_t num_rows_produced_ = 0;
  int64_t num_accidents_ = 0;

  std::mutex mutex_;  // guards the gate
  std::condition_variable gate_;
  bool hold_ = false;
  bool held_ = false;
};

}  // namespace minitron::testing
