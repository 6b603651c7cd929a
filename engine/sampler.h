// The sampler: from a row of logits to a token, as pure functions of the row, its params and its history.
//
// Order of work: banned tokens, penalties (repetition over prompt and output, then frequency and presence over the
// output), logit bias, temperature, top-k, top-p, min-p, draw. Logprobs and ranks are of the raw logits, before all
// that. Ties go to the lower id everywhere. One uniform number per (seed, output position) picks by inverse CDF in id
// order.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "absl/types/span.h"
#include "engine/batch.h"
#include "engine/token_constraint.h"

namespace minitron::engine {

// The tokens of one sequence as penalties need them, and how far its constraint has come.
class TokenHistory {
 public:
  struct Seen {
    int32_t output_count = 0;
    bool in_prompt = false;
  };

  void Reset(const HistoryReset& reset);
  void AppendOutput(TokenId token);
  const std::unordered_map<TokenId, Seen>& seen() const { return seen_; }
  // One bit per token id: who may come next. Requires a constraint.
  absl::Span<const uint64_t> AllowedTokens() const { return walk_->Allowed(); }

 private:
  std::unordered_map<TokenId, Seen> seen_;
  std::unique_ptr<TokenWalk> walk_;  // null: no constraint
};

// Work space of one thread, grown to the vocabulary on first use and then reused.
struct SamplerScratch {
  struct Edit {
    TokenId token;
    float raw_logit;
  };
  std::vector<Edit> edits;          // logits changed in place, to be restored
  std::vector<float> weights;       // unnormalised probabilities
  std::vector<TokenId> candidates;  // ids that passed the filters
};

// Fills `out` with the ids of the k highest logits, highest first, ties by lower id. k is cut at logits.size().
void SelectTop(absl::Span<const float> logits, int k, std::vector<TokenId>& out);

// Produces row.target's logprob, or draws a token by *row.params. `history` may be null when the params need none.
// Logits are changed while it runs and restored before it returns. Requires: ids within logits, params in range.
ResultRowOutput ProcessRow(absl::Span<float> logits, const ResultRow& row, const TokenHistory* history,
                           SamplerScratch& scratch);

}  // namespace minitron::engine
