#include "tests/simulation/unbatched_oracle.h"

#include <algorithm>
#include <numeric>

#include "engine/base/check.h"

namespace minitron::simulation {
namespace {

using engine::TokenId;
using scheduler::FinishReason;

// Rows [first, tokens.size()) of a sequence that lies in blocks 0, 1, 2, ...
engine::Batch RowsFrom(int first, const std::vector<TokenId>& tokens, int block_size) {
  engine::Batch batch;
  const int end = static_cast<int>(tokens.size());
  for (int position = first; position < end; ++position) {
    batch.token_ids.push_back(tokens[position]);
    batch.positions.push_back(position);
    batch.slot_mapping.push_back(position);
  }
  batch.query_start.push_back(end - first);
  batch.block_ids.resize((end + block_size - 1) / block_size);
  std::iota(batch.block_ids.begin(), batch.block_ids.end(), 0);
  batch.block_start.push_back(static_cast<int32_t>(batch.block_ids.size()));
  batch.kv_lens.push_back(end);
  return batch;
}

std::vector<engine::ResultRowOutput> Run(const engine::Batch& batch, testing::FakeModelRunner& runner) {
  CHECK(runner.Submit(batch).ok());
  auto result = runner.Collect();
  CHECK(result.ok());
  return std::move(result)->rows;
}

bool Contains(const std::vector<TokenId>& tokens, TokenId token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

}  // namespace

OracleOutput RunUnbatched(const scheduler::Request& request, int index, testing::FakeModelRunnerOptions options) {
  options.num_kv_blocks = options.max_context_tokens;
  options.max_num_tokens = options.max_context_tokens;
  options.compute_late = false;
  options.fail_at_step = -1;
  options.fail_at_submit = -1;
  options.accident_one_in = 0;
  testing::FakeModelRunner runner(options);
  engine::SamplingParams params = request.params;
  params.seed = scheduler::SequenceSeed(params.seed, index);
  std::vector<TokenId> banned = request.eos_token_ids;
  banned.insert(banned.end(), request.stop_token_ids.begin(), request.stop_token_ids.end());
  const int num_prompt = static_cast<int>(request.prompt_token_ids.size());

  OracleOutput expected;
  std::vector<TokenId> tokens = request.prompt_token_ids;
  engine::Batch batch = RowsFrom(0, tokens, options.block_size);
  if (params.NeedsHistory()) batch.history_resets.push_back({0, tokens, {}});
  if (index == 0 && request.num_prompt_top_logprobs >= 0) {
    for (int p = std::max(1, request.prompt_logprobs_start); p < num_prompt; ++p) {
      batch.results.push_back(
          {.token_row = p - 1, .target = tokens[p], .num_top_logprobs = request.num_prompt_top_logprobs});
    }
  }
  for (int position = 0; position < std::max(1, request.max_tokens); ++position) {
    if (request.max_tokens > 0) {
      engine::ResultRow row;
      row.token_row = batch.num_tokens() - 1;
      row.num_top_logprobs = request.num_top_logprobs;
      row.history_slot = params.NeedsHistory() ? 0 : engine::kNone;
      row.output_position = position;
      row.params = &params;
      row.banned_tokens = position < request.min_tokens && !banned.empty() ? &banned : nullptr;
      batch.results.push_back(row);
    }
    std::vector<engine::ResultRowOutput> rows = Run(batch, runner);
    const auto is_broken = [&options](const engine::ResultRowOutput& row) {
      return row.failed || row.token_id < 0 || row.token_id >= options.vocab_size;
    };
    if (std::any_of(rows.begin(), rows.end(), is_broken)) {
      expected.reason = FinishReason::kError;
      // The rows are still what they are; a chunked run may have reported some before the one that failed.
      if (position == 0) expected.prompt_logprobs = rows;
      return expected;
    }
    if (position == 0) expected.prompt_logprobs.assign(rows.begin(), rows.end() - (request.max_tokens > 0 ? 1 : 0));
    if (request.max_tokens == 0) return expected;
    expected.tokens.push_back(rows.back());
    const TokenId token = rows.back().token_id;
    if (Contains(request.eos_token_ids, token)) expected.reason = FinishReason::kEosToken;
    if (expected.reason == FinishReason::kLength && Contains(request.stop_token_ids, token)) {
      expected.reason = FinishReason::kStopToken;
    }
    if (expected.reason != FinishReason::kLength) return expected;
    tokens.push_back(token);
    batch = RowsFrom(num_prompt + position, tokens, options.block_size);
  }
  return expected;
}

}  // namespace minitron::simulation
