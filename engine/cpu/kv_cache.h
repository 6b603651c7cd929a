// KvCache: the bytes of the paged key/value cache on the CPU. Block ids index it; who owns a block is the scheduler's.
//
// Elements are bf16 or fp32. What is read back for a position is what was stored for it, whoever reads: a row sees the
// same keys and values in the step that writes them and in any later one. Layout, outermost first:
//   keys   [layer][block][kv head][head_dim][block_size]   tokens innermost: scores of many keys are one vector
//   values [layer][block][kv head][block_size][head_dim]   dims innermost: weighted sums run along a row
// Memory is committed when a block is first written.
#pragma once

#include <cstdint>

#include "engine/cpu/aligned_buffer.h"
#include "engine/model_runner.h"

namespace minitron::engine::cpu {

struct KvCacheShape {
  int num_layers = 0;
  int num_blocks = 0;
  int num_heads = 0;  // key/value heads
  int head_dim = 0;
  int block_size = 0;  // tokens, a power of two >= 8
  KvCacheType type = KvCacheType::kBf16;

  int64_t head_block_elements() const { return int64_t{block_size} * head_dim; }
  int64_t total_elements() const { return int64_t{num_layers} * num_blocks * num_heads * head_block_elements(); }
  int64_t element_bytes() const { return type == KvCacheType::kBf16 ? 2 : 4; }
};

class KvCache {
 public:
  explicit KvCache(const KvCacheShape& shape)
      : shape_(shape),
        keys_(shape.total_elements() * shape.element_bytes()),
        values_(shape.total_elements() * shape.element_bytes()) {}

  // [head_dim, block_size] and [block_size, head_dim] of one block and head. Element: uint16_t (bf16) or float, as the
  // shape says.
  template <typename Element>
  Element* KeyBlock(int layer, int64_t block, int head) const {
    return At<Element>(keys_, layer, block, head);
  }
  template <typename Element>
  Element* ValueBlock(int layer, int64_t block, int head) const {
    return At<Element>(values_, layer, block, head);
  }
  const KvCacheShape& shape() const { return shape_; }

 private:
  template <typename Element>
  Element* At(const AlignedBuffer<uint8_t>& buffer, int layer, int64_t block, int head) const {
    DCHECK(block >= 0 && block < shape_.num_blocks);
    DCHECK(sizeof(Element) == static_cast<size_t>(shape_.element_bytes()));
    const int64_t index = (int64_t{layer} * shape_.num_blocks + block) * shape_.num_heads + head;
    return reinterpret_cast<Element*>(buffer.data()) + index * shape_.head_block_elements();
  }

  KvCacheShape shape_;
  AlignedBuffer<uint8_t> keys_;
  AlignedBuffer<uint8_t> values_;
};

}  // namespace minitron::engine::cpu
