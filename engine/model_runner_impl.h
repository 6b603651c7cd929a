// The runner over any op set: upload, forward, gather the result rows, logits in bounded chunks, sample.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/model_runner.h"
#include "engine/nemotron_forward.h"

namespace minitron::engine {

// What a runner is sized for; fixed when it is built.
struct RunnerLimits {
  int block_size = 16;
  int num_kv_blocks = 0;
  int max_num_sequences = 0;
  int max_num_tokens = 0;
  int max_context_tokens = 0;
  KvCacheType kv_cache_type = KvCacheType::kBf16;
  ActivationType activation_type = ActivationType::kF32;  // CPU backend
};

// Logits are made this many bytes at a time: prompt logprobs ask for every row of a prompt at once, and
// rows * vocabulary would be 4 GB for a 4096-token prompt of the 8B. 64 MiB hold the 64 rows of a decode step of it,
// which then reads the head's weights once.
inline constexpr int64_t kLogitsBytes = 64 << 20;
inline constexpr int64_t kMinLogitsRows = 16;  // below this the head's matmul reuses its weights too little

// Result rows whose logits are made, and sampled from, at a time.
inline int64_t LogitsRows(const NemotronConfig& config, const RunnerLimits& limits) {
  return std::min<int64_t>(limits.max_num_tokens,
                           std::max<int64_t>(kMinLogitsRows, kLogitsBytes / (int64_t{4} * config.vocab_size)));
}

// Engine thread only. `weights` are where `ops` can read them; `weights_owner` keeps them alive.
template <OpSet Ops>
class ModelRunnerImpl final : public ModelRunner {
 public:
  using Element = typename Ops::Element;

  ModelRunnerImpl(std::unique_ptr<Ops> ops, NemotronConfig config, NemotronWeights weights,
                  std::shared_ptr<const void> weights_owner, ModelInfo info, RunnerLimits limits)
      : weights_owner_(std::move(weights_owner)),
        ops_(std::move(ops)),
        config_(std::move(config)),
        weights_(std::move(weights)),
        info_(std::move(info)),
        limits_(limits),
        logits_rows_(LogitsRows(config_, limits)),
        buffers_(*ops_, config_, limits.max_num_tokens),
        gathered_(ops_->Allocate(logits_rows_ * config_.hidden_size)),
        logits_(ops_->AllocateFloats(logits_rows_ * config_.vocab_size)) {
    if constexpr (RecordingOpSet<Ops>) RecordSteps();
  }

  absl::Status Submit(const Batch& batch) override {
    CHECK(num_outstanding_ < kMaxOutstanding);
    CheckBatch(batch);
    const BatchView view = ops_->Upload(batch);
    const MatrixView<const Element> hidden = ForwardOrReplay(view);
    ComputeResults(batch, hidden, outstanding_[(oldest_ + num_outstanding_) % kMaxOutstanding]);
    ++num_outstanding_;
    return absl::OkStatus();
  }

  absl::StatusOr<StepResult> Collect() override {
    CHECK(num_outstanding_ > 0);
    RETURN_IF_ERROR(ops_->Wait());
    --num_outstanding_;
    return std::exchange(outstanding_[std::exchange(oldest_, (oldest_ + 1) % kMaxOutstanding)], std::move(recycled_));
  }

  void Recycle(StepResult&& result) override { recycled_ = std::move(result); }

  bool submits_asynchronously() const override { return Ops::kAsynchronous; }
  const ModelInfo& model_info() const override { return info_; }
  int num_kv_blocks() const override { return limits_.num_kv_blocks; }
  int block_size() const override { return limits_.block_size; }
  int max_num_tokens() const override { return limits_.max_num_tokens; }
  int max_num_sequences() const override { return limits_.max_num_sequences; }

 private:
  static constexpr int kMaxOutstanding = 2;

  void RecordSteps() {
    // The head is not recorded, but what its product settles on first use should be settled before the first request.
    const MatrixView<const Element> rows{gathered_.data(), logits_rows_, config_.hidden_size};
    ops_->MatMul(rows, weights_.lm_head, MatrixView<float>{logits_.data(), logits_rows_, config_.vocab_size});
    for (const BatchView& view : ops_->StepsToRecord()) {
      ops_->PrepareStep(view);
      Forward(*ops_, config_, weights_, view, buffers_);
      ops_->BeginRecording(view);
      Forward(*ops_, config_, weights_, view, buffers_);
      ops_->EndRecording(view);
    }
  }

  MatrixView<const Element> ForwardOrReplay(const BatchView& view) {
    if constexpr (RecordingOpSet<Ops>) {
      if (ops_->Replay(view)) return {buffers_.normed.data(), view.num_tokens, config_.hidden_size};
    }
    return Forward(*ops_, config_, weights_, view, buffers_);
  }

