#include "scheduler/block_allocator.h"

#include "engine/base/check.h"

namespace minitron::scheduler {

BlockAllocator::BlockAllocator(int num_blocks)
    : ref_counts_(num_blocks, 0), next_(num_blocks + 1, kNotInList), previous_(num_blocks + 1, kNotInList) {
  CHECK(num_blocks > 0);
  free_.reserve(num_blocks);
  for (BlockId block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
  next_[num_blocks] = previous_[num_blocks] = num_blocks;
}

BlockId BlockAllocator::Allocate() {
  CHECK(num_available() > 0);
  BlockId block = next_.back();
  if (free_.empty()) {
    Unlink(block);
  } else {
    block = free_.back();
    free_.pop_back();
  }
  ref_counts_[block] = 1;
  return block;
}

void BlockAllocator::Share(BlockId block) {
  CHECK(ref_count(block) > 0 || is_cached(block));
  if (is_cached(block)) Unlink(block);
  ++ref_counts_[block];
}

void BlockAllocator::Release(BlockId block, bool keep_content) {
  CHECK(ref_count(block) > 0);
  if (--ref_counts_[block] > 0) return;
  if (!keep_content) {
    free_.push_back(block);
    return;
  }
  const BlockId ring = num_blocks();
  next_[block] = ring;
  previous_[block] = previous_[ring];
  next_[previous_[block]] = block;
  previous_[ring] = block;
  ++num_cached_;
}

void BlockAllocator::Unlink(BlockId block) {
  next_[previous_[block]] = next_[block];
  previous_[next_[block]] = previous_[block];
  next_[block] = previous_[block] = kNotInList;
  --num_cached_;
}

int BlockAllocator::ref_count(BlockId block) const {
  CHECK(block >= 0 && block < num_blocks());
  return ref_counts_[block];
}

std::vector<BlockId> BlockAllocator::cached_blocks() const {
  std::vector<BlockId> blocks;
  for (BlockId block = next_.back(); block != num_blocks(); block = next_[block]) blocks.push_back(block);
  return blocks;
}

}  // namespace minitron::scheduler
