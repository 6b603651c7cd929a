// CudaOps, second half: how a step crosses to the device and back, and recorded steps.
#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/cuda/cuda_ops.h"

namespace minitron::engine::cuda {

// --- Recorded steps. ---

std::vector<int> CudaOps::RecordedSizes(int max_num_sequences) {
  std::vector<int> sizes;
  // 1, 2, 4, 8, 12, 16, then steps of 8, 16 and 32: at most 3 rows are padding up to 16, a third of them up to 64, a
  // fifth beyond.
  for (int size = 1; size < max_num_sequences;) {
    sizes.push_back(size);
    size += size < 4 ? size : size < 16 ? 4 : size < 64 ? 8 : size < 128 ? 16 : 32;
  }
  sizes.push_back(max_num_sequences);
  return sizes;
}

ForwardCounts CudaOps::RecordedCounts(int rows) const {
  // Offsets must not move between replays: room for the worst case of everything but the block ids, which come last.
  const int chunks = MaxChunks();
  const int sequences = std::min(rows, limits_.max_num_sequences);
  return {.rows = rows, .sequences = rows, .items = sequences * chunks, .merge_rows = chunks > 1 ? sequences : 0};
}

ForwardCounts CudaOps::CountsFor(const Batch& batch, const StepPlan& plan) const {
  ForwardCounts counts{.rows = batch.num_tokens(),
                       .sequences = batch.num_sequences(),
                       .items = static_cast<int>(plan.items.size()),
                       .merge_rows = static_cast<int>(plan.merge_rows.size()),
                       .tiles = static_cast<int>(plan.tiles.size())};
  if (plan.decode_only && !recorded_.empty()) {
    for (const Recorded& recorded : recorded_) {
      if (recorded.rows < batch.num_sequences()) continue;
      counts = RecordedCounts(recorded.rows);
      break;
    }
  }
  counts.block_ids = static_cast<int>(batch.block_ids.size());
  return counts;
}

BatchView CudaOps::ViewOf(const ForwardCounts& counts) const {
  const ForwardLayout layout(counts);
  return {.num_tokens = counts.rows,
          .num_sequences = counts.sequences,
          .token_ids = ForwardArray<TokenId>(layout.token_ids),
          .positions = ForwardArray<int32_t>(layout.positions),
          .slot_mapping = ForwardArray<int64_t>(layout.slot_mapping),
          .block_start = ForwardArray<int32_t>(layout.block_start),
          .block_ids = ForwardArray<BlockId>(layout.block_ids)};
}

std::vector<BatchView> CudaOps::StepsToRecord() {
  std::vector<BatchView> views;
  for (const int rows : RecordedSizes(limits_.max_num_sequences)) views.push_back(ViewOf(RecordedCounts(rows)));
  // Largest first: what is chosen on first use (the products' algorithms) is chosen at a full step.
  std::reverse(views.begin(), views.end());
  return views;
}

void CudaOps::PrepareStep(const BatchView& view) {
  counts_ = RecordedCounts(view.num_tokens);
  layout_ = ForwardLayout(counts_);
  const Batch nothing;
  FillForward(nothing, StepPlan(nothing, config_.vocab_size, config_.group_size()), counts_, ScratchSlot(),
              slots_[0].forward.data());
  if (!status_.ok()) return;
  Check(cudaMemcpyAsync(forward_arrays_.data(), slots_[0].forward.data(), static_cast<size_t>(layout_.end),
                        cudaMemcpyHostToDevice, stream_.get()),
        "copy to device");
}

void CudaOps::BeginRecording(const BatchView& view) {
  counts_ = RecordedCounts(view.num_tokens);
  layout_ = ForwardLayout(counts_);
  recording_ = true;
  if (status_.ok()) Check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "begin capture");
}

void CudaOps::EndRecording(const BatchView& view) {
  cudaGraph_t captured = nullptr;
  recording_ = false;
  // Ends the capture even after an error in it, or the stream would stay unusable.
  const cudaError_t error = cudaStreamEndCapture(stream_.get(), &captured);
  const Graph graph(captured);
  if (!status_.ok()) return;
  Check(error, "end capture");
  if (!status_.ok()) return;
  cudaGraphExec_t executable = nullptr;
  Check(cudaGraphInstantiate(&executable, captured, 0), "instantiate graph");
  if (!status_.ok()) return;
  recorded_.insert(recorded_.begin(), Recorded{view.num_tokens, GraphExec(executable)});  // smallest first
  // PrepareStep's copy must have left the pinned memory before the next step is written there.
  Check(cudaStreamSynchronize(stream_.get()), "stream");
}