  void ComputeResults(const Batch& batch, MatrixView<const Element> hidden, StepResult& result) {
    const int64_t num_rows = static_cast<int64_t>(batch.results.size());
    result.rows.clear();
    result.rows.resize(num_rows);
    for (int64_t first = 0; first < num_rows; first += logits_rows_) {
      const int64_t rows = std::min(logits_rows_, num_rows - first);
      token_rows_.clear();
      for (int64_t r = 0; r < rows; ++r) token_rows_.push_back(batch.results[first + r].token_row);
      const MatrixView<Element> gathered{gathered_.data(), rows, config_.hidden_size};
      const MatrixView<float> logits{logits_.data(), rows, config_.vocab_size};
      ops_->GatherRows(hidden, token_rows_.data(), gathered);
      ops_->MatMul(MatrixView<const Element>{gathered.data, rows, gathered.cols}, weights_.lm_head, logits);
      ops_->Sample(logits, absl::MakeConstSpan(batch.results).subspan(first, rows), static_cast<int>(first),
                   absl::MakeSpan(result.rows).subspan(first, rows));
    }
  }

  // A malformed batch is our own bug; found here it names itself instead of reading foreign memory.
  void CheckBatch(const Batch& batch) const {
    const int num_tokens = batch.num_tokens();
    const int num_sequences = batch.num_sequences();
    CHECK(num_tokens > 0 && num_tokens <= limits_.max_num_tokens);
    CHECK(num_sequences > 0 && num_sequences <= limits_.max_num_sequences);
    CHECK(batch.positions.size() == batch.token_ids.size() && batch.slot_mapping.size() == batch.token_ids.size());
    CHECK(batch.query_start.size() == batch.kv_lens.size() + 1 && batch.query_start.back() == num_tokens);
    CHECK(batch.block_start.size() == batch.kv_lens.size() + 1);
    CHECK(batch.block_start.back() == static_cast<int>(batch.block_ids.size()));
    for (const BlockId block : batch.block_ids) CHECK(block >= 0 && block < limits_.num_kv_blocks);
    for (int s = 0; s < num_sequences; ++s) CheckSequence(batch, s);
    for (const ResultRow& row : batch.results) CheckResultRow(batch, row);
    for (const HistoryReset& reset : batch.history_resets) CheckHistorySlot(reset.slot);
  }

  void CheckSequence(const Batch& batch, int s) const {
    const int64_t num_blocks = batch.block_start[s + 1] - batch.block_start[s];
    CHECK(batch.kv_lens[s] > 0 && batch.kv_lens[s] <= limits_.max_context_tokens);
    CHECK(batch.kv_lens[s] <= num_blocks * limits_.block_size);
    CHECK(batch.query_start[s] < batch.query_start[s + 1]);
    for (int t = batch.query_start[s]; t < batch.query_start[s + 1]; ++t) {
      const int32_t position = batch.positions[t];
      CHECK(position >= 0 && position < batch.kv_lens[s]);
      CHECK(t == batch.query_start[s] || position == batch.positions[t - 1] + 1);
      const int64_t block = batch.block_ids[batch.block_start[s] + position / limits_.block_size];
      CHECK(batch.slot_mapping[t] == block * limits_.block_size + position % limits_.block_size);
      CHECK(IsFromPreviousResult(batch.token_ids[t]) || batch.token_ids[t] < config_.vocab_size);
    }
  }

  void CheckResultRow(const Batch& batch, const ResultRow& row) const {
    CHECK(row.token_row >= 0 && row.token_row < batch.num_tokens());
    CHECK((row.params != nullptr) == (row.target == kNone));
    if (row.target != kNone) CHECK(row.target >= 0 && row.target < config_.vocab_size);
    if (row.history_slot != kNone) CheckHistorySlot(row.history_slot);
  }

  void CheckHistorySlot(int32_t slot) const { CHECK(slot >= 0 && slot < 2 * limits_.max_num_sequences); }

  std::shared_ptr<const void> weights_owner_;  // outlives everything below
  std::unique_ptr<Ops> ops_;
  const NemotronConfig config_;
  const NemotronWeights weights_;
  const ModelInfo info_;
  const RunnerLimits limits_;
  const int64_t logits_rows_;
  ForwardBuffers<Ops> buffers_;
  typename Ops::Buffer gathered_;            // [logits_rows, hidden]
  typename Ops::FloatBuffer logits_;         // [logits_rows, vocab]
  std::vector<int32_t> token_rows_;          // of the chunk at hand
  StepResult outstanding_[kMaxOutstanding];  // a ring
  int oldest_ = 0;
  int num_outstanding_ = 0;
  StepResult recycled_;  // handed back; its memory is for a later step
};

}  // namespace minitron::engine
