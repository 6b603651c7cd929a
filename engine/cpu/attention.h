// Attention of ragged queries over the paged KV cache.
#pragma once

#include <cstdint>

#include "engine/cpu/kv_cache.h"
#include "engine/cpu/thread_pool.h"
#include "engine/ops.h"

namespace minitron::engine::cpu {

// Floats of scratch PagedAttention needs per thread.
constexpr int64_t AttentionScratchFloats(int group_size, int max_context_tokens, int block_size) {
  const int64_t padded = (int64_t{max_context_tokens} + block_size - 1) / block_size * block_size;
  return group_size * padded;
}

// The op of ops.h. q, out [T, H * D]; token_sequence [T] names each row's sequence; scratch holds
// AttentionScratchFloats for each thread of the pool.
// Order: a score sums over dims 0 .. D-1; the softmax's sum is by lane like MatMul's; a value sums over positions 0 ..
// p. None of them depends on blocks or chunks.
void PagedAttention(ThreadPool& pool, const BatchView& batch, const int32_t* token_sequence, const KvCache& cache,
                    int layer, int group_size, MatrixView<const float> q, MatrixView<float> out, float* scratch,
                    int64_t scratch_floats);

}  // namespace minitron::engine::cpu
