// StepArrays: one step's Batch as the arrays the kernels read, laid out in one piece of pinned memory so that it
// crosses to the device in one copy. Host code only; a pure function of the batch.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "engine/batch.h"
#include "engine/cuda/kernels.h"
#include "engine/cuda/sampler.h"

namespace minitron::engine::cuda {

// How much room a layout has for each array of the forward pass.
struct ForwardCounts {
  int rows = 0;        // token rows, padding included
  int sequences = 0;   // padding included
  int items = 0;       // decode items
  int merge_rows = 0;  // decode rows with several chunks
  int tiles = 0;       // prefill tiles
  int block_ids = 0;
};

// Byte offsets of the arrays; all 16-byte aligned. block_ids is last: a recorded step fixes every offset, not its end.
struct ForwardLayout {
  explicit ForwardLayout(const ForwardCounts& counts);
  int64_t counts, token_ids, positions, slot_mapping, block_start, items, merge_rows, tiles, block_ids, end;
};

// Offsets of the arrays of sampling.
struct SampleLayout {
  SampleLayout(int num_results, int64_t num_edits, int64_t num_history_tokens, int64_t num_mask_words);
  int64_t token_rows, rows, edits, history, masks, end;
};

// The work of a batch, counted and collected once.
struct StepPlan {
  // `batch` must outlive the plan. `group_size` cuts prompts into tiles.
  StepPlan(const Batch& batch, int vocab, int group_size);

  // Every sequence has one row: the step can be padded to a recorded one.
  bool decode_only = false;
  std::vector<DecodeItem> items;
  std::vector<MergeRow> merge_rows;
  std::vector<PrefillTile> tiles;  // most keys first
  std::vector<SampleRow> sample_rows;
  std::vector<LogitEdit> edits;
  std::vector<HistoryToken> history;
  // Of rows with a constraint, 64 tokens a word; borrowed until FillSample.
  std::vector<absl::Span<const uint64_t>> masks;
  SampleNeeds needs;

  void AddMask(int result_row, absl::Span<const uint64_t> mask);

 private:
  void AddSequence(const Batch& batch, int sequence, int group_size);
  void AddResult(const ResultRow& row, int vocab);
};

// Writes the forward arrays at the layout's offsets. Rows past the batch's are padding: token 0 at position 0, written
// to `scratch_slot` of the cache, seen by no attention.
void FillForward(const Batch& batch, const StepPlan& plan, const ForwardCounts& counts, int64_t scratch_slot,
                 unsigned char* memory);
void FillSample(const Batch& batch, const StepPlan& plan, int vocab, unsigned char* memory);

}  // namespace minitron::engine::cuda
