// KvCache: the bytes of the paged key/value cache on the CPU. Block ids index it; who owns a block is the scheduler's.
//
// fp32, so that a row read back is the row written. Layout, outermost first:
//   keys   [layer][block][kv head][head_dim][block_size]   tokens innermost: scores of many keys are one vector
//   values [layer][block][kv head][block_size][head_dim]   dims innermost: weighted sums run along a row
// Memory is committed when a block is first written.
#pragma once

#include <cstdint>

#include "engine/cpu/aligned_buffer.h"

namespace minitron::engine::cpu {

struct KvCacheShape {
  int num_layers = 0;
  int num_blocks = 0;
  int num_heads = 0;  // key/value heads
  int head_dim = 0;
  int block_size = 0;  // tokens, a power of two >= 8

  int64_t head_block_floats() const { return int64_t{block_size} * head_dim; }
  int64_t total_floats() const { return int64_t{num_layers} * num_blocks * num_heads * head_block_floats(); }
};

class KvCache {
 public:
  explicit KvCache(const KvCacheShape& shape)
      : shape_(shape), keys_(shape.total_floats()), values_(shape.total_floats()) {}

  // [head_dim, block_size] and [block_size, head_dim] of one block and head.
  float* KeyBlock(int layer, int64_t block, int head) const { return keys_.data() + Offset(layer, block, head); }
  float* ValueBlock(int layer, int64_t block, int head) const { return values_.data() + Offset(layer, block, head); }
  const KvCacheShape& shape() const { return shape_; }

 private:
  int64_t Offset(int layer, int64_t block, int head) const {
    DCHECK(block >= 0 && block < shape_.num_blocks);
    return ((int64_t{layer} * shape_.num_blocks + block) * shape_.num_heads + head) * shape_.head_block_floats();
  }

  KvCacheShape shape_;
  AlignedBuffer<float> keys_;
  AlignedBuffer<float> values_;
};

}  // namespace minitron::engine::cpu
