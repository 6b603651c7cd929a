#include "scheduler/block_allocator.h"

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"

namespace minitron::scheduler {

BlockAllocator::BlockAllocator(int num_blocks) : ref_counts_(num_blocks, 0) {
  CHECK(num_blocks > 0);
  free_.reserve(num_blocks);
  for (BlockId block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

absl::StatusOr<std::vector<BlockId>> BlockAllocator::Allocate(int num_blocks) {
  CHECK(num_blocks >= 0);
  if (num_blocks > num_free()) {
    return absl::ResourceExhaustedError(
        absl::StrCat(num_blocks, " KV blocks wanted, ", num_free(), " of ", this->num_blocks(), " free"));
  }
  std::vector<BlockId> blocks(free_.rbegin(), free_.rbegin() + num_blocks);
  free_.resize(free_.size() - num_blocks);
  for (const BlockId block : blocks) ref_counts_[block] = 1;
  return blocks;
}

void BlockAllocator::Share(BlockId block) {
  CHECK(ref_count(block) > 0);
  ++ref_counts_[block];
}

void BlockAllocator::Release(BlockId block) {
  CHECK(ref_count(block) > 0);
  if (--ref_counts_[block] == 0) free_.push_back(block);
}

int BlockAllocator::ref_count(BlockId block) const {
  CHECK(block >= 0 && block < num_blocks());
  return ref_counts_[block];
}

}  // namespace minitron::scheduler
