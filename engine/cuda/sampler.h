// The sampler on the device: what engine/sampler.h does, over rows of logits that stay there. Raw pointers, no absl.
//
// Everything a row's token depends on is summed in integers: probabilities relative to the most likely token are fixed
// point numbers of 44 fraction bits (exact for those above 2^-20), so sums have no order and the number of blocks
// cannot show. Tokens are ordered by one key: the logit, then the lower id; top-k and top-p keep a head of that order,
// found by a radix search instead of a sort.
#pragma once

#include <cstdint>

#include "engine/cuda/device.h"

namespace minitron::engine::cuda {

inline constexpr int kMaxTopLogprobs = 32;
inline constexpr int kMaxSamplerVocab = 1 << 19;  // 2^19 probabilities of 2^44 each fit 64 bits
inline constexpr int kSampleTile = 4096;          // logits per block
HOST_DEVICE constexpr int NumSampleTiles(int vocab) { return (vocab + kSampleTile - 1) / kSampleTile; }
inline constexpr int kRadixBits = 11;
inline constexpr int kRadixBins = 1 << kRadixBits;

// What to do with one row; engine::ResultRow and its SamplingParams without pointers.
struct SampleRow {
  double uniform;            // the one random number of (seed, output position), in [0, 1)
  int32_t target;            // token whose logprob is asked for, or -1: sample
  int32_t num_top_logprobs;  // -1: no logprobs
  int32_t history_slot;      // -1: none
  int32_t uses_history;      // whether a penalty is on
  float temperature;         // 0: greedy
  int32_t top_k;             // 0: off; else below the vocabulary
  float top_p;               // 1: off
  float min_p;               // 0: off
  float repetition_penalty, presence_penalty, frequency_penalty;
  int32_t first_edit, num_edits;  // of this row in the step's edits
  int32_t mask;                   // its place in the step's masks, or -1: every token is allowed
};
HOST_DEVICE constexpr bool IsEdited(const SampleRow& row) {
  return row.uses_history != 0 || row.num_edits > 0 || row.mask >= 0;
}
HOST_DEVICE constexpr bool IsDrawn(const SampleRow& row) { return row.target < 0 && row.temperature > 0.0f; }

// Words of a mask: one bit per token, lowest first; a token without its bit is banned.
HOST_DEVICE constexpr int64_t MaskWords(int vocab) { return (int64_t{vocab} + 31) / 32; }

// Added to a token's logit. Minus infinity bans it. A token occurs once per row.
struct LogitEdit {
  int32_t token;
  float bias;
};

struct SampleOutput {
  int32_t token;
  int32_t failed;
  float logprob;  // of the token; with its rank only when logprobs are asked for
  int32_t rank;
};
struct TopLogprob {
  int32_t token;
  float logprob;
};

// Tokens of a history slot: bit 31 is set if the prompt has the token, the rest counts it in the output.
inline constexpr uint32_t kInPrompt = 0x80000000u;
struct HistoryToken {
  int32_t slot;
  int32_t token;
  int32_t is_output;
};
cudaError_t AddToHistory(const HistoryToken* tokens, int num_tokens, uint32_t* history, int vocab, cudaStream_t stream);

struct SampleState;
int64_t SampleStateBytes();

// Device memory of the sampler for at most `max_rows` rows at a time.
struct SamplerMemory {
  SampleState* states;    // [rows]
  float* edited;          // [rows, V]: logits after penalties, biases and bans, of rows that have any
  uint64_t* bin_masses;   // [rows, kRadixBins], zero between calls
  uint32_t* bin_counts;   // [rows, kRadixBins], zero between calls
  uint64_t* tile_masses;  // [rows, tiles]
  uint64_t* tile_tops;    // [rows, tiles, kMaxTopLogprobs]
};

// What at least one row of a call needs; kernels nobody needs are not launched.
struct SampleNeeds {
  bool draws = false, top_k = false, top_p = false, logprobs = false;
  int max_top_logprobs = 0;
};

struct SampleCall {
  const float* logits;  // [rows, V]
  int num_rows, vocab;
  const SampleRow* rows;
  const LogitEdit* edits;
  const uint32_t* masks;   // [masks, MaskWords(V)]
  uint32_t* history;       // [slots, V]; sampled tokens are added
  int32_t* result_tokens;  // [rows]: what the next step may refer to
  SampleOutput* outputs;   // [rows]
  TopLogprob* top;         // [rows, kMaxTopLogprobs]
  SamplerMemory memory;
  SampleNeeds needs;
};
cudaError_t SampleLogits(const SampleCall& call, cudaStream_t stream);

}  // namespace minitron::engine::cuda
