// What the sampler's kernels share: the order of tokens, fixed-point probabilities, a row's state between kernels.
#pragma once

#include "engine/cuda/sampler.h"

namespace minitron::engine::cuda {

inline constexpr int kSampleThreads = 256;
inline constexpr int kPerThread = kSampleTile / kSampleThreads;
inline constexpr int kSampleWarps = kSampleThreads / 32;

// The order of tokens in one number: larger is better. 32 bits of logit, then 23 bits that fall with the id.
inline constexpr int kKeyBits = 5 * kRadixBits;
inline constexpr int kIdBits = kKeyBits - 32;
inline constexpr uint32_t kIdMask = (1u << kIdBits) - 1;
static_assert(kMaxSamplerVocab <= (1 << kIdBits));

// Between the kernels of one call. All zero at its start.
struct SampleState {
  uint64_t raw_best;    // key of the best raw logit
  uint64_t best;        // of the best logit after edits
  uint64_t raw_mass;    // sum of raw probabilities relative to the best
  uint64_t cut;         // keys below are filtered out
  uint64_t prefix;      // bits of the cut the search has found
  uint64_t needed;      // count or mass the kept part of the bin must reach
  uint32_t not_finite;  // a raw logit is NaN or infinite
  uint32_t num_better;  // tokens before the chosen one
  uint32_t search_done;
  uint32_t failed;
  int32_t token;
};

enum class Filter { kTopK, kTopP };
HOST_DEVICE constexpr bool Uses(const SampleRow& row, Filter filter) {
  return IsDrawn(row) && (filter == Filter::kTopK ? row.top_k > 0 : row.top_p < 1.0f);
}

// NaN sorts below everything; both zeros are one value.
DEVICE uint32_t OrderedBits(float x) {
  const uint32_t bits = FloatBits(x + 0.0f);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0;
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
DEVICE uint64_t KeyOf(float logit, int token) {
  return static_cast<uint64_t>(OrderedBits(logit)) << kIdBits | (kIdMask - static_cast<uint32_t>(token));
}
DEVICE int TokenOf(uint64_t key) { return static_cast<int>(kIdMask - static_cast<uint32_t>(key & kIdMask)); }
DEVICE float LogitOf(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> kIdBits);
  return BitsToFloat((ordered & 0x80000000u) != 0 ? ordered & 0x7FFFFFFFu : ~ordered);
}

// exp((x - best) / temperature): 1 for the best. The same formula as on the CPU.
DEVICE float Probability(float logit, float best, float temperature) { return Exp((logit - best) / temperature); }
DEVICE uint64_t Mass(float probability) { return static_cast<uint64_t>(probability * 0x1.0p44f); }

// Reductions over the block; every thread gets the result. scratch [kSampleWarps]
DEVICE uint64_t BlockMax(uint64_t value, uint64_t* scratch) {
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint64_t other = ShuffleXor(value, mask);
    value = other > value ? other : value;
  }
  if (Lane() == 0) scratch[WarpIndex()] = value;
  SyncThreads();
  UNROLL
  for (int w = 0; w < kSampleWarps; ++w) value = scratch[w] > value ? scratch[w] : value;
  SyncThreads();
  return value;
}
DEVICE uint64_t BlockTotal(uint64_t value, uint64_t* scratch) {
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value += ShuffleXor(value, mask);
  if (Lane() == 0) scratch[WarpIndex()] = value;
  SyncThreads();
  uint64_t total = 0;
  UNROLL
  for (int w = 0; w < kSampleWarps; ++w) total += scratch[w];
  SyncThreads();
  return total;
}
// The sum over the threads before this one.
DEVICE uint64_t BlockSumBefore(uint64_t value, uint64_t* scratch) {
  uint64_t sum = value;
  UNROLL
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint64_t below = ShuffleUp(sum, delta);
    if (Lane() >= delta) sum += below;
  }
  if (Lane() == 31) scratch[WarpIndex()] = sum;
  SyncThreads();
  uint64_t before = sum - value;
  for (int w = 0; w < WarpIndex(); ++w) before += scratch[w];
  SyncThreads();
  return before;
}

// The logits a row is sampled from.
DEVICE const float* SampledLogits(const SampleCall& call, int row) {
  return (IsEdited(call.rows[row]) ? call.memory.edited : call.logits) + static_cast<int64_t>(row) * call.vocab;
}

// Kernels over (tile, row): whether this thread's element `i` of the tile is in the vocabulary, and which it is.
DEVICE int TileToken(int i) {
  return static_cast<int>(BlockIndex().x) * kSampleTile + i * kSampleThreads + static_cast<int>(ThreadIndex().x);
}

// This thread's logits of the tile, all loads under way at once; 0 past the vocabulary.
DEVICE void LoadTile(const float* logits, int vocab, float (&x)[kPerThread]) {
  UNROLL
  for (int i = 0; i < kPerThread; ++i) x[i] = TileToken(i) < vocab ? logits[TileToken(i)] : 0.0f;
}

cudaError_t FilterLogits(const SampleCall& call, cudaStream_t stream);  // sets the states' cut
cudaError_t DrawTokens(const SampleCall& call, cudaStream_t stream);    // sets the states' token
cudaError_t StoreSamples(const SampleCall& call, cudaStream_t stream);  // logprobs, outputs, history

}  // namespace minitron::engine::cuda
