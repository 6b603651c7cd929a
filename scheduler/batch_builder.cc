#include "scheduler/batch_builder.h"

#include <utility>

#include "engine/base/check.h"

namespace minitron::scheduler {
namespace {

void AppendTokenRows(const ScheduledSequence& scheduled, int block_size, engine::Batch& batch) {
  const Sequence& sequence = *scheduled.sequence;
  const int end = scheduled.first_position + scheduled.num_tokens;
  const bool follows_unread = scheduled.previous_result_row != engine::kNone;
  CHECK(end <= sequence.num_tokens() + (follows_unread ? 1 : 0));
  CHECK(end <= static_cast<int>(sequence.block_table().size()) * block_size);
  for (int position = scheduled.first_position; position < end; ++position) {
    batch.token_ids.push_back(follows_unread ? engine::TokenFromPreviousResult(scheduled.previous_result_row)
                                             : sequence.tokens()[position]);
    batch.positions.push_back(position);
    const int64_t block = sequence.block_table()[position / block_size];
    batch.slot_mapping.push_back(block * block_size + position % block_size);
  }
  batch.query_start.push_back(batch.num_tokens());
  batch.kv_lens.push_back(end);
  const int num_blocks = (end + block_size - 1) / block_size;
  const BlockTable& table = sequence.block_table();
  batch.block_ids.insert(batch.block_ids.end(), table.begin(), table.begin() + num_blocks);
  batch.block_start.push_back(static_cast<int32_t>(batch.block_ids.size()));
}

void AppendPromptLogprobRows(const ScheduledSequence& scheduled, int first_row, int sequence_row,
                             engine::Batch& batch) {
  const Request& request = scheduled.sequence->request();
  for (int i = 0; i < scheduled.num_prompt_logprobs; ++i) {
    const int target_position = scheduled.first_prompt_logprob + i;
    engine::ResultRow row;
    row.token_row = first_row + (target_position - 1 - scheduled.first_position);
    row.sequence = sequence_row;
    row.target = request.prompt_token_ids[target_position];
    row.num_top_logprobs = request.num_prompt_top_logprobs;
    batch.results.push_back(row);
  }
}

void AppendSampledRow(const ScheduledSequence& scheduled, int first_row, int sequence_row, engine::Batch& batch) {
  const Sequence& sequence = *scheduled.sequence;
  engine::ResultRow row;
  row.token_row = first_row + scheduled.num_tokens - 1;
  row.sequence = sequence_row;
  row.num_top_logprobs = sequence.request().num_top_logprobs;
  row.history_slot = sequence.history_slot();
  row.output_position = scheduled.output_position;
  row.params = &sequence.params();
  if (scheduled.output_position < sequence.request().min_tokens && !sequence.banned_tokens().empty()) {
    row.banned_tokens = &sequence.banned_tokens();
  }
  batch.results.push_back(row);
}

}  // namespace

engine::Batch BuildBatch(const SchedulerOutput& plan, engine::Batch recycled) {
  engine::Batch batch = std::move(recycled);
  batch.Clear();
  batch.token_ids.reserve(plan.num_tokens);
  batch.positions.reserve(plan.num_tokens);
  batch.slot_mapping.reserve(plan.num_tokens);
  for (const ScheduledSequence& scheduled : plan.sequences) {
    const int first_row = batch.num_tokens();
    const int sequence_row = batch.num_sequences();
    AppendTokenRows(scheduled, plan.block_size, batch);
    AppendPromptLogprobRows(scheduled, first_row, sequence_row, batch);
    if (scheduled.samples) AppendSampledRow(scheduled, first_row, sequence_row, batch);
    if (scheduled.resets_history) {
      const Sequence& sequence = *scheduled.sequence;
      batch.history_resets.push_back({sequence.history_slot(), sequence.request().prompt_token_ids,
                                      sequence.OutputTokens(), sequence.params().constraint.get()});
    }
  }
  return batch;
}

}  // namespace minitron::scheduler
