// Attention of ragged queries over the paged KV cache.
#pragma once

#include <cstdint>

#include "engine/cpu/aligned_buffer.h"
#include "engine/cpu/kv_cache.h"
#include "engine/cpu/thread_pool.h"
#include "engine/ops.h"

namespace minitron::engine::cpu {

// Positions are worked through in ranges of this many, at fixed places, whose results are merged in order. A multiple
// of every block size; the scores of six heads over a range are 12 KiB.
inline constexpr int64_t kAttentionRange = 512;

// Memory for PagedAttention, sized once.
class AttentionScratch {
 public:
  AttentionScratch(int group_size, int head_dim, int max_context_tokens, int num_threads);

  // Floats of the result of one range: [group_size, head_dim] weighted values, [group_size] maxima, [group_size] sums.
  int64_t partial_floats() const { return partial_floats_; }
  int64_t max_ranges() const { return max_ranges_; }
  // Rows times heads up to which ranges are shared out among threads.
  int64_t split_items() const { return split_items_; }
  float* scores(int thread) const { return scores_.data() + thread * scores_floats_; }
  float* partials(int64_t item) const { return partials_.data() + item * max_ranges_ * partial_floats_; }

 private:
  int64_t scores_floats_;
  int64_t partial_floats_;
  int64_t max_ranges_;
  int64_t split_items_;
  AlignedBuffer<float> scores_;
  AlignedBuffer<float> partials_;
};

// The op of ops.h. q, out [T, H * D]; token_sequence [T] names each row's sequence.
// Each key and value is loaded once for all query heads of its group. Order: a score sums over dims 0 .. D-1; inside a
// range the softmax's sum is by lane and a value sums over positions in order; ranges are merged in order. None of them
// depends on blocks, chunks, or on whether one thread works on a row's ranges or several.
void PagedAttention(ThreadPool& pool, const BatchView& batch, const int32_t* token_sequence, const KvCache& cache,
                    int layer, int group_size, MatrixView<const float> q, MatrixView<float> out,
                    const AttentionScratch& scratch);

}  // namespace minitron::engine::cpu
