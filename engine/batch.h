// Batch and StepResult: plain host arrays, the contract between scheduler/ and engine/.
//
// Dimensions: T token rows, S sequences, R result rows. A batch mixes prompt chunks and decode rows freely: a sequence
// has some computed tokens in its KV blocks and some rows here. No row's result depends on any other sequence of the
// batch.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/sampling_params.h"

namespace minitron::engine {

using BlockId = int32_t;

// No history slot / no target token.
inline constexpr int32_t kNone = -1;

// A token id that is not known on the host yet: "the token that result row r of the previous batch produced".
// Stored in Batch::token_ids as a negative number, so that step n+1 can be submitted before step n is read back.
// Where that row failed, or its token is outside the vocabulary, the runner takes any token in range: the sequence ends
// when the host reads the failure, and this row's result is dropped.
constexpr TokenId TokenFromPreviousResult(int32_t result_row) { return -1 - result_row; }
constexpr bool IsFromPreviousResult(TokenId token) { return token < 0; }
constexpr int32_t PreviousResultRow(TokenId token) { return -1 - token; }

// What to produce from one token row: a sampled token, or the log-probability of a known one.
struct ResultRow {
  int32_t token_row = 0;                   // index into [0, T)
  int32_t sequence = 0;                    // index into [0, S)
  TokenId target = kNone;                  // kNone: sample a token. Else: report this token's logprob, draw nothing
  int32_t num_top_logprobs = kNone;        // kNone: no logprobs; 0: of the chosen token; n: and of the n most likely
  int32_t history_slot = kNone;            // where the runner keeps the sequence's tokens, if its params need them
  int32_t output_position = 0;             // 0 for the first generated token; the counter of the random draw
  const SamplingParams* params = nullptr;  // borrowed from the Sequence until Collect; null when target is set
  // Ids whose probability is zero for this row (end-of-sequence and stop ids before min_tokens). Borrowed like params.
  const std::vector<TokenId>* banned_tokens = nullptr;
};

// (Re)fills a history slot before the step runs: a sequence starts, or restarts after preemption.
// Afterwards the runner appends each token it samples for the slot by itself.
struct HistoryReset {
  int32_t slot = 0;
  std::vector<TokenId> prompt;
  std::vector<TokenId> output;
  // Of the sequence's params, borrowed like them. On a runner that submits asynchronously a row of a constrained
  // sequence must not be submitted before the token of its row before has been collected: its mask depends on that
  // token.
  const TokenConstraint* constraint = nullptr;
};

struct Batch {
  // Per token row, [T]. Rows of one sequence are adjacent, in ascending position.
  std::vector<TokenId> token_ids;     // in [0, vocab), or TokenFromPreviousResult
  std::vector<int32_t> positions;     // 0-based position in the sequence
  std::vector<int64_t> slot_mapping;  // KV slot to write: block_id * block_size + offset in block

  // Per sequence: CSR over token rows and over blocks.
  std::vector<int32_t> query_start = {0};  // [S+1]
  std::vector<int32_t> block_start = {0};  // [S+1]
  std::vector<BlockId> block_ids;          // [block_start[S]]; block i holds positions [i*block_size, (i+1)*block_size)
  std::vector<int32_t> kv_lens;            // [S]; tokens in the KV cache once this step's rows are written

  std::vector<ResultRow> results;  // [R]
  std::vector<HistoryReset> history_resets;

  int num_tokens() const { return static_cast<int>(token_ids.size()); }
  int num_sequences() const { return static_cast<int>(kv_lens.size()); }

  // Empty again, with its memory.
  void Clear() {
    token_ids.clear();
    positions.clear();
    slot_mapping.clear();
    query_start.assign(1, 0);
    block_start.assign(1, 0);
    block_ids.clear();
    kv_lens.clear();
    results.clear();
    history_resets.clear();
  }
};

struct TokenLogprob {
  TokenId token_id = 0;
  float logprob = 0.0f;  // natural log, fp32 log-softmax of the raw logits: before penalties, bias and temperature
  int32_t rank = 0;      // 1 is the most likely; ties by lower id
  friend bool operator==(const TokenLogprob&, const TokenLogprob&) = default;
};

struct ResultRowOutput {
  TokenId token_id = 0;           // sampled, or the target
  bool failed = false;            // the row's logits are not finite (no token was chosen); other rows are not affected
  TokenLogprob chosen;            // filled when num_top_logprobs >= 0
  std::vector<TokenLogprob> top;  // best first, ties by lower id
};

struct StepResult {
  std::vector<ResultRowOutput> rows;  // [R], in the order of Batch::results
};

}  // namespace minitron::engine