bool CudaOps::Replay(const BatchView& view) {
  if (!recorded_step_ || !status_.ok()) return false;
  for (const Recorded& recorded : recorded_) {
    if (recorded.rows != view.num_tokens) continue;
    Check(cudaGraphLaunch(recorded.graph.get(), stream_.get()), "launch graph");
    return true;
  }
  return false;
}

// --- A step's way to the device. ---

BatchView CudaOps::Upload(const Batch& batch) {
  CHECK(steps_.size() < 2 && static_cast<int>(batch.results.size()) <= MaxResults());
  Slot& slot = slots_[next_slot_];  // of the step before the one before, which has been waited for
  steps_.push_back({.slot = next_slot_, .pending = {}, .constrained = {}});
  next_slot_ = 1 - next_slot_;
  StepPlan plan(batch, config_.vocab_size, config_.group_size());
  ResetWalks(batch);
  AddMasks(batch, plan, steps_.back());
  counts_ = CountsFor(batch, plan);
  layout_ = ForwardLayout(counts_);
  recorded_step_ = plan.decode_only && !recorded_.empty();
  needs_ = plan.needs;
  num_gathered_ = 0;
  CHECK(layout_.end <= forward_arrays_.size());
  FillForward(batch, plan, counts_, ScratchSlot(), slot.forward.data());
  if (status_.ok()) {
    Check(cudaMemcpyAsync(forward_arrays_.data(), slot.forward.data(), static_cast<size_t>(layout_.end),
                          cudaMemcpyHostToDevice, stream_.get()),
          "copy to device");
  }
  UploadSample(batch, plan, slot);
  if (status_.ok()) Check(cudaEventRecord(slot.done.get(), stream_.get()), "record event");
  return ViewOf(counts_);
}

void CudaOps::ResetWalks(const Batch& batch) {
  for (const HistoryReset& reset : batch.history_resets) {
    Walk& walk = walks_[reset.slot];
    walk = {.walk = reset.constraint == nullptr ? nullptr : reset.constraint->NewWalk(), .epoch = walk.epoch + 1};
    if (walk.walk == nullptr) continue;
    for (const TokenId token : reset.output) walk.walk->Advance(token);
  }
}

void CudaOps::AddMasks(const Batch& batch, StepPlan& plan, Step& step) {
  for (size_t r = 0; r < batch.results.size(); ++r) {
    const ResultRow& row = batch.results[r];
    if (row.params == nullptr || row.params->constraint == nullptr) continue;
    Walk& walk = walks_[row.history_slot];
    CHECK(walk.walk != nullptr && !walk.waits);
    plan.AddMask(static_cast<int>(r), walk.walk->Allowed());
    walk.waits = true;
    step.constrained.push_back({static_cast<int>(r), row.history_slot, walk.epoch});
  }
}

void CudaOps::AdvanceWalks(const Slot& slot, const Step& step) {
  const auto* outputs = reinterpret_cast<const SampleOutput*>(slot.results.data());
  for (const ConstrainedRow& row : step.constrained) {
    Walk& walk = walks_[row.history_slot];
    if (walk.epoch != row.epoch) continue;
    walk.waits = false;
    if (outputs[row.result_row].failed == 0) walk.walk->Advance(outputs[row.result_row].token);
  }
}

void CudaOps::UploadSample(const Batch& batch, const StepPlan& plan, Slot& slot) {
  sample_layout_ = SampleLayout(static_cast<int>(batch.results.size()), static_cast<int64_t>(plan.edits.size()),
                                static_cast<int64_t>(plan.history.size()),
                                static_cast<int64_t>(plan.masks.size()) * MaskWords(config_.vocab_size));
  CHECK(sample_layout_.end <= sample_arrays_.size());
  if (!status_.ok()) return;
  FillSample(batch, plan, config_.vocab_size, slot.sample.data());
  if (sample_layout_.end > 0) {
    Check(cudaMemcpyAsync(sample_arrays_.data(), slot.sample.data(), static_cast<size_t>(sample_layout_.end),
                          cudaMemcpyHostToDevice, stream_.get()),
          "copy to device");
  }
  const size_t row_bytes = static_cast<size_t>(config_.vocab_size) * sizeof(uint32_t);
  for (const HistoryReset& reset : batch.history_resets) {
    if (!status_.ok()) return;
    Check(cudaMemsetAsync(history_.data() + int64_t{reset.slot} * config_.vocab_size, 0, row_bytes, stream_.get()),
          "clear history");
  }
  if (!plan.history.empty() && status_.ok()) {
    Check(AddToHistory(SampleArray<HistoryToken>(sample_layout_.history), static_cast<int>(plan.history.size()),
                       history_.data(), config_.vocab_size, stream_.get()),
          "add to history");
  }
}

