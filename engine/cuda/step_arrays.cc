#include "engine/cuda/step_arrays.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "engine/base/check.h"
#include "engine/philox.h"

namespace minitron::engine::cuda {
namespace {

// Hands out 16-byte aligned ranges.
class Cursor {
 public:
  template <typename T>
  int64_t Take(int64_t count) {
    const int64_t offset = end_;
    end_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return offset;
  }
  int64_t end() const { return end_; }

 private:
  int64_t end_ = 0;
};

template <typename T>
void Put(const std::vector<T>& values, int64_t offset, unsigned char* memory) {
  if (!values.empty()) std::memcpy(memory + offset, values.data(), values.size() * sizeof(T));
}

template <typename T>
void Pad(const std::vector<T>& values, int count, T padding, int64_t offset, unsigned char* memory) {
  Put(values, offset, memory);
  T* array = reinterpret_cast<T*>(memory + offset);
  std::fill(array + values.size(), array + count, padding);
}

}  // namespace

ForwardLayout::ForwardLayout(const ForwardCounts& c) {
  Cursor cursor;
  counts = cursor.Take<DecodeCounts>(1);
  token_ids = cursor.Take<TokenId>(c.rows);
  positions = cursor.Take<int32_t>(c.rows);
  slot_mapping = cursor.Take<int64_t>(c.rows);
  block_start = cursor.Take<int32_t>(c.sequences + 1);
  items = cursor.Take<DecodeItem>(c.items);
  merge_rows = cursor.Take<MergeRow>(c.merge_rows);
  tiles = cursor.Take<PrefillTile>(c.tiles);
  block_ids = cursor.Take<BlockId>(c.block_ids);
  end = cursor.end();
}

SampleLayout::SampleLayout(int num_results, int64_t num_edits, int64_t num_history_tokens, int64_t num_mask_words) {
  Cursor cursor;
  token_rows = cursor.Take<int32_t>(num_results);
  rows = cursor.Take<SampleRow>(num_results);
  edits = cursor.Take<LogitEdit>(num_edits);
  history = cursor.Take<HistoryToken>(num_history_tokens);
  masks = cursor.Take<uint32_t>(num_mask_words);
  end = cursor.end();
}

StepPlan::StepPlan(const Batch& batch, int vocab, int group_size)
    : decode_only(batch.num_tokens() == batch.num_sequences()) {
  for (int s = 0; s < batch.num_sequences(); ++s) AddSequence(batch, s, group_size);
  const auto num_keys = [](const PrefillTile& tile) { return tile.first_position + tile.num_rows; };
  std::stable_sort(tiles.begin(), tiles.end(),
                   [&](const PrefillTile& a, const PrefillTile& b) { return num_keys(a) > num_keys(b); });
  for (const ResultRow& row : batch.results) AddResult(row, vocab);
  for (const HistoryReset& reset : batch.history_resets) {
    for (const TokenId token : reset.prompt) history.push_back({reset.slot, token, 0});
    for (const TokenId token : reset.output) history.push_back({reset.slot, token, 1});
  }
}

void StepPlan::AddSequence(const Batch& batch, int sequence, int group_size) {
  const int first = batch.query_start[sequence], num_rows = batch.query_start[sequence + 1] - first;
  if (num_rows > 1) {
    for (int row = 0; row < num_rows; row += PrefillRows(group_size)) {
      const int count = std::min(PrefillRows(group_size), num_rows - row);
      tiles.push_back({first + row, count, sequence, batch.positions[first + row]});
    }
    return;
  }
  const int num_keys = batch.positions[first] + 1;
  const int num_chunks = (num_keys + kChunkKeys - 1) / kChunkKeys;
  if (num_chunks > 1) merge_rows.push_back({first, static_cast<int32_t>(items.size()), num_chunks, 0});
  for (int chunk = 0; chunk < num_chunks; ++chunk) items.push_back({first, sequence, num_keys, chunk});
}

void StepPlan::AddResult(const ResultRow& row, int vocab) {
  SampleRow out = {};
  out.target = row.target;
  out.num_top_logprobs = row.num_top_logprobs;
  out.history_slot = row.history_slot;
  out.top_p = 1.0f;
  out.first_edit = static_cast<int32_t>(edits.size());
  out.mask = kNone;
  CHECK(row.num_top_logprobs <= kMaxTopLogprobs);
  if (row.target == kNone) {
    const SamplingParams& params = *row.params;
    out.uniform = UniformForPosition(params.seed, row.output_position);
    out.uses_history = params.HasPenalties() ? 1 : 0;
    CHECK(out.uses_history == 0 || row.history_slot != kNone);
    out.temperature = params.temperature;
    out.top_k = params.top_k < vocab ? params.top_k : 0;
    out.top_p = params.top_p;
    out.min_p = params.min_p;
    out.repetition_penalty = params.repetition_penalty;
    out.presence_penalty = params.presence_penalty;
    out.frequency_penalty = params.frequency_penalty;
    std::vector<TokenId> banned;
    if (row.banned_tokens != nullptr) banned = *row.banned_tokens;
    std::sort(banned.begin(), banned.end());
    banned.erase(std::unique(banned.begin(), banned.end()), banned.end());
    for (const TokenId token : banned) edits.push_back({token, -std::numeric_limits<float>::infinity()});
    for (const auto& [token, bias] : params.logit_bias) {  // a banned token stays banned
      if (!std::binary_search(banned.begin(), banned.end(), token)) edits.push_back({token, bias});
    }
  }
  out.num_edits = static_cast<int32_t>(edits.size()) - out.first_edit;
  needs.draws |= IsDrawn(out);
  needs.top_k |= IsDrawn(out) && out.top_k > 0;
  needs.top_p |= IsDrawn(out) && out.top_p < 1.0f;
  needs.logprobs |= out.num_top_logprobs >= 0;
  sample_rows.push_back(out);
}

void StepPlan::AddMask(int result_row, absl::Span<const uint64_t> mask) {
  sample_rows[result_row].mask = static_cast<int32_t>(masks.size());
  masks.push_back(mask);
}

void FillForward(const Batch& batch, const StepPlan& plan, const ForwardCounts& counts, int64_t scratch_slot,
                 unsigned char* memory) {
  const ForwardLayout layout(counts);
  CHECK(counts.rows >= batch.num_tokens() && counts.sequences >= batch.num_sequences());
  CHECK(counts.items >= static_cast<int>(plan.items.size()) && counts.tiles >= static_cast<int>(plan.tiles.size()));
  CHECK(counts.merge_rows >= static_cast<int>(plan.merge_rows.size()));
  const DecodeCounts decode{static_cast<int32_t>(plan.items.size()), static_cast<int32_t>(plan.merge_rows.size())};
  std::memcpy(memory + layout.counts, &decode, sizeof(decode));
  Pad(batch.token_ids, counts.rows, TokenId{0}, layout.token_ids, memory);
  Pad(batch.positions, counts.rows, int32_t{0}, layout.positions, memory);
  Pad(batch.slot_mapping, counts.rows, scratch_slot, layout.slot_mapping, memory);
  Pad(batch.block_start, counts.sequences + 1, batch.block_start.back(), layout.block_start, memory);
  Put(plan.items, layout.items, memory);
  Put(plan.merge_rows, layout.merge_rows, memory);
  Put(plan.tiles, layout.tiles, memory);
  Put(batch.block_ids, layout.block_ids, memory);
}

void FillSample(const Batch& batch, const StepPlan& plan, int vocab, unsigned char* memory) {
  const SampleLayout layout(static_cast<int>(batch.results.size()), static_cast<int64_t>(plan.edits.size()),
                            static_cast<int64_t>(plan.history.size()),
                            static_cast<int64_t>(plan.masks.size()) * MaskWords(vocab));
  auto* token_rows = reinterpret_cast<int32_t*>(memory + layout.token_rows);
  for (size_t r = 0; r < batch.results.size(); ++r) token_rows[r] = batch.results[r].token_row;
  Put(plan.sample_rows, layout.rows, memory);
  Put(plan.edits, layout.edits, memory);
  Put(plan.history, layout.history, memory);
  const auto mask_bytes = static_cast<size_t>(MaskWords(vocab)) * sizeof(uint32_t);
  unsigned char* to = memory + layout.masks;
  for (const absl::Span<const uint64_t> mask : plan.masks) {
    const size_t given = std::min(mask.size() * sizeof(uint64_t), mask_bytes);
    std::memcpy(to, mask.data(), given);  // two words of the device are one of the host's: both are little-endian
    std::memset(to + given, 0, mask_bytes - given);
    to += mask_bytes;
  }
}

}  // namespace minitron::engine::cuda