void CudaOps::GatherRows(ConstMatrix x, const int32_t* rows, Matrix out) {
  CHECK(x.cols == out.cols);
  for (int64_t r = 0; r < out.rows; ++r) CHECK(rows[r] >= 0 && rows[r] < x.rows);
  const int first = num_gathered_;  // the rows crossed with the batch, in this order
  num_gathered_ += static_cast<int>(out.rows);
  if (!status_.ok()) return;
  Check(CopyRows(x.data, SampleArray<int32_t>(sample_layout_.token_rows) + first, nullptr, static_cast<int>(out.rows),
                 static_cast<int>(out.cols), out.data, stream_.get()),
        "gather rows");
}

void CudaOps::Sample(MatrixView<float> logits, absl::Span<const ResultRow> rows, int first_row,
                     absl::Span<ResultRowOutput> outputs) {
  CHECK(static_cast<size_t>(logits.rows) == rows.size() && rows.size() == outputs.size());
  CHECK(logits.rows <= LogitsRows(config_, limits_) && !steps_.empty());
  steps_.back().pending.push_back({first_row, rows, outputs});
  if (!status_.ok()) return;
  Slot& slot = slots_[steps_.back().slot];
  const SampleCall call{logits.data,
                        static_cast<int>(logits.rows),
                        config_.vocab_size,
                        SampleArray<SampleRow>(sample_layout_.rows) + first_row,
                        SampleArray<LogitEdit>(sample_layout_.edits),
                        SampleArray<uint32_t>(sample_layout_.masks),
                        history_.data(),
                        result_tokens_.data() + first_row,
                        outputs_.data() + first_row,
                        top_.data() + int64_t{first_row} * kMaxTopLogprobs,
                        {reinterpret_cast<SampleState*>(states_.data()), edited_.data(), bin_masses_.data(),
                         bin_counts_.data(), tile_masses_.data(), tile_tops_.data()},
                        needs_};
  Check(SampleLogits(call, stream_.get()), "sample");
  if (!status_.ok()) return;
  const auto copy_back = [&](const auto* from, int64_t offset, int64_t count) {
    if (!status_.ok()) return;
    Check(cudaMemcpyAsync(slot.results.data() + offset, from, static_cast<size_t>(count) * sizeof(*from),
                          cudaMemcpyDeviceToHost, stream_.get()),
          "copy from device");
  };
  copy_back(call.outputs, first_row * static_cast<int64_t>(sizeof(SampleOutput)), logits.rows);
  if (needs_.logprobs) {
    const int64_t top_offset = int64_t{MaxResults()} * sizeof(SampleOutput);
    const int64_t row_bytes = kMaxTopLogprobs * sizeof(TopLogprob);
    copy_back(call.top, top_offset + first_row * row_bytes, logits.rows * kMaxTopLogprobs);
  }
  if (status_.ok()) Check(cudaEventRecord(slot.done.get(), stream_.get()), "record event");
}

absl::Status CudaOps::Wait() {
  CHECK(!steps_.empty());
  const Step step = std::move(steps_.front());
  steps_.pop_front();
  const Slot& slot = slots_[step.slot];
  if (status_.ok()) Check(cudaEventSynchronize(slot.done.get()), "wait for the step");
  if (!status_.ok()) return absl::InternalError(status_.message());  // after start, whatever failed is the device
  for (const Pending& pending : step.pending) FillOutputs(slot, pending);
  AdvanceWalks(slot, step);
  return absl::OkStatus();
}

void CudaOps::FillOutputs(const Slot& slot, const Pending& pending) const {
  const auto* outputs = reinterpret_cast<const SampleOutput*>(slot.results.data()) + pending.first_row;
  const auto* top =
      reinterpret_cast<const TopLogprob*>(slot.results.data() + int64_t{MaxResults()} * sizeof(SampleOutput)) +
      int64_t{pending.first_row} * kMaxTopLogprobs;
  for (size_t r = 0; r < pending.rows.size(); ++r) {
    ResultRowOutput& out = pending.outputs[r];
    out.token_id = outputs[r].token;
    out.failed = outputs[r].failed != 0;
    const int num_top = pending.rows[r].num_top_logprobs;
    if (num_top < 0 || out.failed) continue;
    out.chosen = {out.token_id, outputs[r].logprob, outputs[r].rank};
    for (int n = 0; n < num_top; ++n) {
      const TopLogprob& entry = top[r * kMaxTopLogprobs + n];
      if (entry.token >= 0) out.top.push_back({entry.token, entry.logprob, n + 1});
    }
  }
}

}  // namespace minitron::engine::cuda
